"""A fixed validation set: the user's iterable of batches, cycled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_molere.arguments import check_count
from torch_molere.calls import arguments_of, map_tensors, tensors_of
from torch_molere.hypergradients.functional import preserved_randomness
from torch_molere.validation.source import Drawn, Sending, ValidationSource


class FixedValidation(ValidationSource):
    """Cycles an iterable of ``(inputs, targets)`` or ``(inputs, targets, indices)`` batches, in its own order.

    Every batch is read from random streams of its own (PyTorch's, NumPy's, Python's and the loader's ``generator``),
    which depend on the seed, the pass and the position alone. So the loop's streams are neither read nor moved, and a
    pass can be taken up in the middle: what was drawn of it is read again, which takes long for an endless loader.
    A last batch of one instance, as loaders leave it, is passed over where the model has batch normalisation.

    Args:
        batches: a ``DataLoader`` of any kind, or another iterable that can start again; it may be endless.

    Raises:
        TypeError: if ``batches`` is not iterable, or an iterator, which ends after one pass.
        ValueError: if it is known to be empty.
    """

    trusted = True

    def __init__(self, batches: Iterable[Any]) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"validation must be an iterable of batches, got {type(batches).__name__}; of a dataset give "
                "DataLoader(dataset, batch_size=..., shuffle=True)"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                "validation must be an iterable that can start again (a DataLoader or a list), "
                f"got the one-pass iterator {type(batches).__name__}"
            )
        try:
            empty = len(batches) == 0  # type: ignore[arg-type]
        except TypeError:  # the __len__ of a DataLoader raises it where its IterableDataset has none
            empty = False
        if empty:
            raise ValueError("validation is empty: it needs at least one batch")
        self.batches = batches
        self._pass = 0
        self._position = 0  # batches of this pass that were committed
        self._committed = (0, 0)  # the same, before a draw has found that the pass is over
        self._iterator: Iterator[Any] | None = None
        self._batch: Any = None  # the one at this position, once it is read
        self._normalised = False

    def attach(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Called once, by the reweighter that uses it."""
        super().attach(model, device, seed)
        self._normalised = any(isinstance(module, _BatchNorm) for module in model.modules())

    def draw(self, batch_size: int, seed: int) -> Drawn:
        """The next batch, copied to the device.

        Raises:
            ValueError: if the iterable yields nothing, or no ``(inputs, targets)``.
        """
        if self._batch is None:
            self._read()
        batch = self._batch
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            found = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}"
            raise ValueError(
                f"validation must yield (inputs, targets) or (inputs, targets, indices), got {found}; "
                "a single batch is a list of one: [(inputs, targets)]"
            )
        # A model that edits its inputs in place must not edit the user's.
        inputs, targets = map_tensors(lambda t: t.to(self.device or t.device, copy=True), tuple(batch[:2]))
        return Drawn(arguments_of(inputs), targets, [])

    def commit(self, sendings: Sequence[Sending], drawn: Drawn | None, learned: Any) -> None:
        """Go on to the next batch, if one was drawn."""
        if drawn is not None:
            self._position += 1
            self._committed = self._pass, self._position
            self._batch = None

    def state_dict(self) -> dict[str, int]:
        """Where in which pass it is."""
        number, position = self._committed
        return {"pass": number, "position": position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a pass where :meth:`state_dict` was called.

        Raises:
            ValueError: for other than integers ≥ 0. Nothing has changed then.
        """
        parts = [check_count(f"the validation's {name}", state.get(name), 0) for name in ("pass", "position", "seed")]
        self._pass, self._position, self.seed = parts
        self._committed = self._pass, self._position
        self._iterator = self._batch = None

    def _read(self) -> None:
        if self._iterator is None:
            with self._streams(-1):
                self._iterator = iter(self.batches)
            for position in range(self._position):
                if self._next(position) is None:  # there are fewer than when the state was saved
                    break
        self._batch = self._next(self._position)
        if self._batch is None:
            if self._position == 0:
                raise ValueError("validation is empty: it yielded no batch")
            self._pass, self._position, self._iterator = self._pass + 1, 0, None
            self._read()
        elif self._position and self._normalised and _is_of_one(self._batch):
            self._position += 1
            self._read()

    def _next(self, position: int) -> Any:
        iterator, self._iterator = self._iterator, None  # where reading fails, the pass is taken up anew
        assert iterator is not None
        with self._streams(position):
            batch = next(iterator, None)
        self._iterator = iterator
        return batch

    @contextmanager
    def _streams(self, position: int) -> Iterator[None]:
        seed = ((self.seed * 1_000_003 + self._pass) * 1_000_003 + position + 1) % 2**63
        generator = getattr(self.batches, "generator", None)
        own = generator if isinstance(generator, torch.Generator) else torch.Generator()
        before = own.get_state()
        with preserved_randomness(torch.device("cpu"), seed):
            try:
                own.manual_seed(seed)
                yield
            finally:
                own.set_state(before)


def _is_of_one(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and next((t.shape[0] for t in tensors_of(batch) if t.ndim), 0) == 1

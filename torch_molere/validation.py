"""A fixed validation set: the user's iterable of batches, cycled without touching the user's random streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch

from torch_molere.evaluation import Arguments, arguments_of, move, preserved_randomness
from torch_molere.states import whole


class FixedValidation:
    """Cycles an iterable of ``(inputs, targets)`` batches; each pass over it starts it anew.

    Every pass, and every batch drawn, starts from a random state of its own derived from ``seed``, so a shuffling
    loader neither reads nor moves the global stream, and a pass can be taken up again in the middle.

    Args:
        batches: a ``DataLoader`` or any iterable that can be iterated more than once.
        device: where the batches go.
        seed: of the passes.

    Raises:
        TypeError: if ``batches`` is not iterable, or an iterator that ends after one pass.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device, seed: int = 0) -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(f"validation must be an iterable of batches, got {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise TypeError(
                "validation must be an iterable that can start again (a DataLoader or a list), "
                f"got the one-pass iterator {type(batches).__name__}"
            )
        if isinstance(batches, Sized) and len(batches) == 0:
            raise ValueError("validation is empty: it needs at least one batch")
        self.batches = batches
        self.device = device
        self.seed = seed
        self._pass = 0
        self._position = 0  # batches drawn in this pass
        self._iterator: Iterator[Any] | None = None

    def draw(self) -> tuple[Arguments, Any]:
        """The next batch, on the device.

        Raises:
            ValueError: if the iterable yields nothing, or no ``(inputs, targets)``.
        """
        if self._iterator is None:
            self._resume()
        batch = self._next(self._position)
        if batch is None:
            if self._position == 0:
                raise ValueError("validation is empty: it yielded no batch")
            self._pass, self._position, self._iterator = self._pass + 1, 0, None
            return self.draw()
        self._position += 1
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise ValueError(f"validation must yield (inputs, targets) batches, got {type(batch).__name__}")
        return arguments_of(move(batch[0], self.device)), move(batch[1], self.device)

    def _next(self, position: int) -> Any:
        assert self._iterator is not None
        with preserved_randomness(torch.device("cpu"), self._seed_of(position)):
            return next(self._iterator, None)

    def _resume(self) -> None:
        """Start the present pass and skip what was drawn of it already."""
        with preserved_randomness(torch.device("cpu"), self._seed_of(-1)):
            self._iterator = iter(self.batches)
        for position in range(self._position):
            if self._next(position) is None:
                break  # it has become shorter

    def _seed_of(self, position: int) -> int:
        return ((self.seed * 1_000_003 + self._pass) * 1_000_003 + position + 1) % 2**63

    def state_dict(self) -> dict[str, int]:
        """Where in which pass it is."""
        return {"pass": self._pass, "position": self._position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a pass where :meth:`state_dict` was called.

        Raises:
            ValueError: for other than whole numbers.
        """
        parts = [whole(state[name], f"the validation's {name}") for name in ("pass", "position", "seed")]
        self._pass, self._position, self.seed = parts
        self._iterator = None

"""The splitter-managed validation buffer of MOLERE: instances taken from the stream of training batches."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_molere.arguments import check_count
from torch_molere.distributed.collectives import ranks, summed_gradients
from torch_molere.networks import OptimizerFactory, check_states, learning_parameters, optimizer_of, take_step
from torch_molere.samples import Samples
from torch_molere.splitting import MarginSplitter, RandomSplitter, splitter_loss
from torch_molere.validation.source import Drawn, Sending, ValidationSource
from torch_molere.validation.store import LEAST, InstanceStore, Padding, size_of

LABEL_TOLERANCE = 0.25
"""How far the share of a class among the buffer's labels may exceed its share of the stream, relative."""


@dataclass(frozen=True)
class Learned:
    """Of a validation batch: Θ's gradients, None where it has nothing to learn, and the places of easy instances."""

    gradients: list[Tensor | None] | None
    easy: list[int]
    loss: Tensor


class ValidationBuffer(ValidationSource):
    """Sends some instances of each batch to a bounded buffer, as the splitter says, and draws validation batches of it.

    An instance goes to validation where the splitter's p < 1/2, the smallest p first, within [fraction/2, 3 fraction/2]
    of the stream; during warm-up by a random split. A row that is met again and not sent, or that another rank sends,
    leaves the buffer, unless fewer than two instances would stay; so does, with a splitter that learns, an instance of
    the validation batch that has become easy (p ≥ 1/2 and the classifier is right). When full, a random one makes room.
    With a splitter that ``balances_labels``, rows already held are sent before others, and the buffer's labels stay
    near the stream's.

    Args:
        splitter: gives each instance the probability of the training side; a :class:`MarginSplitter` by default.
        fraction: the share of instances sent to validation, in (0, 1).
        hold_out: whether instances sent are left out of training.
        capacity: the most instances held, by all ranks together; at least 2.
        max_bytes: the most memory that they take, together too.
        padding: for inputs or targets of another length in each batch (texts padded to their batch's longest): what
            fills shorter instances up at the end. A number for all tensors, or one by the name of an input (its
            position where the model is called without names) and ``"targets"``:
            ``{"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "targets": -100}``.
        batch_size: of a validation batch; half the training batch's by default, at least 2.
        lr: learning rate of the splitter's optimizer (Adam), where it has parameters.
        optimizer: makes another one from a list of parameters.

    Raises:
        TypeError: if ``splitter`` is no module, ``optimizer`` cannot be called, or ``padding`` holds no numbers.
        ValueError: if another argument is out of its range.
    """

    def __init__(
        self,
        *,
        splitter: nn.Module | None = None,
        fraction: float = 0.1,
        hold_out: bool = False,
        capacity: int = 2048,
        max_bytes: int = 256 * 2**20,
        padding: Padding | None = None,
        batch_size: int | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        if splitter is not None and not isinstance(splitter, nn.Module):
            raise TypeError(f"splitter must be an nn.Module, got {splitter!r:.60}")
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must lie in (0, 1), got {fraction!r}")
        if not isinstance(hold_out, bool):
            raise ValueError(f"hold_out must be True or False, got {hold_out!r:.60}")
        if not (lr >= 0.0 and math.isfinite(lr)):
            raise ValueError(f"lr must be a finite number ≥ 0, got {lr!r}")
        if optimizer is not None and not callable(optimizer):
            raise TypeError(f"optimizer must make one from a list of parameters, got {optimizer!r:.60}")
        self.splitter = MarginSplitter() if splitter is None else splitter
        self.fraction = fraction
        self.holds_out = hold_out
        self.capacity = check_count("capacity", capacity, LEAST)
        self.max_bytes = check_count("max_bytes", max_bytes, 1)
        numbers = list(padding.values()) if isinstance(padding, Mapping) else [0 if padding is None else padding]
        if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
            raise TypeError(f"padding must be a number, or numbers by the name of an input, got {padding!r:.60}")
        self.padding = dict(padding) if isinstance(padding, Mapping) else padding
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size, LEAST)
        if hasattr(self.splitter, "fraction"):
            self.splitter.fraction = fraction  # type: ignore[assignment]
        self.balances_labels = bool(getattr(self.splitter, "balances_labels", False))
        self._parameters = learning_parameters(self.splitter)
        self._optimizer_factory, self._lr = optimizer, lr
        self._optimizer: Optimizer | None = None
        self._quota = Quota(fraction)
        self._seen: Counter[int] = Counter()  # how often the stream showed each class, where labels are balanced
        self._commits = 0
        self._splitter_loss: Tensor | None = None
        self._store: InstanceStore | None = None

    def __len__(self) -> int:
        return 0 if self._store is None else len(self._store)

    @property
    def store(self) -> InstanceStore:
        """What it holds.

        Raises:
            RuntimeError: before a reweighter uses it.
        """
        if self._store is None:
            raise RuntimeError("the ValidationBuffer is not used by a reweighter yet: give it as validation=")
        return self._store

    def attach(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Called once, by the reweighter that uses it.

        Raises:
            ValueError: if a reweighter uses it already, or the splitter and the model share parameters.
        """
        if {id(parameter) for parameter in model.parameters()} & {id(p) for p in self.splitter.parameters()}:
            raise ValueError("splitter must not share parameters with the model; give it a copy")
        super().attach(model, device, seed)
        self.splitter.to(device)
        self._optimizer = optimizer_of(self.splitter, self._optimizer_factory, self._lr)
        self._warmup_splitter = RandomSplitter(self.fraction, seed)
        capacity, max_bytes = max(-(-self.capacity // ranks()), LEAST), -(-self.max_bytes // ranks())
        self._store = InstanceStore(capacity, max_bytes, self.padding)

    def probabilities(self, samples: Samples, warming_up: bool) -> Tensor:
        """``(B,)`` probabilities of the training side, for :meth:`choose`.

        Raises:
            ValueError: if the splitter does not return ``(B,)``, or the batch does not fit the buffer.
        """
        size = samples.losses.shape[0]
        different = self.store.check(samples.arguments, samples.targets, size, wait=False)
        with torch.no_grad():
            p = (self._warmup_splitter if warming_up else self.splitter)(samples)
        if not isinstance(p, Tensor) or p.shape != (size,):
            found = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"splitter must return ({size},) probabilities, got {found}")
        return p if different is None else p.masked_fill(different.to(p.device), torch.nan)  # choose() says why

    def choose(
        self,
        samples: Samples,
        p: list[float] | None,
        rows: list[int] | None,
        classes: list[int] | None,
        decided: Mapping[int, bool],
    ) -> list[int]:
        """Positions of the instances that go to validation, ascending.

        Raises:
            ValueError: if the splitter's p are no probabilities, or the batch does not fit the buffer.
        """
        assert p is not None
        if not (min(p) >= 0.0 and max(p) <= 1.0 and sum(p) >= 0.0):
            self.store.check(samples.arguments, samples.targets, len(p))
            raise ValueError(f"splitter must return probabilities in [0, 1], got {min(p)} to {max(p)}")
        low, high = self._quota.bounds(len(p))
        chosen: list[int] = []
        free: Sequence[int] = range(len(p))
        if decided and rows is not None:
            chosen = [i for i in free if decided.get(rows[i], False)]
            free = [i for i in free if rows[i] not in decided]
        may_send = self._label_balance(classes or [0] * len(p)) if self.balances_labels else None
        held = {i for i in free if rows[i] in self.store} if may_send is not None and rows is not None else set()
        order = sorted((i for i in free if p[i] < 0.5), key=lambda i: (i not in held, p[i]))
        if may_send is not None or len(chosen) + len(order) < low:
            order += sorted((i for i in free if p[i] >= 0.5), key=lambda i: (i not in held, p[i]))
        for i in order:
            if len(chosen) >= (high if p[i] < 0.5 else low):
                break
            if may_send is None or i in held or may_send(i):
                chosen.append(i)
        return sorted(chosen)

    def _label_balance(self, classes: Sequence[int]) -> Callable[[int], bool]:
        """Asked for one position after another: whether to send it too keeps the buffer's labels near P(y)."""
        counts, total = self.store.class_counts(), len(self.store)
        shares = self._shares(classes)

        def may_send(i: int) -> bool:
            nonlocal total
            label, most = classes[i], min(total + 1, self.store.capacity)
            if counts.get(label, 0) >= (1.0 + LABEL_TOLERANCE) * shares[label] * most + 1.0:
                return False
            counts[label] = counts.get(label, 0) + 1
            total += 1
            return True

        return may_send

    def _shares(self, classes: Sequence[int]) -> dict[int, float]:
        """P(y) of the classes of a batch: each one's share of the stream, this batch included."""
        counts = Counter(classes)
        total = self._seen.total() + len(classes)
        return {label: (self._seen[label] + count) / total for label, count in counts.items()}

    @property
    def ready(self) -> bool:
        """Whether two instances are held."""
        return self.store.drawable >= LEAST

    def draw(self, batch_size: int, seed: int) -> Drawn | None:
        """Different instances at random, or None while fewer than two are held."""
        if not self.ready:
            return None
        count = min(self.batch_size or max(batch_size // 2, LEAST), len(self.store))
        slots = np.random.default_rng(seed).choice(len(self.store), size=count, replace=False, shuffle=False).tolist()
        return Drawn(*self.store.draw(slots), slots)

    def differentiate(self, validation: Samples, batch: Samples, drawn: Drawn) -> Learned | None:
        """Θ's gradients of :func:`~torch_molere.splitting.splitter_loss`, summed over the ranks, and what is easy.

        None for a splitter that has nothing to learn.
        """
        if not self._parameters:
            return None
        with torch.enable_grad():
            loss, p = splitter_loss(self.splitter, validation, batch, self.fraction)
        own = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        gradients = summed_gradients(own)
        finite = torch.stack([g.sum().isfinite() for g in gradients if g is not None] or [torch.tensor(False)]).all()
        *easy, usable = torch.cat([(p >= 0.5) & validation.correct, finite.to(p.device)[None]]).tolist()
        slots = [slot for slot, is_easy in zip(drawn.slots, easy, strict=True) if is_easy]
        return Learned(gradients if usable else None, slots, loss.detach())

    def check_together(self, sendings: Sequence[Sending]) -> None:
        """Refuse batches of one optimizer step that do not fit each other, while no batch has decided what fits.

        Raises:
            ValueError: for other shapes, dtypes, nesting or constants, as each batch alone is refused later on.
        """
        if len(sendings) > 1 and len(self.store) == 0:
            trial = InstanceStore(LEAST, self.max_bytes, self.padding)
            for sending in sendings:
                size = size_of(sending.arguments, sending.targets) if sending.rows is None else len(sending.rows)
                trial.insert(sending.arguments, sending.targets, size, [0])

    def commit(self, sendings: Sequence[Sending], drawn: Drawn | None, learned: Learned | None) -> None:
        """Take over what belongs to an optimizer step: Θ's update, releases, instances sent, counts."""
        if learned is not None and drawn is not None:
            self._splitter_loss = learned.loss
            if learned.gradients is not None and self._optimizer is not None:
                take_step(self.splitter, self._optimizer, learned.gradients)
            self.store.release(learned.easy, keep=len(drawn.slots))
        own: set[int] = set()
        leaving: set[int] = set()
        for number, sending in enumerate(sendings):
            known = sending.classes or sending.rows
            size = size_of(sending.arguments, sending.targets) if known is None else len(known)
            self._quota.spend(size, len(sending.sent))
            if sending.samples is not None and hasattr(self.splitter, "observe"):
                self.splitter.observe(sending.samples)  # type: ignore[operator]
            classes, shares = sending.classes, None
            if self.balances_labels:
                classes = classes or [0] * size
                shares = self._shares(classes)
                self._seen.update(classes)
            seed = ((self.seed * 1_000_003 + self._commits) * 1_000_003 + number) % 2**63
            batch = sending.arguments, sending.targets, size
            self.store.insert(*batch, sending.sent, sending.rows, classes, seed, shares, self._commits)
            leaving |= self.store.held_among(sending.trained_rows) | self.store.held_among(sending.sent_rows)
            if sending.rows is not None:
                own.update(sending.rows[i] for i in sending.sent)
        self.store.release_rows(leaving - own, keep=LEAST)
        self._commits += 1

    def metrics(self) -> dict[str, float]:
        """``instances`` that it holds, ``fill`` as a share of its capacity, ``age``, their mean number of steps since
        they were last sent, and ``splitter_loss`` of a splitter that learns."""
        age = self.store.mean_age(self._commits)
        found = {"instances": float(len(self)), "fill": len(self) / self.store.capacity, "age": age}
        return found if self._splitter_loss is None else {**found, "splitter_loss": float(self._splitter_loss)}

    def state_dict(self) -> dict[str, Any]:
        """Θ, its optimizer, what is held and all counts."""
        return {
            "splitter": self.splitter.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "store": self.store.state_dict(),
            "quota": [self._quota.low, self._quota.high],
            "seen": dict(self._seen),
            "commits": self._commits,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError, RuntimeError, KeyError: if it does not fit. Nothing has changed then.
        """
        low, high = (float(carry) for carry in state["quota"])
        if not (0.0 <= low < math.inf and -math.inf < high <= 1.0):
            raise ValueError(f"the buffer's quota must be a number ≥ 0 and one ≤ 1, got {low} and {high}")
        commits, seed = (check_count(f"the buffer's {name}", state[name], 0) for name in ("commits", "seed"))
        for label, count in state["seen"].items():
            check_count("how often a class was seen", count, 0)
            check_count("a class", label, -(2**63))
        store = self.store.loaded(state["store"])
        check_states(self.splitter, self._optimizer, state["splitter"], state["optimizer"])
        self.splitter.load_state_dict(state["splitter"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._store, self._seen, self._commits, self.seed = store, Counter(state["seen"]), commits, seed
        self._quota.low, self._quota.high = low, high
        self._warmup_splitter = RandomSplitter(self.fraction, seed)


class Quota:
    """Keeps the number sent to validation within [fraction/2, 3 fraction/2] of the stream, whatever the splitter says.

    Fractions of an instance are carried from batch to batch, so small batches are served too. One instance of a batch
    always stays on the training side.

    Attributes:
        low, high: how many instances may be asked for and allowed besides a batch's own share.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.low = 1.0  # the first batch sends one at least
        self.high = 1.0

    def bounds(self, size: int) -> tuple[int, int]:
        """The least and the most of a batch of ``size`` instances that may go to validation."""
        low = min(math.floor(0.5 * self.fraction * size + self.low), size - 1)
        high = min(math.floor(1.5 * self.fraction * size + self.high), size - 1)
        return max(low, 0), max(high, 0)

    def spend(self, size: int, sent: int) -> None:
        """Count a batch. What could not be sent yet is owed, up to one batch; what was too much is saved later."""
        self.low = min(max(0.5 * self.fraction * size + self.low - sent, 0.0), float(size))
        self.high = min(1.5 * self.fraction * size + self.high - sent, 1.0)

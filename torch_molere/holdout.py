"""The splitter-managed validation set of MOLERE: the hardest instances of the stream that training already reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_molere.buffer import Quota, ValidationBuffer
from torch_molere.distributed import sum_gradients
from torch_molere.evaluation import Arguments
from torch_molere.journal import Journal
from torch_molere.membership import HeldElsewhere
from torch_molere.overfitting import OverfittingTest
from torch_molere.samples import Samples
from torch_molere.splitting import RandomSplitter, splitter_loss
from torch_molere.states import finite_gradients, load_optimizer

logger = logging.getLogger("torch_molere")

LEAST = 2
"""The fewest instances worth a meta-update, kept whatever the splitter says: batch norm needs two."""

PROBED = 0.2
"""The share of δ that is chosen at random and never trained on, to see whether the classifier overfits."""

HoldsOut = bool | Literal["auto"]


@dataclass(frozen=True)
class Choice:
    """Which instances of a batch go to validation, with the classes and rows of all of them."""

    positions: list[int]  # of those that go into the buffer
    classes: list[int]  # of all; one for all where there are none
    rows: list[int] | None  # of all
    probed: list[int] = field(default_factory=list)  # of those never trained on, for whom the buffer may be too full

    @property
    def validation(self) -> list[int]:
        """Positions of all validation instances."""
        return sorted({*self.positions, *self.probed})


class HoldOut:
    """Sends instances of each batch to a bounded validation buffer, as the splitter says and the quota allows.

    A dataset row is validation exactly as long as a buffer holds it, its own or, where several processes train
    together, that of another; an instance without an index, for the encounter that put it there.

    Args:
        splitter: Θ.
        optimizer: of Θ, or None where it has nothing to learn.
        buffer: what holds the instances.
        val_fraction: δ, in (0, 1).
        seed: of the random split during warm-up.
        hold_out: whether validation instances are left out of training; ``"auto"`` for once the classifier overfits.
        journal: notes its changes, so that those of a failed step can be taken back.
    """

    def __init__(
        self,
        splitter: nn.Module,
        optimizer: Optimizer | None,
        buffer: ValidationBuffer,
        val_fraction: float,
        seed: int,
        hold_out: HoldsOut = True,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal or Journal()
        self.splitter = splitter
        self.optimizer = optimizer
        self.buffer = buffer
        self.warmup_splitter = RandomSplitter(val_fraction, seed)
        self.quota = Quota(val_fraction)
        self.elsewhere = HeldElsewhere()
        self.hold_out = hold_out
        # With the seed of the warm-up's split these rows are among its validation rows.
        self.probe = RandomSplitter(PROBED * val_fraction, seed)
        self.overfitting = OverfittingTest(self._journal)

    @property
    def holding_out(self) -> bool:
        """Whether validation instances are left out of training at present."""
        return self.overfitting.found if self.hold_out == "auto" else bool(self.hold_out)

    def left_out(self, choice: Choice) -> list[int]:
        """Positions of the instances not to be trained on."""
        return choice.validation if self.holding_out else choice.probed

    def probabilities(self, samples: Samples, warming_up: bool) -> list[Tensor]:
        """What :meth:`choose` goes by, still on the device: ``(B,)`` p and, where rows are looked at for overfitting,
        ``(B,)`` below 1/2 for those that are never to be trained on.

        Raises:
            ValueError: if the splitter does not return ``(B,)``, or the batch does not fit the buffer.
        """
        self.buffer.check((samples.arguments, samples.targets))
        size = samples.losses.shape[0]
        with torch.no_grad():
            p = (self.warmup_splitter if warming_up else self.splitter)(samples)
        if not isinstance(p, Tensor) or p.shape != (size,):
            found = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"splitter must return ({size},) probabilities, got {found}")
        return [p, self.probe(samples)] if self.hold_out == "auto" and samples.indices is not None else [p]

    def choose(self, samples: Samples, p: list[float], probe: Sequence[float] = ()) -> Choice:
        """Which instances go to validation, by :meth:`probabilities`; nothing changes yet.

        Those with p < 1/2, rows already held first, then the smallest p, within the quota and the label balance.

        Raises:
            ValueError: if the splitter's p are no probabilities.
        """
        if not all(0.0 <= value <= 1.0 for value in p):
            raise ValueError(f"splitter must return probabilities in [0, 1], got {min(p)} to {max(p)}")
        never_trained_on = {i for i, u in enumerate(probe) if u < 0.5}
        p = [0.0 if i in never_trained_on else value for i, value in enumerate(p)]
        rows, classes = samples.on_host.rows, samples.on_host.classes or [0] * len(p)
        low, high = self.quota.bounds(len(p))
        held = [False] * len(p)
        if rows is not None:
            self.elsewhere.meet(self.buffer.rows, samples.losses.device)
            held = [row in self.buffer or row in self.elsewhere for row in rows]
        shares = self.buffer.shares(classes)
        added: dict[int, int] = {}
        chosen: list[int] = []
        probed: list[int] = []
        refused = 0
        for i in sorted(range(len(p)), key=lambda i: (p[i] >= 0.5, not held[i], p[i])):
            if len(chosen) + refused >= (high if p[i] < 0.5 else low):
                break
            if i in never_trained_on:
                probed.append(i)
            label = classes[i]
            if not held[i]:
                if not self.buffer.accepts(label, shares[label], sum(added.values()), added.get(label, 0)):
                    refused += i in never_trained_on
                    continue
                added[label] = added.get(label, 0) + 1
            chosen.append(i)
        return Choice(sorted(chosen), classes, rows, probed)

    def put(self, samples: Samples, choice: Choice) -> None:
        """Hold the chosen instances; rows of this batch that are not among them go back to training."""
        chosen, classes, rows = choice.positions, choice.classes, choice.rows
        self.buffer.observe(classes)
        self._journal.note(self.quota.load_state_dict, self.quota.state_dict())
        self.quota.spend(len(classes), len(choice.validation))
        self.buffer.insert(
            (samples.arguments, samples.targets),
            chosen,
            [classes[i] for i in chosen],
            None if rows is None else [rows[i] for i in chosen],
        )
        if rows is not None:
            out = {rows[i] for i in chosen}
            trained = [row for row in rows if row not in out]
            self.buffer.release_rows(trained, keep=LEAST)
            came = [row for row in out if row in self.buffer]
            gone = self.elsewhere.tell(came, self.buffer.departed(), trained, samples.losses.device)
            self.buffer.release_rows(gone, keep=LEAST)
        self.buffer.departed()  # the others know, where there are any

    def observe(self, samples: Samples, choice: Choice, step: int, decide: bool) -> None:
        """See whether the classifier overfits; to ``decide`` it is for all processes at once."""
        if self.hold_out != "auto":
            return
        if choice.rows is not None and choice.probed:
            losses = samples.on_host.losses
            self.overfitting.observe(step, [choice.rows[i] for i in choice.probed], [losses[i] for i in choice.probed])
        if decide and self.overfitting.decide(samples.losses.device):
            logger.info("the classifier overfits: validation instances are left out of training from step %d on", step)

    def draw(self, count: int) -> tuple[tuple[Arguments, Any], list[int]] | None:
        """Up to ``count`` instances and their slots, or None while fewer than :data:`LEAST` are held."""
        return self.buffer.draw(max(count, LEAST)) if len(self.buffer) >= LEAST else None

    def learn(self, validation: Samples, batch: Samples, slots: list[int]) -> None:
        """One step of Θ, then release the validation instances that have become easy, but never the last batch."""
        with torch.set_grad_enabled(self.optimizer is not None):
            loss, p_validation = splitter_loss(self.splitter, validation, batch, self.quota.val_fraction)
        if self.optimizer is not None and bool(torch.isfinite(loss.detach())):
            self._journal.keep_network(self.splitter, self.optimizer)
            self.optimizer.zero_grad()
            loss.backward()
            sum_gradients(self.splitter)
            if finite_gradients(self.splitter):
                self.optimizer.step()
            self.optimizer.zero_grad()
        easy = ((p_validation >= 0.5) & validation.correct).tolist()
        self.buffer.release([slot for slot, is_easy in zip(slots, easy, strict=True) if is_easy], keep=len(slots))

    def state_dict(self) -> dict[str, Any]:
        """Θ, its optimizer, the buffer, the quota and what is known of overfitting."""
        return {
            "splitter": self.splitter.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "buffer": self.buffer.state_dict(),
            "quota": self.quota.state_dict(),
            "overfitting": self.overfitting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Put back what :meth:`state_dict` gave, with its tensors on ``device``."""
        self.splitter.load_state_dict(state["splitter"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.buffer.load_state_dict(state["buffer"], device)
        self.elsewhere = HeldElsewhere()
        self.quota.load_state_dict(state["quota"])
        self.overfitting.load_state_dict(state["overfitting"])

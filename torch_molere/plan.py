"""What is decided for a batch, and what a meta-update has found: all that is known before anything moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_molere.distributed.collectives import ranks
from torch_molere.hypergradients.check import Found
from torch_molere.hypergradients.functional import Call, Replay
from torch_molere.samples import Samples
from torch_molere.validation.source import Drawn, Sending


@dataclass(frozen=True)
class Together:
    """What the ranks told each other of one batch: N instances, in the order of the ranks.

    Attributes:
        samples: every ``(B,)`` column is ``(N,)``; arguments, targets and outputs are this rank's.
        predictions: ``(N,)`` classes, -1 where there are none; None where the outputs of ``samples`` say.
        rows: their dataset rows, or None where the loop does not say.
        sent: whether each of them is sent to validation.
        sizes: B of each rank.
        ready: whether every rank has enough to draw a validation batch.
    """

    samples: Samples
    predictions: Tensor | None
    rows: list[int] | None
    sent: list[bool]
    sizes: list[int]
    ready: bool


@dataclass
class Plan:
    """What ``loss()`` decided for one batch.

    Attributes:
        call: of the model.
        samples: the batch.
        together: what is known of the instances of all ranks.
        sending: what goes to validation, for the source.
        held_out: ``(B,)`` bool, not trained on.
        everyone: ``(N,)`` w̄ of all ranks, of which the own ones have a graph to φ.
        training: ``(N,)`` bool, the training side; None for all.
        own: this rank's part of them.
        count: n, the size of the training side of all ranks.
        loss: the weighted training loss, a detached copy.
        replay: for a meta-update; None where none is due.
        found: the engine for it.
        gradients: g, where the engine is to be checked along u too.
        places: where the parameters' values were during the forward.
        scale: d(what backward was called on) / d(this loss).
        update: the meta-update, made already in the "before" order.
        skipped: no engine agreed with backward, though one did before.
        number: the place of its loss among those of a reweighter.
        statistics: buffers of φ and Θ (of batch normalisation), and what their forwards made of them.
    """

    call: Call
    samples: Samples
    together: Together
    sending: Sending
    held_out: Tensor
    everyone: Tensor
    training: Tensor | None
    own: slice
    count: int
    loss: Tensor
    replay: Replay | None = None
    found: Found | None = None
    gradients: list[Tensor | None] | None = None
    places: list[tuple[int, int]] | None = None
    scale: Tensor | float = 1.0
    update: MetaUpdate | None = None
    number: int = 0
    skipped: bool = False
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @cached_property
    def sent(self) -> Tensor:
        """``(N,)`` bool, the instances of all ranks that are sent to validation."""
        return torch.tensor(self.together.sent).to(self.everyone.device, non_blocking=True)

    @property
    def weights(self) -> Tensor:
        """``(B,)`` w̄ of this rank's instances."""
        return self.everyone[self.own].detach()

    @property
    def share(self) -> float:
        """What a rank divides its sum by, so that the ranks' mean is the mean of the batch."""
        return self.count / ranks()


@dataclass(frozen=True)
class MetaUpdate:
    """A meta-update that is ready to be committed.

    Attributes:
        val_loss: the mean validation loss at θ⁺.
        plans: that it learns from.
        meta_gradients: ``(B,)`` ∂L_val/∂w̄_i of this rank's instances, for each plan.
        evidence: ``(N,)`` the same of all ranks' instances, in standard deviations of their batch, for each plan.
        weighting_gradients: of φ's parameters; None where they are not to be stepped.
        weighting_state: of φ and its optimizer, stepped already in the "before" order.
        drawn: the validation batch.
        learned: what the validation source learned.
        found: the engine that was used.
        held: the validation instances; None where the loss was not finite.
    """

    val_loss: Tensor
    plans: list[Plan]
    meta_gradients: list[Tensor]
    evidence: list[Tensor]
    weighting_gradients: list[Tensor | None] | None
    drawn: Drawn | None
    learned: Any
    found: Found
    weighting_state: tuple[dict[str, Any], dict[str, Any] | None] | None = None
    held: Samples | None = None

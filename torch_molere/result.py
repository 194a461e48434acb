"""What one step did, and what is counted over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Where gradients were accumulated, the instances of all its losses, in their order.

    Attributes:
        loss: scalar, the weighted training loss (of several losses their mean), detached.
        outputs: the model's outputs, detached (the ``.logits`` of an output object); a list where several losses'
            outputs cannot be joined.
        weights: ``(B,)`` with mean one over the training side and 0 for instances held out of it.
        held_out: ``(B,)`` bool, the instances that were not trained on.
        val_mask: ``(B,)`` bool, the instances sent to validation.
        val_loss: scalar, the mean validation loss (``val_loss_fn``) after the step, or None without a meta-update.
        meta_gradient: ``(B,)`` ∂ val_loss / ∂ weights, or None without a meta-update.
    """

    loss: Tensor
    outputs: Any
    weights: Tensor
    held_out: Tensor
    val_mask: Tensor
    val_loss: Tensor | None = None
    meta_gradient: Tensor | None = None


class Latest(NamedTuple):
    """Of the latest meta-update: the validation loss, ``(B,)`` ∂L_val/∂w̄, and of the validation instances which are
    right and their classes, if they have any."""

    val_loss: Tensor
    gradient: Tensor
    correct: Tensor | None
    classes: Tensor | None


@dataclass
class Tally:
    """What is said when a reweighter ends, and what its metrics show."""

    steps: int = 0
    seconds: float = 0.0
    latest: Latest | None = None

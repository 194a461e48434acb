"""What one step did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_molere.meta_update import MetaUpdate
from torch_molere.plan import Plan


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


def result_of(plans: Sequence[Plan], update: MetaUpdate | None) -> StepResult:
    """The result of the losses of an optimizer step; without an update also that of a loss before its step."""
    losses = torch.stack([plan.loss for plan in plans])
    outputs = [plan.samples.outputs for plan in plans]
    alike = len(outputs) > 1 and all(
        isinstance(each, Tensor) and each.shape[1:] == outputs[0].shape[1:] for each in outputs
    )
    return StepResult(
        losses.mean() if len(plans) > 1 else plans[0].loss,
        outputs[0] if len(outputs) == 1 else torch.cat(outputs) if alike else outputs,
        torch.cat([plan.weights for plan in plans]),
        torch.cat([plan.held_out for plan in plans]),
        torch.cat([plan.sent[plan.own] for plan in plans]),
        None if update is None else update.val_loss,
        None if update is None else torch.cat(update.meta_gradients),
    )

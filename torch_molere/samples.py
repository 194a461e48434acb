"""What is known of the instances of a batch: the one argument of every weighting and splitter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_molere.calls import Arguments, inputs_of


@dataclass(frozen=True)
class Samples:
    """The B instances of a batch as the classifier sees them just now; every tensor is detached.

    Attributes:
        arguments: what the model was called with, positional and by name. Most code reads :attr:`inputs`.
        targets: the batch's targets, as the loop gave them.
        outputs: the model's outputs (the ``.logits`` of an output object).
        losses: ``(B,)`` per-sample losses.
        correct: ``(B,)`` bool, whether the classifier is right.
        classes: ``(B,)`` long, the class of each instance (of a soft target, its most probable class; -1 where it is
            ignored), or None where targets are not classes.
        margins: ``(B,)`` probabilistic margins in [-1, 1] (1 where the target is ignored), or None without classes.
        running_losses: ``(B,)`` the running mean of each row's loss, this encounter included; without ``indices`` the
            present losses.
        running_margins: ``(B,)`` the same of the margins, or None without classes.
        meta_gradients: ``(B,)`` the running mean of each row's own meta-gradient, in standard deviations of its batch;
            0 where there is none yet, and without ``indices``.
        has_meta_gradient: ``(B,)`` bool, whether there is one.
        indices: ``(B,)`` long, each instance's row in its dataset, or None where the loop does not say.
    """

    arguments: Arguments
    targets: Any
    outputs: Any
    losses: Tensor
    correct: Tensor
    classes: Tensor | None
    margins: Tensor | None
    running_losses: Tensor
    running_margins: Tensor | None
    meta_gradients: Tensor
    has_meta_gradient: Tensor
    indices: Tensor | None = None

    @property
    def inputs(self) -> Any:
        """The model's inputs in the form they came in: a tensor, a tuple or a dict."""
        return inputs_of(self.arguments)

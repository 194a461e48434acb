"""What is known of the instances of a batch: the one argument of every weighting and splitter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_molere.evaluation import Arguments, inputs_of
from torch_molere.margins import check_classes, margins_of

CorrectFn = Callable[[Any, Any], Tensor]
"""``correct_fn(outputs, targets) -> (B,)`` bool: whether the classifier is right on each instance."""


@dataclass(frozen=True)
class OnHost:
    """What decides in Python of the B instances of a batch."""

    losses: list[float]
    classes: list[int] | None
    rows: list[int] | None


@dataclass(frozen=True)
class Samples:
    """The B instances of a batch as the classifier sees them just now; every tensor is detached.

    Attributes:
        arguments: what the model was called with, positional and by name. Most code reads :attr:`inputs`.
        targets: the batch's targets, first dimension B.
        outputs: the model's outputs (the ``.logits`` of an output object).
        losses: ``(B,)`` per-sample losses.
        correct: ``(B,)`` bool, whether the classifier is right.
        indices: ``(B,)`` long, each instance's row in its dataset, or None where the loop does not say.
    """

    arguments: Arguments
    targets: Any
    outputs: Any
    losses: Tensor
    correct: Tensor
    indices: Tensor | None = None

    @property
    def inputs(self) -> Any:
        """The model's inputs in the form they came in: a tensor, a tuple or a dict."""
        return inputs_of(self.arguments)

    @property
    def classes(self) -> Tensor | None:
        """``(B,)`` class indices, or None where the targets are no class indices."""
        return self.targets if is_classification(self.outputs, self.targets) else None

    @cached_property
    def on_host(self) -> OnHost:
        """Losses, classes and rows, read from the device at once: each reading waits for all that is queued there."""
        return self._read()[0]

    def read(self, *columns: Tensor) -> list[list[float]]:
        """More ``(B,)`` columns, in the reading of :attr:`on_host` where that is still to come."""
        if "on_host" in vars(self):
            return _lists(columns)
        vars(self)["on_host"], lists = self._read(*columns)  # where the cached property keeps it
        return lists

    def _read(self, *columns: Tensor) -> tuple[OnHost, list[list[float]]]:
        known = [column for column in (self.losses, self.classes, self.indices) if column is not None]
        losses, *numbers = _lists([column.to(self.losses.device) for column in (*known, *columns)])
        integers = ([int(number) for number in column] for column in numbers)
        classes = None if self.classes is None else next(integers)
        rows = None if self.indices is None else next(integers)
        return OnHost(losses, classes, rows), numbers[len(known) - 1 :]

    @cached_property
    def margins(self) -> Tensor:
        """``(B,)`` probabilistic margins.

        Raises:
            ValueError: if this is no classification with class indices, or one of them is out of range.
        """
        classes = self.on_host.classes
        if classes is None:
            raise ValueError("margins need floating (B, C) logits and (B,) integer class-index targets")
        check_classes(min(classes), max(classes), self.outputs.shape[1])
        return margins_of(self.outputs, self.targets)


def _lists(columns: Sequence[Tensor]) -> list[list[float]]:
    return torch.stack([column.detach().double() for column in columns]).tolist() if columns else []


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether ``outputs`` are ``(B, C)`` logits and ``targets`` ``(B,)`` class indices."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim == 2
        and outputs.shape[1] > 1
        and targets.shape == outputs.shape[:1]
        and not targets.is_floating_point()
        and targets.dtype != torch.bool
    )


def default_correct(outputs: Any, targets: Any, losses: Tensor) -> Tensor:
    """Whether the classifier is right, where the user does not say otherwise.

    - class indices: the largest logit is the target's;
    - multi-label (logits and 0/1 targets of one shape): every label is right at logit 0;
    - anything else (regression): the loss is at most the batch's median.
    """
    if is_classification(outputs, targets):
        return outputs.argmax(dim=1) == targets
    paired = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.shape == targets.shape
    if paired and bool(((targets == 0) | (targets == 1)).all()):
        return ((outputs > 0) == (targets > 0.5)).reshape(len(losses), -1).all(dim=1)
    return losses <= losses.median()

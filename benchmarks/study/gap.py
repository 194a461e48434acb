"""Training and validation loss epoch by epoch, and where early stopping would have stopped."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from benchmarks.study.measures import logits
from benchmarks.study.problems import Problem

STABLE = 0.1
"""A gap is stable once an epoch changes it by less than this share of it."""


class Curve:
    """Follows one run: the gap between the loss on the rows to train on and on others with labels of the same kind.

    Args:
        problem: with validation rows.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.validation is not None
        self.training = problem.inputs, problem.labels
        self.validation = problem.validation
        self.test = problem.evaluations["clean"]
        self.gaps: list[float] = []
        self.validation_losses: list[float] = []
        self.accuracies: list[float] = []

    def observe(self, model: nn.Module) -> None:
        """After an epoch."""
        training, validation = (
            F.cross_entropy(logits(model, inputs), labels).item() for inputs, labels in (self.training, self.validation)
        )
        inputs, targets = self.test
        self.gaps.append(validation - training)
        self.validation_losses.append(validation)
        self.accuracies.append((logits(model, inputs).argmax(dim=1) == targets).double().mean().item())

    def numbers(self) -> dict[str, float]:
        """The gap and the accuracy after every epoch, and the accuracies at which two rules would have stopped."""
        stable, least = first_stable(self.gaps), self.validation_losses.index(min(self.validation_losses))
        numbers = {
            "gap": self.gaps[-1],
            "epoch_stable": stable + 1.0,
            "accuracy_stable": self.accuracies[stable],
            "epoch_least": least + 1.0,
            "accuracy_least": self.accuracies[least],
        }
        for epoch, (gap, accuracy) in enumerate(zip(self.gaps, self.accuracies, strict=True), start=1):
            numbers |= {f"gap_{epoch}": gap, f"accuracy_{epoch}": accuracy}
        return numbers


def first_stable(gaps: Sequence[float], share: float = STABLE) -> int:
    """Index of the first gap that differs from the one before by less than a share of it; the last if none does."""
    for index in range(1, len(gaps)):
        if abs(gaps[index] - gaps[index - 1]) < share * abs(gaps[index]):
            return index
    return len(gaps) - 1

"""Weightings: the meta-network φ that gives each training instance its weight w ≥ 0.

A weighting is any ``nn.Module`` whose ``forward(samples: Samples)`` returns ``(B,)`` finite, non-negative weights; the
reweighter normalises them to mean one over the training side. To write your own, that is all it takes.
Those here start with equal weights, so that training starts as plain training. Theirs lie between a ``floor`` and one,
so that no instance weighs more than ``1 / floor`` times another: where φ learns fast, without one, it soon trains on a
few instances of each batch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_molere.evaluation import logits_of
from torch_molere.samples import Samples
from torch_molere.signals import Signals, signal_network, start_at

FLOOR = 0.3
"""Of the networks: the least weight, chosen on held-out training rows (the study ``select-range``)."""


class SignalWeighting(nn.Module):
    """Weights from detached per-sample signals, through one hidden layer and a sigmoid (Meta-Weight-Net's form).

    Args:
        signals: some of ``"loss"``, ``"margin"``, ``"probabilities"``, ``"label"``.
        hidden: width of the hidden layer.
        num_classes: needed for ``"probabilities"`` and ``"label"``.
        floor: the least weight, in [0, 1); 0 in the paper.

    Raises:
        ValueError: if an argument is out of its range or missing.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("loss",),
        *,
        hidden: int = 100,
        num_classes: int | None = None,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        self.floor = _checked(floor)
        self.network = signal_network(Signals(signals, num_classes), hidden)

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (floor, 1)."""
        return _between(self.floor, self.network(samples).squeeze(1))


class InputWeighting(nn.Module):
    """Weights from the inputs alone, as in the paper: φ sees x and not the label.

    Args:
        network: maps the classifier's inputs to ``(B,)`` or ``(B, 1)``; a sigmoid makes them weights.
        floor: the least weight, in [0, 1); 0 in the paper.

    Raises:
        ValueError: for a floor outside its range.
    """

    def __init__(self, network: nn.Module, *, floor: float = FLOOR) -> None:
        super().__init__()
        self.floor = _checked(floor)
        self.network = network

    @classmethod
    def from_classifier(cls, model: nn.Module, num_outputs: int, *, floor: float = FLOOR) -> InputWeighting:
        """A copy of the classifier as it is now, with a new linear layer on its outputs.

        Args:
            model: the classifier; what it is given and what it holds stay as they are.
            num_outputs: the width of its ``(B, num_outputs)`` outputs.
            floor: the least weight, in [0, 1); 0 in the paper.

        Raises:
            ValueError: for a floor outside its range.
        """
        return cls(_Scored(copy.deepcopy(model), num_outputs), floor=floor)

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (floor, 1).

        Raises:
            ValueError: if the network's output has another shape.
        """
        positional, named = samples.arguments
        scores = self.network(*positional, **named)
        size = samples.losses.shape[0]
        if scores.shape not in ((size,), (size, 1)):
            raise ValueError(f"network must return ({size},) or ({size}, 1), got {tuple(scores.shape)}")
        return _between(self.floor, scores.reshape(size))


class _Scored(nn.Module):
    """A classifier with one score on top of its outputs."""

    def __init__(self, classifier: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.classifier = classifier
        some = next(classifier.parameters())
        self.score = nn.Linear(num_outputs, 1, device=some.device, dtype=some.dtype)
        start_at(self.score, 0.0)

    def forward(self, *positional: object, **named: object) -> Tensor:
        return self.score(logits_of(self.classifier(*positional, **named)))


class FreeWeighting(nn.Module):
    """One free weight for each row of the dataset and no network, after Learning to Reweight (Ren et al., ICML 2018).

    Batches must carry ``indices``. Only the rows of a batch get a gradient (a sparse one).

    Args:
        num_samples: the number of rows N.
        floor: the least weight, in [0, 1).

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, num_samples: int, *, floor: float = 0.0) -> None:
        super().__init__()
        self.floor = _checked(floor)
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.scores = nn.Embedding(num_samples, 1, sparse=True)
        nn.init.zeros_(self.scores.weight)

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (floor, 1).

        Raises:
            ValueError: if the batch has no indices, or one is out of range.
        """
        rows = samples.on_host.rows
        if samples.indices is None or rows is None:
            raise ValueError("FreeWeighting needs the rows' indices: step((inputs, targets, indices))")
        if rows and max(rows) >= self.scores.num_embeddings:
            raise ValueError(
                f"indices must lie in [0, {self.scores.num_embeddings}), got {max(rows)}; "
                "make FreeWeighting(num_samples) as large as the dataset"
            )
        return _between(self.floor, self.scores(samples.indices).squeeze(1))


def _checked(floor: float) -> float:
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"floor must lie in [0, 1), got {floor!r}")
    return floor


def _between(floor: float, scores: Tensor) -> Tensor:
    """Scores as weights from the floor to one."""
    return floor + (1.0 - floor) * torch.sigmoid(scores)


def normalised(weights: Tensor, training: Tensor | None) -> Tensor:
    """``w̄ = n · w / Σw`` over the n training-side instances, 0 elsewhere: mean one, differentiable.

    Scaled by the largest weight first, so that equal weights become exactly 1 and nothing over- or underflows.
    Where every weight is zero there is nothing to tell instances apart by: all become 1.

    Args:
        weights: ``(B,)`` non-negative.
        training: ``(B,)`` bool, the training side; None for all.
    """
    mask = torch.ones_like(weights) if training is None else training.to(weights.dtype)
    masked = weights * mask
    largest = masked.detach().max()
    relative = masked / torch.where(largest > 0, largest, 1.0)
    total = torch.where(largest > 0, relative.sum(), 1.0)
    return torch.where(largest > 0, relative * (mask.sum() / total), mask)

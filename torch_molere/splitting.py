"""Splitters: Θ decides which instances are validation, looking for the hardest ones; and the losses it learns by.

A splitter is any ``nn.Module`` whose ``forward(samples: Samples)`` returns ``(B,)`` probabilities
``p_i = P(training side | x_i, y_i)``: an instance goes to validation where p < 1/2, the smallest p first. If it has
parameters, the reweighter trains them by ``gap_loss + ratio_penalty + label_penalty``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_molere.distributed import gathered
from torch_molere.margins import check_classes
from torch_molere.samples import Samples
from torch_molere.signals import Signals, signal_network


def gap_loss(p_train: Tensor, correct: Tensor) -> Tensor:
    """Mean of BCE(p_i, 1[the classifier is right on i]) over validation instances (Learning to Split, section 3).

    What the classifier gets right may go back to training; what it gets wrong stays.

    Args:
        p_train: ``(B,)`` in [0, 1].
        correct: ``(B,)`` bool.

    Returns:
        A scalar ≥ 0.

    Raises:
        ValueError: for other shapes or an empty batch.
    """
    _check_probabilities(p_train)
    if correct.shape != p_train.shape:
        raise ValueError(f"correct must be {tuple(p_train.shape)} like p_train, got {tuple(correct.shape)}")
    return F.binary_cross_entropy(p_train, correct.to(p_train.dtype))


def ratio_penalty(p_train: Tensor, delta: float) -> Tensor:
    """``Ω_ratio = KL( Bernoulli(δ) ‖ Bernoulli(mean(1 − p)) )`` over a batch of all data.

    Args:
        p_train: ``(B,)`` in [0, 1].
        delta: the wanted validation fraction, in (0, 1).

    Returns:
        A scalar ≥ 0, zero where the mean of 1 − p is δ.

    Raises:
        ValueError: for other shapes, an empty batch or δ outside (0, 1).
    """
    _check_probabilities(p_train)
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    wanted = p_train.new_tensor([delta, 1.0 - delta])
    found = torch.stack([(1.0 - p_train).mean(), p_train.mean()])
    return _kl(wanted, found)


def label_penalty(p_train: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """``Ω_label = KL( P(y) ‖ P(y | training side) ) + KL( P(y) ‖ P(y | validation side) )``, by soft counts.

    An instance counts p for the training side and 1 − p for the validation side, over a batch of all data.

    Args:
        p_train: ``(B,)`` in [0, 1].
        targets: ``(B,)`` integer class indices in ``[0, num_classes)``.
        num_classes: C.

    Returns:
        A scalar ≥ 0, zero where both sides have the batch's own label distribution.

    Raises:
        ValueError: for other shapes, an empty batch or targets out of range.
    """
    _check_probabilities(p_train)
    if targets.shape != p_train.shape or targets.is_floating_point():
        raise ValueError(
            f"targets must be {tuple(p_train.shape)} integer class indices, got {tuple(targets.shape)} {targets.dtype}"
        )
    lowest, highest = torch.stack(targets.aminmax()).tolist()
    check_classes(lowest, highest, num_classes)

    def share(soft: Tensor) -> Tensor:
        counts = soft.new_zeros(num_classes).index_add(0, targets.long(), soft)
        return counts / counts.sum().clamp_min(torch.finfo(soft.dtype).tiny)

    overall = share(torch.ones_like(p_train))
    return _kl(overall, share(p_train)) + _kl(overall, share(1.0 - p_train))


def _check_probabilities(p_train: Tensor) -> None:
    if p_train.ndim != 1 or p_train.shape[0] == 0 or not p_train.is_floating_point():
        raise ValueError(
            f"p_train must be a floating (B,) tensor with B ≥ 1, got {tuple(p_train.shape)} {p_train.dtype}"
        )


def _kl(wanted: Tensor, found: Tensor) -> Tensor:
    """Σ wanted · log(wanted / found), finite where ``found`` vanishes."""
    floor = torch.finfo(found.dtype).eps
    return (torch.xlogy(wanted, wanted) - wanted * found.clamp_min(floor).log()).sum()


class LearnedSplitter(nn.Module):
    """Θ(x, y) as in the paper: a network that learns where the classifier fails.

    Args:
        signals: what it sees, some of ``"loss"``, ``"margin"``, ``"probabilities"``, ``"label"``.
        hidden: width of its hidden layer.
        num_classes: needed for ``"probabilities"`` and ``"label"``.
        network: sees the inputs instead: maps the classifier's inputs to ``(B, C)``, of which the entry of the
            instance's class is its score (or ``(B,)`` / ``(B, 1)``, label-blind). ``signals`` is ignored then.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("loss",),
        *,
        hidden: int = 100,
        num_classes: int | None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.sees_inputs = network is not None
        # It starts from "training side" at 0.9 for everyone, the complement of the usual δ.
        self.network = network or signal_network(Signals(signals, num_classes), hidden, bias=math.log(9.0))

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` probabilities of the training side."""
        if not self.sees_inputs:
            return torch.sigmoid(self.network(samples).squeeze(1))
        positional, named = samples.arguments
        scores = self.network(*positional, **named)
        size = samples.losses.shape[0]
        if scores.ndim == 2 and scores.shape[1] > 1:
            if samples.classes is None:
                raise ValueError("a splitter network with several outputs needs class-index targets")
            scores = scores.gather(1, samples.classes.long().unsqueeze(1))
        if scores.numel() != size:
            raise ValueError(f"network must return ({size},), ({size}, 1) or ({size}, C), got {tuple(scores.shape)}")
        return torch.sigmoid(scores.reshape(size))


class RandomSplitter(nn.Module):
    """A random split at rate δ: by row where the batch has indices (it lasts), else anew at each encounter.

    Args:
        val_fraction: δ, in (0, 1).
        seed: of the split by row: two splitters with one seed make the same split. Encounters are drawn from PyTorch's
            random stream, for which the reweighter stands in its own.
    """

    def __init__(self, val_fraction: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie in (0, 1), got {val_fraction}")
        self.val_fraction = val_fraction
        self.seed = seed

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)``: u / 2δ clamped to 1, for uniform u: below 1/2 for a fraction δ of the instances."""
        if samples.indices is None:
            uniform = torch.rand(samples.losses.shape[0], dtype=torch.double, device=samples.losses.device)
        else:
            uniform = _hashed_uniform(samples.indices, self.seed)
        return (uniform / (2.0 * self.val_fraction)).clamp_max(1.0)


def _hashed_uniform(indices: Tensor, seed: int) -> Tensor:
    """A uniform number in [0, 1) for each row that depends on nothing but (row, seed): SplitMix64's finaliser."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed integer

    x = (indices.long() + 1) * -7046029254386353131 + seed
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return shifted(x ^ shifted(x, 31), 11).double() / 2**53


class MarginSplitter(nn.Module):
    """By the classifier's own margin at this moment: p = (1 + margin) / 2, below 1/2 where it is wrong.

    Args:
        side: ``"hard"`` sends small margins to validation, ``"easy"`` large ones.
    """

    def __init__(self, side: Literal["hard", "easy"] = "hard") -> None:
        super().__init__()
        if side not in ("hard", "easy"):
            raise ValueError(f"side must be 'hard' or 'easy', got {side!r}")
        self.side = side

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` in [0, 1]."""
        margins = samples.margins if self.side == "hard" else -samples.margins
        return (1.0 + margins) / 2.0


def splitter_loss(
    splitter: nn.Module, validation: Samples, batch: Samples, val_fraction: float
) -> tuple[Tensor, Tensor]:
    """``gap_loss`` on the validation instances plus both penalties on a batch of all data, and the former's p.

    Where several processes train together, the instances are those of all of them.
    """
    p_validation: Tensor = splitter(validation)
    p_batch, _ = gathered(splitter(batch))
    loss = gap_loss(gathered(p_validation)[0], gathered(validation.correct)[0]) + ratio_penalty(p_batch, val_fraction)
    if batch.classes is not None:
        loss = loss + label_penalty(p_batch, gathered(batch.classes)[0], batch.outputs.shape[1])
    return loss, p_validation.detach()

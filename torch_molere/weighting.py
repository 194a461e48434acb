"""Weightings: the meta-network φ that gives each training instance its weight w ≥ 0.

A weighting is any ``nn.Module`` whose ``forward(samples: Samples)`` returns ``(B,)`` finite, non-negative weights; the
reweighter normalises them to mean one over the training side. To write your own, that is all it takes. One that has a
number ``meta_decay`` in [0, 1) says with which decay its rows' meta-gradients are averaged (0.8 otherwise).
Those with a network start with equal weights, so that training starts as plain training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_molere.calls import logits_of
from torch_molere.samples import Samples
from torch_molere.signals import Signals, signal_network, start_at

GROUP_SCALE = 10.0
"""Of the scores of :class:`GroupWeighting`."""


class SignalWeighting(nn.Module):
    """Weights from detached signals of each instance, through one hidden layer and a sigmoid (Meta-Weight-Net's form;
    Shu et al., NeurIPS 2019).

    Args:
        signals: some of :data:`~torch_molere.signals.SIGNALS`; None for loss, running loss, margin, running margin
            (both 0 where the targets are no classes) and meta-gradient.
        hidden: width of the hidden layer.
        num_classes: needed for ``"probabilities"`` and ``"label"``.

    Raises:
        ValueError: if an argument is out of its range or missing.
    """

    def __init__(
        self, signals: Sequence[str] | None = None, *, hidden: int = 100, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.network = signal_network(Signals(signals, num_classes), hidden)

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (0, 1)."""
        return torch.sigmoid(self.network(samples).squeeze(1))


class InputWeighting(nn.Module):
    """Weights from the inputs alone, as in the paper: φ sees x and not the label.

    Args:
        network: maps the classifier's inputs to ``(B,)`` or ``(B, 1)``; a sigmoid makes them weights.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_classifier(cls, model: nn.Module, num_outputs: int) -> InputWeighting:
        """A copy of the classifier as it is now, with a new linear layer on its outputs that starts at zero.

        Args:
            model: the classifier; what it is given and what it holds stay as they are.
            num_outputs: the width of its ``(B, num_outputs)`` outputs.
        """
        return cls(_Scored(copy.deepcopy(model), num_outputs))

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (0, 1).

        Raises:
            ValueError: if the network's output has another shape.
        """
        positional, named = samples.arguments
        scores = self.network(*positional, **named)
        size = samples.losses.shape[0]
        if scores.shape not in ((size,), (size, 1)):
            raise ValueError(f"network must return ({size},) or ({size}, 1), got {tuple(scores.shape)}")
        return torch.sigmoid(scores.reshape(size))


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
    """One free weight for each row of the dataset and no network.

    Batches must carry ``indices``. Only the rows of a batch get a gradient (a sparse one). This is not Learning to
    Reweight, whose weights are made anew at each step: that is :class:`OnlineWeighting` with ``offset=0, decay=0``.

    Args:
        num_samples: the number of rows N.

    Raises:
        ValueError: for a number of rows that is not positive.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.scores = nn.Embedding(num_samples, 1, sparse=True)
        nn.init.zeros_(self.scores.weight)

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (0, 1). On an accelerator, which is not waited for, a row out of range gets NaN.

        Raises:
            ValueError: if the batch has no indices, or (on the CPU) one is out of range.
        """
        if samples.indices is None:
            raise ValueError("FreeWeighting needs the rows' indices: step((inputs, targets, indices))")
        count = self.scores.num_embeddings
        rows = samples.indices.to(self.scores.weight.device)
        inside = rows.clamp(0, count - 1)
        if rows.device.type == "cpu" and not torch.equal(rows, inside):
            raise ValueError(
                f"indices must lie in [0, {count}), got {int(rows[rows != inside][0])}; make "
                "FreeWeighting(num_samples) as large as the dataset"
            )
        weights = torch.sigmoid(self.scores(inside).squeeze(1))
        return weights if rows.device.type == "cpu" else torch.where(rows == inside, weights, torch.nan)


class GroupWeighting(nn.Module):
    """One learned weight for each group of rows: the sources of a mixture of data, for instance.

    All start at 1/2. A weight is ``sigmoid(10 · score)``, so that it moves about as fast as a network's output does.
    Batches must carry ``indices``.

    Args:
        group_of_row: ``(N,)`` integers ≥ 0, the group of each row of the dataset.

    Raises:
        TypeError: if these are no integers.
        ValueError: if they are not ``(N,)``, or one is negative.
    """

    group_of_row: Tensor

    def __init__(self, group_of_row: Tensor | Sequence[int]) -> None:
        super().__init__()
        groups = torch.as_tensor(group_of_row)
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"group_of_row must be integers, got {groups.dtype}; number the groups from 0")
        if groups.ndim != 1 or len(groups) == 0 or int(groups.min()) < 0:
            raise ValueError(f"group_of_row must be (N,) numbers ≥ 0, one for each row, got {groups!r:.60}")
        self.register_buffer("group_of_row", groups.long(), persistent=False)
        self.scores = nn.Parameter(torch.zeros(int(groups.max()) + 1))

    @property
    def weights(self) -> Tensor:
        """``(G,)`` the groups' weights, their mean over the rows of the dataset one."""
        with torch.no_grad():
            weights = torch.sigmoid(GROUP_SCALE * self.scores)
            return weights / weights[self.group_of_row].mean()

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (0, 1). On an accelerator, which is not waited for, a row out of range gets NaN.

        Raises:
            ValueError: if the batch has no indices, or (on the CPU) one is out of range.
        """
        if samples.indices is None:
            raise ValueError("GroupWeighting needs the rows' indices: step((inputs, targets, indices))")
        count = len(self.group_of_row)
        rows = samples.indices.to(self.scores.device)
        inside = rows.clamp(0, count - 1)
        if rows.device.type == "cpu" and not torch.equal(rows, inside):
            raise ValueError(
                f"indices must lie in [0, {count}), got {int(rows[rows != inside][0])}; group_of_row must have a group "
                "for each row of the dataset"
            )
        weights = torch.sigmoid(GROUP_SCALE * self.scores[self.group_of_row[inside]])
        return weights if rows.device.type == "cpu" else torch.where(rows == inside, weights, torch.nan)


class OnlineWeighting(nn.Module):
    """Weights straight from the evidence: ``w_i = max(0, offset − m_i)``, with neither a network nor a rate.

    m_i is the running mean of the row's own meta-gradient, in standard deviations of its batch: positive where more
    weight on the row makes the validation loss larger. A row without evidence has m_i = 0 and so the weight ``offset``.
    This is where φ settles under a shrinkage of ``offset``. With ``offset=0, decay=0``, in the order "before" and at
    every step, it is Learning to Reweight (Ren et al., ICML 2018), w ∝ max(0, −∂L_val/∂w): its virtual step starts from
    weights of zero, and a batch with nothing to gain makes no step.

    It has nothing to learn. Its memory is by ``indices``; without them, or at a decay of 0, it knows the meta-gradients
    of the present batch alone, which there are only in the order "before".

    Args:
        offset: how strong the evidence against a row must be before its weight is 0, in standard deviations; ≥ 0.
        decay: of the running mean, in [0, 1); 0 keeps no memory.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, offset: float = 0.3, decay: float = 0.8) -> None:
        super().__init__()
        if not 0.0 <= offset < float("inf"):
            raise ValueError(f"offset must be finite and not negative, got {offset!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay!r}")
        self.offset = offset
        self.meta_decay = decay

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights ≥ 0."""
        return (self.offset - samples.meta_gradients).clamp_min(0.0)

    def extra_repr(self) -> str:
        return f"offset={self.offset}, decay={self.meta_decay}"


class RandomWeighting(nn.Module):
    """The control: weights ``sigmoid(spread · z)`` with z standard normal, drawn anew for each instance of each batch.

    The distribution is symmetric about 1/2. Once normalised to mean one, its standard deviation is 0.42 at a spread of
    1, 0.63 at 2 and 0.74 at 3, about as much as a learned weighting's without shrinkage. It has nothing to learn. The
    draws come from PyTorch's global random stream, for which the reweighter stands in its own.

    Args:
        spread: ≥ 0.

    Raises:
        ValueError: for a negative or infinite spread.
    """

    def __init__(self, spread: float = 2.0) -> None:
        super().__init__()
        if not 0.0 <= spread < float("inf"):
            raise ValueError(f"spread must be finite and not negative, got {spread!r}")
        self.spread = spread

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` weights in (0, 1)."""
        return torch.randn_like(samples.losses).mul_(self.spread).sigmoid_()

    def extra_repr(self) -> str:
        return f"spread={self.spread}"


def normalised(weights: Tensor, training: Tensor | None = None, max_weight: float | None = None) -> Tensor:
    """Weights with mean one over the training side and no one above the bound: ``w̄_i = min(c, s · w_i)``.

    s is the one scale at which their mean is one (for w̄ ≤ c it is where clipping and renormalising, repeated, ends).
    It is found by sorting: with the weights in ascending order and the k largest clipped,
    ``s_k = (n − k c) / Σ of the others``, and the right k is the least with ``s_k · (largest of the others) ≤ c``.
    Differentiable; the derivative of s is kept. Equal weights become exactly 1, whatever their size. If all are zero
    all stay zero. If fewer than n/c are positive no scale gives a mean of one: the bound is kept, each positive one
    gets c, and the mean is less than one.

    An accelerator is not waited for.

    Args:
        weights: ``(N,)`` finite, non-negative.
        training: ``(N,)`` bool, the n instances of the training side; None for all. The others get 0.
        max_weight: the bound c ≥ 1; None for none.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: for a bound below 1, with which a mean of one cannot be.
    """
    if max_weight is not None and not max_weight >= 1.0:
        raise ValueError(f"max_weight must be at least 1 (the mean weight) or None, got {max_weight!r}")
    if training is None:
        count: Tensor | int = weights.shape[0]
    else:
        mask = training.to(weights.dtype)
        weights, count = weights * mask, mask.sum()
    if weights.shape[0] == 0:
        return weights
    smallest = torch.finfo(weights.dtype).tiny
    # By the largest first, so that equal weights become exactly 1 and nothing over- or underflows.
    weights = weights / weights.detach().amax().clamp_min(smallest)
    # Each is divided by their mean (n · (1/Σ) would be rounded twice); Σ is at least 1 unless all are zero.
    mean = weights.sum().clamp_min(0.5) / count
    if max_weight is None or (mean.device.type == "cpu" and mean.item() * max_weight >= 1.0):
        return weights / mean
    return _bounded(weights, count, max_weight)


def _bounded(weights: Tensor, count: Tensor | int, bound: float) -> Tensor:
    """:func:`normalised` of weights in [0, 1], the largest 1, that are 0 off the training side."""
    with torch.no_grad():
        ascending = weights.sort().values
        above = torch.arange(weights.shape[0] - 1, -1, -1, device=weights.device, dtype=weights.dtype)
        fits = (count - bound * above) * ascending <= bound * ascending.cumsum(0)
        largest = torch.where(fits, ascending, 0.0).amax()
        clipped = weights > largest
    free = weights.masked_fill(clipped, 0.0)
    total = free.sum()
    scale = (count - bound * clipped.sum(dtype=weights.dtype)) / torch.where(total > 0, total, 1.0)
    return (free * scale).masked_fill(clipped, bound).clamp(0.0, bound)


def standardised(meta_gradient: Tensor) -> Tensor:
    """A batch's meta-gradient in units of its own standard deviation, not centred; zeros where it does not differ.

    Args:
        meta_gradient: ``(n,)``, of the training side.
    """
    if meta_gradient.shape[0] == 0:
        return meta_gradient
    spread = meta_gradient.std(correction=0)
    rounding = 8 * torch.finfo(meta_gradient.dtype).eps * meta_gradient.abs().amax()
    return torch.where(spread > rounding, meta_gradient / spread, torch.zeros_like(meta_gradient))

"""Splitters: Θ decides which instances are validation, looking for the hardest ones; and the losses it learns by.

A splitter is any ``nn.Module`` whose ``forward(samples: Samples)`` returns ``(B,)`` probabilities
``p_i = P(training side | x_i, y_i)``: an instance goes to validation where p < 1/2, the smallest p first. If it has
parameters, the validation buffer trains them by :func:`splitter_loss`. It may further have

- ``fraction``: a number, set by the validation buffer that it is given to, the share of instances wanted;
- ``balances_labels``: True for the buffer to keep its labels near P(y);
- ``observe(samples)``: called once for each batch whose step was taken. With several ranks the ``(B,)`` columns are of
  the instances of all of them; arguments, targets and outputs are this rank's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_molere.calls import logits_of
from torch_molere.distributed.collectives import gathered_columns
from torch_molere.samples import Samples
from torch_molere.signals import Signals, signal_network


class MarginSplitter(nn.Module):
    """Instances are drawn for validation in proportion to their hardness; nothing is learned.

    Instance i is sent with the probability ``rate_i = fraction · h_i^sharpness / mean(h^sharpness)`` (at most 1), where
    ``h_i = (1 − m̄_i)/2 + 0.02`` and m̄_i is the running margin of its row. The mean is a running one over the stream of
    batches (decay 0.9). What forward returns is ``p_i = u_i / (2 rate_i)``, at most 1, for uniform u_i from PyTorch's
    global random stream (the reweighter stands in its own): below 1/2 with the probability rate_i.

    Without classes there are no margins: then the rank of the running loss within the batch takes their place, 1 for
    the least loss and -1 for the largest.

    Args:
        sharpness: 1 is soft, 0 random; ``math.inf`` sends the hardest ``fraction`` of each batch (a fraction of an
            instance by chance). Negative ones send the easy with the power ``|sharpness|`` of
            ``h_i = (1 + m̄_i)/2 + 0.02``, and ``-math.inf`` the easiest.
        trim: the hardest ``trim`` of each batch, whose labels are doubtful, never go; in [0, 1).

    Attributes:
        fraction: the share of instances wanted, in (0, 1); set by the validation buffer.

    Raises:
        ValueError: if an argument is out of its range.
    """

    balances_labels = False
    stream: Tensor

    def __init__(self, sharpness: float = 1.0, trim: float = 0.0) -> None:
        super().__init__()
        if math.isnan(sharpness):
            raise ValueError("sharpness must be a number, math.inf or -math.inf, got nan")
        if not 0.0 <= trim < 1.0:
            raise ValueError(f"trim must lie in [0, 1), got {trim!r}")
        self.fraction = 0.1
        self.sharpness = float(sharpness)
        self.trim = trim
        # The running mean of h^sharpness and the sum of its factors, both 0 before the first batch.
        self.register_buffer("stream", torch.zeros(2))

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` in [0, 1]."""
        if math.isinf(self.sharpness):
            return self._extreme(samples)
        hardness = self._hardness(samples)
        mean = self.stream[0]
        mean = torch.where(mean > 0, mean, hardness.mean())
        p = torch.rand_like(hardness).mul_(mean).div_(hardness.mul_(2.0 * self.fraction)).clamp_(max=1.0)
        return p.nan_to_num_(1.0) if self.trim else p  # 0/0: hardness 0 and u 0

    @torch.no_grad()
    def observe(self, samples: Samples) -> None:
        """Count the batch in the running mean of h^sharpness."""
        if math.isinf(self.sharpness):
            return
        mean = self._hardness(samples).mean()
        mean_of_stream, factors = self.stream.unbind()
        factors.mul_(0.9).add_(1.0)
        mean_of_stream.add_((mean - mean_of_stream) / factors)

    def _hardness(self, samples: Samples) -> Tensor:
        """``(B,)`` h^sharpness, 0 for the trimmed (by the share that is trimmed where an instance is partly so)."""
        margins = _margins(samples)
        hardness = (margins * (-0.5 if self.sharpness >= 0 else 0.5)).add_(0.52)  # (1 ∓ m̄)/2 + 0.02
        if abs(self.sharpness) != 1.0:
            hardness = (hardness ** abs(self.sharpness)).clamp_min_(torch.finfo(hardness.dtype).tiny)
        if self.trim:
            hardness = hardness * (_ranks(margins) + 1.0 - self.trim * len(margins)).clamp(0.0, 1.0)
        return hardness

    def _extreme(self, samples: Samples) -> Tensor:
        """The hardest (or easiest) ``fraction``: the instances whose place, less one u, lies in (0, fraction · B)."""
        margins = _margins(samples)
        size = len(margins)
        places = _ranks(margins) + 1.0 - torch.rand((), device=margins.device, dtype=margins.dtype)
        places = places - self.trim * size  # of the hardest that are not trimmed: from 0
        if self.sharpness < 0:
            places = size * (1.0 - self.trim) - places  # of the easiest
        outside = places <= 0
        return (places / (2.0 * self.fraction * size)).clamp(0.0, 1.0).masked_fill_(outside, 1.0)

    def extra_repr(self) -> str:
        return f"sharpness={self.sharpness}, trim={self.trim}, fraction={self.fraction}"


def _margins(samples: Samples) -> Tensor:
    """Running margins, or without classes the rank of the running loss: from 1 for the least to -1."""
    if samples.running_margins is not None:
        return samples.running_margins
    ranks = _ranks(-samples.running_losses)  # 0 for the largest
    return (2.0 * ranks + 1.0) / len(ranks) - 1.0


def _ranks(values: Tensor) -> Tensor:
    """``(B,)`` the place of each value in ascending order, from 0; equal ones in the order of the batch."""
    ranks = torch.empty_like(values)
    order = values.argsort(stable=True)
    return ranks.scatter_(0, order, torch.arange(len(values), device=values.device, dtype=values.dtype))


class RandomSplitter(nn.Module):
    """A random split: by row where the batch has indices (it lasts), else anew at each encounter.

    Args:
        fraction: the share of instances wanted, in (0, 1).
        seed: of the split by row: two splitters with one seed make the same split. Encounters are drawn from PyTorch's
            global random stream, for which the reweighter stands in its own.

    Raises:
        ValueError: for a fraction out of its range.
    """

    balances_labels = False

    def __init__(self, fraction: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must lie in (0, 1), got {fraction!r}")
        self.fraction = fraction
        self.seed = seed

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)``: u / (2 fraction), at most 1, for uniform u: below 1/2 for that fraction of the instances."""
        if samples.indices is None:
            uniform = torch.rand(samples.losses.shape[0], dtype=torch.double, device=samples.losses.device)
        else:
            uniform = _hashed_uniform(samples.indices, self.seed)
        return (uniform / (2.0 * self.fraction)).clamp_max(1.0)

    def extra_repr(self) -> str:
        return f"fraction={self.fraction}, seed={self.seed}"


def _hashed_uniform(indices: Tensor, seed: int) -> Tensor:
    """A uniform number in [0, 1) for each row that depends on nothing but (row, seed): SplitMix64's finaliser."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed integer

    x = (indices.long() + 1) * -7046029254386353131 + seed
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return shifted(x ^ shifted(x, 31), 11).double() / 2**53


class LearnedSplitter(nn.Module):
    """Θ(x, y) as in the paper: a network that learns where the classifier fails, by :func:`splitter_loss`.

    It starts from "training side" at 0.9 for everyone where it sees signals.

    Args:
        signals: what it sees, some of :data:`~torch_molere.signals.SIGNALS`.
        hidden: width of its hidden layer.
        num_classes: needed for ``"probabilities"`` and ``"label"``.
        network: sees the inputs instead: maps the classifier's inputs to ``(B, C)``, of which the entry of the
            instance's class is its score (or ``(B,)`` / ``(B, 1)``, label-blind). ``signals`` is ignored then.
        as_in_ls: the penalties on the scale of Learning to Split's code, see :func:`splitter_loss`.
    """

    balances_labels = True

    def __init__(
        self,
        signals: Sequence[str] = ("loss",),
        *,
        hidden: int = 100,
        num_classes: int | None = None,
        network: nn.Module | None = None,
        as_in_ls: bool = False,
    ) -> None:
        super().__init__()
        self.sees_inputs = network is not None
        self.as_in_ls = as_in_ls
        self.network = network or signal_network(Signals(signals, num_classes), hidden, bias=math.log(9.0))

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)`` probabilities of the training side.

        Raises:
            ValueError: if the network's output has another shape, or several outputs and targets that are no classes.
        """
        if not self.sees_inputs:
            return torch.sigmoid(self.network(samples).squeeze(1))
        positional, named = samples.arguments
        scores = logits_of(self.network(*positional, **named))
        size = samples.losses.shape[0]
        if scores.ndim == 2 and scores.shape[1] > 1:
            if samples.classes is None:
                raise ValueError("a splitter network with several outputs needs class targets")
            scores = scores.gather(1, samples.classes.clamp_min(0).unsqueeze(1))
        if scores.numel() != size:
            raise ValueError(f"network must return ({size},), ({size}, 1) or ({size}, C), got {tuple(scores.shape)}")
        return torch.sigmoid(scores.reshape(size))


def gap_loss(p_train: Tensor, correct: Tensor) -> Tensor:
    """Mean of BCE(p_i, 1[the classifier is right on i]) over validation instances (Learning to Split, Bao and Barzilay
    2022, section 3).

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
    found = torch.stack([(1.0 - p_train).mean(), p_train.mean()])
    wanted = torch.tensor([delta, 1.0 - delta], dtype=found.dtype, device=found.device)
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
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"targets must lie in [0, {num_classes}), got values from {lowest} to {highest}")
    return _label_penalty(p_train, targets.long(), num_classes)


def _label_penalty(p_train: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """:func:`label_penalty` of ``(B,)`` classes, those of -1 left out; an accelerator is not waited for."""
    known = (classes >= 0).to(p_train.dtype)
    columns = classes.clamp_min(0)

    def share(soft: Tensor) -> Tensor:
        counts = soft.new_zeros(num_classes).index_add(0, columns, soft)
        return counts / counts.sum().clamp_min(torch.finfo(soft.dtype).tiny)

    overall = share(known)
    return _kl(overall, share(known * p_train)) + _kl(overall, share(known * (1.0 - p_train)))


def splitter_loss(
    splitter: nn.Module, validation: Samples, batch: Samples, fraction: float, as_in_ls: bool | None = None
) -> tuple[Tensor, Tensor]:
    """``gap_loss`` on the validation instances plus both penalties on a batch of all data.

    The penalties are the divergences that the papers define, summed over their outcomes. Learning to Split's code takes
    ``F.kl_div(..., "batchmean")`` of the vectors themselves, which divides Ω_ratio by its 2 outcomes and Ω_label by its
    C classes: there the label term fades as C grows and is next to nothing at 1,000 classes. The sum means the same
    for every C, which is why it is used here.

    Where several ranks train together, the instances are those of all of them.

    Args:
        splitter: Θ.
        validation: instances that are validation.
        batch: a batch of all data.
        fraction: the wanted validation fraction δ, in (0, 1).
        as_in_ls: divide Ω_ratio by 2 and Ω_label by C, as that code does; None for the splitter's own ``as_in_ls``.

    Returns:
        The loss, and p of this rank's validation instances, detached.
    """
    as_in_ls = getattr(splitter, "as_in_ls", False) if as_in_ls is None else as_in_ls
    p_validation: Tensor = splitter(validation)
    p_batch, *classes = gathered_columns(splitter(batch), *([] if batch.classes is None else [batch.classes]))
    loss = gap_loss(*gathered_columns(p_validation, validation.correct))
    loss = loss + ratio_penalty(p_batch, fraction) / (2 if as_in_ls else 1)
    if classes:
        num_classes = batch.outputs.shape[1]
        labels = _label_penalty(p_batch, classes[0].long(), num_classes)
        loss = loss + labels / (num_classes if as_in_ls else 1)
    return loss, p_validation.detach()


def _check_probabilities(p_train: Tensor) -> None:
    if p_train.ndim != 1 or p_train.shape[0] == 0 or not p_train.is_floating_point():
        raise ValueError(
            f"p_train must be a floating (B,) tensor with B ≥ 1, got {tuple(p_train.shape)} {p_train.dtype}"
        )


def _kl(wanted: Tensor, found: Tensor) -> Tensor:
    """Σ wanted · log(wanted / found), finite where ``found`` vanishes."""
    floor = torch.finfo(found.dtype).eps
    return (torch.xlogy(wanted, wanted) - wanted * found.clamp_min(floor).log()).sum()

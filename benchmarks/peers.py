"""Published ways to weigh, choose or bound, each from its definition; what they need comes from the run's own rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import Problem, Setting

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``objective(outputs, labels, rows)``: the scalar that is minimised on a batch."""

Train = Callable[[Tensor], Iterator[nn.Module]]
"""Plain training on some of the rows, which gives the model after each epoch."""


def plain(outputs: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(outputs, labels)


def focal(outputs: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """``(1 − p)^γ · −log p`` of the label's probability p: Lin et al., "Focal Loss for Dense Object Detection", ICCV
    2017, equation 4, without class weights; γ = 2 is theirs."""
    losses = F.cross_entropy(outputs, labels, reduction="none")
    # At p = 1 the power of γ < 1 has an infinite slope, which times a loss of zero would be NaN.
    return ((-torch.expm1(-losses)).clamp_min(1e-12) ** gamma * losses).mean()


def generalised(outputs: Tensor, labels: Tensor, q: float) -> Tensor:
    """``(1 − p^q) / q``: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with
    Noisy Labels", NeurIPS 2018, equation 6; q = 0.7 is theirs, q → 0 cross-entropy."""
    return (-torch.expm1(-q * F.cross_entropy(outputs, labels, reduction="none")) / q).mean()


def rgd_weights(losses: Tensor, tau: float) -> Tensor:
    """``exp(min(loss, τ) / (τ + 1))`` with mean one over the batch: Kumar, Majmundar, Nagaraj and Suggala, "Stochastic
    Re-weighted Gradient Descent via Distributionally Robust Optimization", 2023, for the KL divergence."""
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1.0))
    return weights / weights.mean()


def balanced_weights(labels: Tensor, classes: int, beta: float) -> Tensor:
    """``(C,)``: ``(1 − β) / (1 − β^n_c)`` for a class of n_c rows, with mean one over the rows: Cui et al.,
    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, equation 4; β → 1 is 1 / n_c."""
    counts = torch.bincount(labels, minlength=classes).double()
    weights = torch.where(counts > 0, (1.0 - beta) / (1.0 - beta**counts), 0.0)
    return (weights / weights[labels].mean()).float()


def twice_weights(outputs: Tensor, labels: Tensor, factor: float) -> Tensor:
    """``(N,)``: λ for what a first model gets wrong, else 1, with mean one over all rows: Liu et al., "Just Train
    Twice: Improving Group Robustness without Training Group Information", ICML 2021, equation 5.

    A weight in place of λ copies, so that there are as many updates: in expectation a batch's gradient is the same.
    """
    weights = torch.where(outputs.argmax(dim=1) == labels, 1.0, factor)
    return weights / weights.mean()


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """``(M, C)`` in evaluation mode."""
    model.eval()
    outputs = torch.cat([model(part) for part in inputs.split(1000)])
    model.train()
    return outputs


def irreducible_losses(problem: Problem, train: Train, seed: int) -> Tensor:
    """``(N,)`` losses of each row under a model that was trained on the half of the rows without it, at the epoch with
    the lowest mean: how Mindermann et al. (below) do without other data."""
    halves = np.array_split(np.random.default_rng([seed, 2]).permutation(len(problem.labels)), 2)
    found = torch.full((len(problem.labels),), torch.nan)
    for own, other in (halves, halves[::-1]):
        best = torch.tensor(torch.inf)
        for model in train(torch.from_numpy(np.sort(own))):
            losses = F.cross_entropy(logits(model, problem.inputs[other]), problem.labels[other], reduction="none")
            if losses.mean() < best:
                best, found[other] = losses.mean(), losses
    return found


def most_reducible(losses: Tensor, irreducible: Tensor, share: float) -> Tensor:
    """Positions in the batch of the largest losses minus irreducible losses: Mindermann et al., "Prioritized Training
    on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022, equation 3; a tenth is theirs."""
    return (losses - irreducible).topk(max(1, round(share * len(losses)))).indices


def objective(kind: str, strength: float, problem: Problem, train: Train) -> Objective:
    """What a peer minimises.

    Args:
        kind: ``focal``, ``gce``, ``rgd``, ``balanced`` or ``twice``; any other is plain.
        strength: γ, q, τ, β or λ.
        train: gives the first model of ``twice``, which is trained for one epoch.
    """
    if kind == "focal":
        return lambda outputs, labels, rows: focal(outputs, labels, strength)
    if kind == "gce":
        return lambda outputs, labels, rows: generalised(outputs, labels, strength)
    if kind == "balanced":
        by_class = balanced_weights(problem.labels, problem.classes, strength)
        return lambda outputs, labels, rows: (
            by_class[labels] * F.cross_entropy(outputs, labels, reduction="none")
        ).mean()
    if kind == "twice":
        first = next(train(torch.arange(len(problem.labels))))
        by_row = twice_weights(logits(first, problem.inputs), problem.labels, strength)
        return lambda outputs, labels, rows: (by_row[rows] * F.cross_entropy(outputs, labels, reduction="none")).mean()
    if kind == "rgd":

        def rgd(outputs: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            losses = F.cross_entropy(outputs, labels, reduction="none")
            return (rgd_weights(losses, strength) * losses).mean()

        return rgd
    return plain


def passes(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless passes over rows in random orders, in batches whose sizes differ by at most one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].tensor_split(-(-len(rows) // batch_size))


def reducible_batches(
    problem: Problem, setting: Setting, model: nn.Module, train: Train, share: float, seed: int
) -> Iterable[Tensor]:
    """RHO-Loss: batches of the usual size, each the most reducible share of a larger one, by the model as it is."""
    irreducible = irreducible_losses(problem, train, seed)
    everything = torch.arange(len(problem.labels))
    for batch in itertools.islice(passes(everything, round(setting.batch_size / share), seed), None):
        losses = F.cross_entropy(logits(model, problem.inputs[batch]), problem.labels[batch], reduction="none")
        yield batch[most_reducible(losses, irreducible[batch], share)]

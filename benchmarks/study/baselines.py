"""Published ways to weigh or choose training rows, each from its definition, with the strengths that were tried.

All train the same classifier with the same number of updates as plain training on the rows that they train on. Just
Train Twice and RHO-Loss train other models first, Learning to Reweight and Meta-Weight-Net set a tenth of the rows
apart to judge by: what they need comes out of the run's own rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.budget import batches_in, passes, plain_training
from benchmarks.study.measures import logits
from benchmarks.study.methods import Method
from benchmarks.study.problems import Problem, Rows, Setting
from torch_molere import hypergradient

Objective = Callable[[Tensor, Tensor], Tensor]
"""From the losses ``(B,)`` of a batch, with their graph, and its positions ``(B,)`` to the scalar that is minimised."""


def focal(losses: Tensor, gamma: float) -> Tensor:
    """``(1 − p)^γ · −log p`` of the label's probability p = exp(−loss): Lin et al., "Focal Loss for Dense Object
    Detection", ICCV 2017, equation 4, without class weights; γ = 2 is theirs."""
    missing = -torch.expm1(-losses)
    # At p = 1 the power of γ < 1 has an infinite slope, which times a loss of zero would be NaN.
    return missing.clamp_min(1e-12) ** gamma * losses


def rgd_weights(losses: Tensor, tau: float) -> Tensor:
    """``exp(min(loss, τ) / (τ + 1))`` with mean one over the batch: Kumar, Majmundar, Nagaraj and Suggala, "Stochastic
    Re-weighted Gradient Descent via Distributionally Robust Optimization", 2023, for the KL divergence."""
    weights = torch.exp(losses.detach().clamp(max=tau) / (tau + 1.0))
    return weights / weights.mean()


def twice_weights(outputs: Tensor, labels: Tensor, factor: float) -> Tensor:
    """λ for what the first model gets wrong, else 1, with mean one over all rows: Liu et al., "Just Train Twice:
    Improving Group Robustness without Training Group Information", ICML 2021, equation 5.

    A weight in place of λ copies, so that there are as many updates: in expectation a batch's gradient is the same.
    """
    weights = torch.where(outputs.argmax(dim=1) == labels, 1.0, factor)
    return weights / weights.mean()


def irreducible_losses(setting: Setting, problem: Problem, classes: int, seed: int) -> Tensor:
    """``(N,)`` losses of each row under a model that was trained on the half of the rows without it, at the epoch with
    the lowest mean: how Mindermann et al. (below) do without other data."""
    halves = np.array_split(np.random.default_rng([seed, 2]).permutation(len(problem.labels)), 2)
    found = torch.full((len(problem.labels),), torch.nan)
    for own, other in (halves, halves[::-1]):
        best = torch.tensor(torch.inf)
        for model in plain_training(setting, problem, np.sort(own), classes, seed, setting.epochs):
            losses = F.cross_entropy(logits(model, problem.inputs[other]), problem.labels[other], reduction="none")
            if losses.mean() < best:
                best, found[other] = losses.mean(), losses
    return found


def most_reducible(losses: Tensor, irreducible: Tensor, share: float) -> Tensor:
    """Positions in the batch of the largest losses minus irreducible losses: Mindermann et al., "Prioritized Training
    on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022, equation 3; a tenth is theirs."""
    return (losses - irreducible).topk(round(share * len(losses))).indices


def reducible_batches(
    setting: Setting, problem: Problem, rows: Rows, model: nn.Module, irreducible: Tensor, share: float, seed: int
) -> Iterator[Tensor]:
    """As many batches as plain training has, each the most reducible share of a larger one, by the model as it is."""
    size = round(setting.batch_size / share)
    steps = setting.epochs * batches_in(len(rows), setting.batch_size)
    for batch in itertools.islice(passes(rows, steps, size, seed), steps):
        losses = F.cross_entropy(logits(model, problem.inputs[batch]), problem.labels[batch], reduction="none")
        yield batch[most_reducible(losses, irreducible[batch], share)]


def l2rw_weights(model: nn.Module, batch: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> Tensor:
    """``max(0, −∂L_val/∂ε)`` at ε = 0, ε being the weights of the next step of plain SGD, with mean one over the batch
    unless all are zero: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, algorithm 1.

    The learning rate of that step scales every weight alike, so any will do.
    """
    look_ahead = torch.optim.SGD(model.parameters(), lr=1.0)
    zeros = torch.zeros(len(batch[1]))
    weights = -hypergradient(model, look_ahead, batch, validation, zeros, engine="forward")
    weights = weights.clamp_min(0.0)
    mean = weights.mean()
    return weights / mean if mean > 0.0 else weights


def objective(
    method: Method, setting: Setting, problem: Problem, apart: Rows, model: nn.Module, classes: int, seed: int
) -> Objective:
    """What a method minimises on each batch; for all that need no :class:`torch_molere.MetaReweighter`."""
    inputs, labels, arguments = problem.inputs, problem.labels, method.arguments
    if method.weighs == "focal":
        return lambda losses, rows: focal(losses, arguments["gamma"]).mean()
    if method.weighs == "rgd":
        return lambda losses, rows: (rgd_weights(losses, arguments["tau"]) * losses).mean()
    if method.weighs == "twice":
        *_, first = plain_training(setting, problem, np.arange(len(labels)), classes, seed, arguments["epochs"])
        fixed = twice_weights(logits(first, inputs), labels, arguments["factor"])
        return lambda losses, rows: (fixed[rows] * losses).mean()
    if method.weighs == "l2rw":
        endless = itertools.chain.from_iterable(
            passes(apart, 1, arguments["val_batch_size"], number) for number in itertools.count(seed)
        )

        def weighted(losses: Tensor, rows: Tensor) -> Tensor:
            held = next(endless)
            weights = l2rw_weights(model, (inputs[rows], labels[rows]), (inputs[held], labels[held]))
            return (weights * losses).mean()

        return weighted
    return lambda losses, rows: losses.mean()


def batches(
    method: Method, setting: Setting, problem: Problem, rows: Rows, model: nn.Module, classes: int, seed: int
) -> Iterator[Tensor]:
    """The positions that a method trains on, batch by batch."""
    if method.weighs == "rho":
        irreducible = irreducible_losses(setting, problem, classes, seed)
        return reducible_batches(setting, problem, rows, model, irreducible, method.arguments["share"], seed)
    return passes(rows, setting.epochs, setting.batch_size, seed)


def _meta_weight_net(weighting_lr: float) -> Method:
    """Shu et al., "Meta-Weight-Net: Learning an Explicit Mapping for Sample Weighting", NeurIPS 2019: the loss through
    one hidden layer of 100 to a weight, learned at every step, before the classifier's own, from the first step on."""
    arguments = {"order": "before", "every": 1, "warmup_steps": 0, "weighting_lr": weighting_lr}
    return Method(f"Meta-Weight-Net, φ {weighting_lr:g}", "fixed", "random", arguments=arguments)


TRIED = {
    "focal": [Method(f"focal loss, γ {g:g}", "focal", arguments={"gamma": g}) for g in (0.5, 1.0, 2.0, 5.0)],
    "rgd": [Method(f"RGD, τ {tau:g}", "rgd", arguments={"tau": tau}) for tau in (0.5, 1.0, 3.0)],
    "twice": [
        Method(f"Just Train Twice, T {t}, λ {factor:g}", "twice", arguments={"epochs": t, "factor": factor})
        for t in (1, 5)
        for factor in (2.0, 5.0)
    ],
    "rho": [Method(f"RHO-Loss, {share:.0%}", "rho", arguments={"share": share}) for share in (0.1, 0.25, 0.5)],
    "l2rw": [
        Method(f"Learning to Reweight, batch {size}", "l2rw", "random", arguments={"val_batch_size": size})
        for size in (16, 64, 500)
    ],
    "meta-weight-net": [_meta_weight_net(lr) for lr in (1e-4, 1e-3, 1e-2)],
}
"""Strengths of each baseline, the published one among them; Learning to Reweight has none but its validation batch."""


WINNERS = (
    "focal loss, γ 0.5",
    "RGD, τ 0.5",
    "Just Train Twice, T 1, λ 2",
    "RHO-Loss, 50%",
    "Learning to Reweight, batch 64",
    "Meta-Weight-Net, φ 0.0001",
)
CHOSEN = [method for tried in TRIED.values() for method in tried if method.name in WINNERS]
"""Each baseline's :func:`winner` of the stored study ``select-baselines``."""


def winner(tried: list[Method], frame: pd.DataFrame) -> Method:
    """The rule of choice: the highest accuracy on the selection set, averaged over settings and seeds."""
    means = frame.groupby("method")["accuracy"].mean()
    return max(tried, key=lambda method: means[method.name])

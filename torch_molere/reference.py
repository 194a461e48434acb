"""MOLERE in plain loops, with ``higher``: what :class:`MetaReweighter` computes, at a tenth of its length.

Read it as the tutorial; the tests hold ``step`` to it. Everything is by hand and slow: full second-order graphs, one
rank, no mixed precision, no checks. θ is the classifier, φ the weighting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import higher
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = tuple[Tensor, Tensor]


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    weigh: Callable[[Tensor], Tensor],
    phi_optimizer: Optimizer,
    batch: Batch,
    validation: Batch | None,
    loss_fn: Callable[[Any, Tensor], Tensor],
    *,
    order: str = "after",
    shrinkage: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One training step of θ and, where a validation batch is given, one of φ.

    Args:
        model: θ.
        optimizer: of θ, one that ``higher`` has.
        weigh: φ: ``(B,)`` detached losses to ``(B,)`` weights ≥ 0, with their graph to φ's parameters.
        phi_optimizer: of φ.
        batch: training inputs and targets.
        validation: validation inputs and targets.
        loss_fn: ``(outputs, targets) -> (B,)``.
        order: ``"after"``: φ learns from this very step; ``"before"``: it learns from a virtual step first.
        shrinkage: λ, or None for the bare meta-gradient.

    Returns:
        ``(B,)`` the weights w̄ that θ was trained with, and ``(B,)`` ∂L_val(θ⁺)/∂w̄, or None without validation.
    """
    inputs, targets = batch
    losses = loss_fn(model(inputs), targets)
    w = weigh(losses.detach())
    w_bar = w * (len(w) / w.sum())  # mean one
    gradient = None
    if validation is not None:
        gradient = meta_gradient(model, optimizer, w_bar.detach(), batch, validation, loss_fn)
        phi_gradient = gradient
        if shrinkage is not None:  # in standard deviations, and pulled to one
            phi_gradient = (gradient / gradient.std(correction=0) + shrinkage * (w_bar.detach() - 1)) / len(w)
        phi_optimizer.zero_grad()
        w_bar.backward(gradient=phi_gradient)  # the derivative of the normalisation is kept
        phi_optimizer.step()
        if order == "before":  # the new φ weighs this very batch
            w = weigh(losses.detach()).detach()
            w_bar = w * (len(w) / w.sum())
    optimizer.zero_grad()
    (w_bar.detach() * losses).mean().backward()  # L(θ; w̄)
    optimizer.step()  # θ⁺ = U(θ, ∇L)
    return w_bar.detach(), gradient


def meta_gradient(
    model: nn.Module,
    optimizer: Optimizer,
    w_bar: Tensor,
    batch: Batch,
    validation: Batch,
    loss_fn: Callable[[Any, Tensor], Tensor],
) -> Tensor:
    """∂L_val(θ⁺)/∂w̄ by unrolling the optimizer's update and differentiating all of it."""
    w_bar = w_bar.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher's own deprecation warnings
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=True) as (functional, inner):
            inner.step((w_bar * loss_fn(functional(batch[0]), batch[1])).mean())
            val_loss = loss_fn(functional(validation[0]), validation[1]).mean()
            (gradient,) = torch.autograd.grad(val_loss, w_bar)
    return gradient.detach()


def hard_instances(margins: Sequence[float], fraction: float) -> list[int]:
    """The splitter at its simplest: the instances with the smallest margins go to validation."""
    order = sorted(range(len(margins)), key=margins.__getitem__)
    return order[: max(1, round(fraction * len(margins)))]

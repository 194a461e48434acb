r"""The meta-gradient: how the validation loss after the next update changes with each training instance's weight.

With :math:`L(θ; w) = \frac1n \sum_i w_i ℓ_i(θ)`, :math:`θ⁺ = U(θ, ∇_θ L(θ; w))` and
:math:`u = (∂U/∂g)^\top ∇_θ L_{val}(θ⁺)`,

.. math:: \frac{∂ L_{val}(θ⁺)}{∂ w_i} = \frac1n ⟨u, ∇_θ ℓ_i(θ)⟩,

the meta-gradient of MOLERE (Jain, Suggala and Shenoy, CVPR 2024) and of Meta-Weight-Net, for any optimizer U. Where the
optimizer sees m ⊙ ∇L (clipping, scaling, masks), the chain rule gives ⟨m ⊙ u, ∇ℓ_i⟩.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_molere.calls import Arguments, batch_size, detached, device_of
from torch_molere.distributed import fsdp
from torch_molere.distributed.collectives import averaged, ranks, summed
from torch_molere.hypergradients.functional import preserved_randomness, reached_leaves, run_apart
from torch_molere.hypergradients.precision import own_forward
from torch_molere.hypergradients.update import Update
from torch_molere.losses import PerSampleLoss


@dataclass(frozen=True)
class Validated:
    """A validation batch at θ⁺.

    Attributes:
        mean: what φ is to make small, the mean over the batches of all ranks.
        gradients: of the mean, one for each parameter; None where it does not reach.
        losses: ``(V,)`` training losses of this rank's instances, detached.
        outputs: the model's outputs for them, detached.
    """

    mean: Tensor
    gradients: list[Tensor | None]
    losses: Tensor
    outputs: Any


def validate(
    model: nn.Module,
    criterion: PerSampleLoss,
    val_loss_fn: PerSampleLoss,
    batch: tuple[Arguments, Any],
    owners: Sequence[Tensor],
    values: Sequence[Tensor],
    seed: int,
    *,
    sign: float = 1.0,
    observers: bool = True,
    together: bool = True,
    select: Callable[[Any], Any] | None = None,
) -> Validated:
    """The mean validation loss at ``values`` of the parameters and its gradient, leaving the model untouched.

    Args:
        model: the classifier, in the mode it is in.
        criterion: gives the losses returned.
        val_loss_fn: what the mean and its gradient are of.
        batch: the validation batch of this rank.
        owners: the parameters.
        values: what stands in their place.
        seed: of the random streams that the forward draws from.
        sign: -1 for an objective that is to grow.
        observers: whether the user's forward hooks run.
        together: average over the batches of all ranks.
        select: what takes what the losses see out of what the model returns; None for all of it.

    Raises:
        ValueError: for a batch of one instance with batch normalisation, RuntimeError for reentrant checkpoints.
    """
    (positional, named), targets = batch
    modules = (model, *criterion.modules, *val_loss_fn.modules)
    sharded = fsdp.any_sharded(owners)
    leaves = list(values) if sharded else [value.detach().requires_grad_() for value in values]

    def run() -> Validated:
        with torch.enable_grad(), preserved_randomness(device_of(model), seed):
            with own_forward(model):
                outputs = model(*positional, **named)
            outputs = outputs if select is None else select(outputs)
            losses = val_loss_fn(outputs, targets)
            mean = losses.detach().mean()
            gradients: list[Tensor | None]
            if sharded:
                # FSDP2's own reduction is the mean over the ranks.
                total, count = summed([losses.detach().sum(), mean.new_tensor(len(losses))])
                mean = total / count
                (losses.sum() * (sign * ranks() / count)).backward()
                gradients = [owner.grad for owner in owners]
            else:
                reached_leaves(losses)  # refuses reentrant checkpoints
                # Inside, as checkpoints run the forward once more in backward, with the parameters that stand here.
                spread = together and ranks() > 1  # then no None, which the other ranks may not have
                found = torch.autograd.grad(sign * losses.mean(), leaves, allow_unused=True, materialize_grads=spread)
                gradients = list(found)
                if spread:
                    *gradients, mean = averaged([*found, mean], len(losses))  # type: ignore[assignment]
        with torch.no_grad():
            own = losses if val_loss_fn is criterion else criterion(outputs, targets)
        return Validated(mean, gradients, own.detach(), detached(outputs))

    try:
        return run_apart(modules, owners, leaves, run, observers=observers)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise ValueError(
                "validation gave a batch of one instance, which batch normalisation cannot take; give its DataLoader "
                "drop_last=True or another batch_size"
            ) from error
        raise


def meta_gradient(
    optimizers: Sequence[Optimizer],
    owners: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    validate: Callable[[list[Tensor]], Validated],
    factors: Sequence[Tensor | float] | None = None,
) -> tuple[Validated, list[Tensor]]:
    """L_val(θ⁺), and m ⊙ u, along which the losses of the training batch are to be differentiated.

    This is the one recipe of the library: ``hypergradient``, ``step`` and ``check`` call it.

    Args:
        optimizers: at their present state, which is only read.
        owners: the parameters θ, each of which one of the optimizers holds.
        gradients: what the optimizers see, one for each; None where the loss does not reach.
        validate: L_val and its gradient at given parameters.
        factors: m, for each parameter a number or a tensor of its shape; None for one everywhere.
    """
    update = Update(optimizers, owners, gradients)
    after = update.look_ahead()
    validated = validate(after)
    del after  # its memory serves what follows
    direction = update.vjp(validated.gradients)
    if factors is not None:
        direction = [u * m for u, m in zip(direction, factors, strict=True)]
    return validated, direction


def check_weights_shape(weights: Tensor, targets: Any) -> int:
    """The number of training instances B, of which ``weights`` must have one each."""
    size = batch_size(targets)
    if weights.shape != (size,) or not weights.is_floating_point():
        raise ValueError(f"weights must be floating ({size},), got {tuple(weights.shape)} of {weights.dtype}")
    return size

"""The optimizer's next update as a differentiable function of the gradient, θ⁺ = U(θ, g)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's and Lightning's wrappers, whose ``step`` calls its own: there hooks are run."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_differentiable(optimizer: Optimizer) -> None:
    """Refuse optimizers whose update PyTorch cannot differentiate.

    Raises:
        TypeError: if ``optimizer`` is no :class:`torch.optim.Optimizer`, or has no ``differentiable`` flag
            (LBFGS, SparseAdam, Adafactor, Muon and most optimizers from elsewhere).
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if "differentiable" not in optimizer.defaults:
        raise TypeError(
            f"optimizer {type(optimizer).__name__} cannot be differentiated: it has no differentiable=True option; "
            "use SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Adamax, ASGD or Rprop of torch.optim"
        )


class Update:
    """One update of an optimizer, taken on copies, that can be transposed.

    The optimizer is read, never changed: the parameters, their state and the group options are copied and the
    optimizer's own ``step`` runs on the copies with ``differentiable=True``.

    Args:
        optimizer: any optimizer that :func:`check_differentiable` accepts.
        parameters: the parameters to look at, each held by ``optimizer``.
        gradients: one for each parameter, or None where the loss does not reach it (the optimizer skips it then).
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for gradient in gradients:
            if gradient is not None and gradient.is_sparse:
                raise TypeError("sparse gradients cannot be differentiated through; use sparse=False in the embedding")
        self._gradients = [None if g is None else g.detach().requires_grad_() for g in gradients]
        copies = [parameter.detach().clone() for parameter in parameters]
        copy_of = dict(zip(parameters, copies, strict=True))
        for copy, gradient in zip(copies, self._gradients, strict=True):
            copy.grad = gradient
        twin = type(optimizer).__new__(type(optimizer))
        twin.__setstate__(
            {
                "defaults": {**optimizer.defaults, "differentiable": True},
                "param_groups": [_differentiable_group(group, copy_of) for group in optimizer.param_groups],
                "state": defaultdict(
                    dict,
                    {copy_of[p]: _copied(state) for p, state in optimizer.state.items() if p in copy_of},
                ),
            }
        )
        with torch.enable_grad():
            if isinstance(twin, torch.optim.SGD):
                _start_momentum(twin)
            twin.step()
        self._after = copies

    @property
    def parameters(self) -> list[Tensor]:
        """θ⁺, detached, in the order given."""
        return [parameter.detach() for parameter in self._after]

    def transpose(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """``u = (∂U/∂g)ᵀ v`` for one cotangent v of θ⁺ a parameter (None stands for zero).

        Where the update has no finite derivative (Adam at a gradient and a second moment of exactly zero, as in the
        weights of a dead unit) u is zero: there the gradients it would be multiplied with are zero too.
        """
        pairs = [
            (after, v)
            for after, v in zip(self._after, cotangents, strict=True)
            if v is not None and after.requires_grad
        ]
        reached = [gradient for gradient in self._gradients if gradient is not None]
        found = iter(
            torch.autograd.grad([after for after, _ in pairs], reached, [v for _, v in pairs], allow_unused=True)
            if pairs and reached
            else [None] * len(reached)
        )
        transposed = []
        for gradient, after in zip(self._gradients, self._after, strict=True):
            u = None if gradient is None else next(found)
            transposed.append(torch.zeros_like(after) if u is None else u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))
        return [u.detach() for u in transposed]


def _start_momentum(twin: torch.optim.SGD) -> None:
    """Give SGD the momentum buffers that its first step would make from a detached gradient.

    The first buffer is the gradient itself, with no dampening τ: μ·(τ/μ)·g + (1 − τ)·g = g.
    """
    for group in twin.param_groups:
        if not group["momentum"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is None or twin.state[parameter].get("momentum_buffer") is not None:
                continue
            gradient = -parameter.grad if group["maximize"] else parameter.grad
            gradient = gradient.add(parameter.detach(), alpha=group["weight_decay"])
            twin.state[parameter]["momentum_buffer"] = gradient * (group["dampening"] / group["momentum"])


def _differentiable_group(group: dict[str, Any], copy_of: dict[Tensor, Tensor]) -> dict[str, Any]:
    return {
        **group,
        "params": [copy_of[parameter] for parameter in group["params"] if parameter in copy_of],
        "differentiable": True,
        "foreach": False,
        "fused": False,
    }


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    # The differentiable path computes bias corrections from the step tensor itself, the plain one from a Python
    # float: a float64 step makes them equal.
    return {
        name: (value.detach().double() if name == "step" else value.detach().clone())
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }

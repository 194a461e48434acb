"""The optimizer's next update as a differentiable function of the gradient, θ⁺ = U(θ, g)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_molere.derivatives import Diagonal, diagonal, has_closed_form

PART = 2**20
"""How many elements of parameters are looked at together. All at once, the copies of Adam's state would be the largest
part of what a meta-update takes; memory just let go of is taken up again at once."""


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


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` has told a fused optimizer that its gradients overflowed: its step will do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscaled(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients that the optimizer will use: a fused one takes a ``GradScaler``'s factor out in its own step."""
    scale = getattr(optimizer, "grad_scale", None)
    return [g if g is None or scale is None else g / scale.to(g.device) for g in gradients]


class Update:
    """One update of an optimizer, taken on copies, that can be transposed.

    The optimizer is read, never changed: the parameters, their state and the group options are copied and the
    optimizer's own ``step`` runs on the copies. Its derivative is known in closed form
    (:mod:`torch_molere.derivatives`) or comes from autograd through that step, taken with ``differentiable=True``.

    Args:
        optimizer: any optimizer that :func:`check_differentiable` accepts.
        parameters: the parameters to look at, each held by ``optimizer``.
        gradients: one for each parameter, or None where the loss does not reach it (the optimizer skips it then).
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for gradient in gradients:
            if gradient is not None and gradient.is_sparse:
                raise TypeError("sparse gradients cannot be differentiated through; use sparse=False in the embedding")
        self._diagonal: list[Diagonal | None] | None = None
        self._gradients = [None if g is None else g.detach() for g in gradients]
        if has_closed_form(optimizer):
            self._diagonal = diagonal(optimizer, parameters, self._gradients)
            self._after = [
                after for part in _parts(parameters) for after in _stepped(optimizer, parameters[part], gradients[part])
            ]
            return
        for gradient in self._gradients:
            if gradient is not None:
                gradient.requires_grad_()
        twin, self._after = _twin(optimizer, parameters, self._gradients, differentiable=True)
        with torch.enable_grad():
            if isinstance(twin, torch.optim.SGD):
                _start_momentum(twin)
            twin.step()

    @property
    def parameters(self) -> list[Tensor]:
        """θ⁺, detached, in the order given."""
        return [parameter.detach() for parameter in self._after]

    def transpose(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """``u = (∂U/∂g)ᵀ v`` for one cotangent v of θ⁺ a parameter (None stands for zero).

        Where the update has no finite derivative (Adam at a gradient and a second moment of exactly zero, as in the
        weights of a dead unit) u is zero: there the gradients it would be multiplied with are zero too.
        """
        derivatives = self._by_autograd(cotangents) if self._diagonal is None else self._by_diagonal(cotangents)
        return [torch.zeros_like(after) if u is None else u for u, after in zip(derivatives, self._after, strict=True)]

    def _by_diagonal(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        assert self._diagonal is not None
        return [None if v is None or d is None else v * d for v, d in zip(cotangents, self._diagonal, strict=True)]

    def _by_autograd(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = [
            (after, v)
            for after, v in zip(self._after, cotangents, strict=True)
            if v is not None and after.requires_grad
        ]
        reached = [gradient for gradient in self._gradients if gradient is not None]
        if not pairs or not reached:
            return [None] * len(self._gradients)
        after, v = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(after, reached, v, allow_unused=True))
        transposed = [None if gradient is None else next(found) for gradient in self._gradients]
        return [None if u is None else u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for u in transposed]


def _parts(parameters: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive parameters whose state is copied at once; elementwise updates can be taken in parts."""
    first = elements = 0
    for place, parameter in enumerate(parameters):
        if elements and elements + parameter.numel() > PART:
            yield slice(first, place)
            first, elements = place, 0
        elements += parameter.numel()
    yield slice(first, len(parameters))


def _stepped(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Copies of some of the parameters after the optimizer's step; those of their states are let go of."""
    twin, copies = _twin(optimizer, parameters, gradients, differentiable=False)
    twin.step()
    for copy in copies:
        copy.grad = None
    return copies


def _twin(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], differentiable: bool
) -> tuple[Optimizer, list[Tensor]]:
    """The optimizer over again, holding copies of the parameters, which are returned, and of their states."""
    copies = [parameter.detach().clone() for parameter in parameters]
    copy_of = dict(zip(parameters, copies, strict=True))
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient
    options = {"differentiable": True, "foreach": False, "fused": False} if differentiable else {}
    twin = type(optimizer).__new__(type(optimizer))
    twin.__setstate__(
        {
            "defaults": {**optimizer.defaults, "differentiable": differentiable},
            "param_groups": [
                {**group, "params": [copy_of[p] for p in group["params"] if p in copy_of], **options}
                for group in optimizer.param_groups
            ],
            "state": defaultdict(
                dict,
                {copy_of[p]: _copied(state, differentiable) for p, state in optimizer.state.items() if p in copy_of},
            ),
        }
    )
    return twin, copies


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


def _copied(state: dict[str, Any], differentiable: bool) -> dict[str, Any]:
    # The differentiable path computes bias corrections from the step tensor itself, the plain one from a Python
    # float: a float64 step makes them equal.
    return {
        name: (value.detach().double() if name == "step" and differentiable else value.detach().clone())
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }

"""The optimizer's next update as a differentiable function of the gradient, θ⁺ = U(θ, g)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_molere.derivatives import diagonal, has_closed_form
from torch_molere.pieces import Piece, as_a_whole, in_pieces


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
        optimizer: any optimizer that :func:`check_differentiable` accepts; not to be stepped before :meth:`transpose`.
        parameters: the parameters to look at, each held by ``optimizer``.
        gradients: one for each parameter, or None where the loss does not reach it (the optimizer skips it then).
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for gradient in gradients:
            if gradient is not None and gradient.is_sparse:
                raise TypeError("sparse gradients cannot be differentiated through; use sparse=False in the embedding")
        self._optimizer = optimizer
        self._owners = list(parameters)
        self._before = [parameter.detach() for parameter in parameters]
        self._gradients = [None if g is None else g.detach() for g in gradients]
        self._differentiable: list[Tensor] | None = None  # θ⁺ with its graph, where there is no closed form
        if not has_closed_form(optimizer):
            self._differentiable = self._with_graph()

    def _with_graph(self) -> list[Tensor]:
        after = [parameter.clone() for parameter in self._before]
        for gradient in self._gradients:
            if gradient is not None:
                gradient.requires_grad_()
        pieces = as_a_whole(self._optimizer, self._owners, after, self._gradients)
        twin = _twin(self._optimizer, pieces, differentiable=True)
        with torch.enable_grad():
            if isinstance(twin, torch.optim.SGD):
                _start_momentum(twin)
            twin.step()
        return after

    def look_ahead(self) -> list[Tensor]:
        """θ⁺, detached, in the order given. It is not kept here: its memory is the caller's to let go of."""
        after = self._differentiable
        if after is None:
            after = [parameter.clone() for parameter in self._before]
            for pieces in in_pieces(self._optimizer, self._owners, after, self._gradients):
                _twin(self._optimizer, pieces, differentiable=False).step()
        return [parameter.detach() for parameter in after]

    def transpose(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """``u = (∂U/∂g)ᵀ v`` for one cotangent v of θ⁺ a parameter (None stands for zero).

        Where the update has no finite derivative (Adam at a gradient and a second moment of exactly zero, as in the
        weights of a dead unit) u is zero: there the gradients it would be multiplied with are zero too.
        """
        if self._differentiable is None:
            derivatives = self._by_diagonal(cotangents)
        else:
            derivatives = self._by_autograd(self._differentiable, cotangents)
        return [torch.zeros_like(p) if u is None else u for u, p in zip(derivatives, self._before, strict=True)]

    def _by_diagonal(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        v = {owner: each.contiguous() for owner, each in zip(self._owners, cotangents, strict=True) if each is not None}
        u: dict[Tensor, Tensor] = {}
        for pieces in in_pieces(self._optimizer, self._owners, self._before, self._gradients):
            reached = [piece for piece in pieces if piece.gradient is not None and piece.owner in v]
            for piece, factor in zip(reached, diagonal(self._optimizer, reached), strict=True):
                owner = piece.owner
                if piece.elements is None:
                    u[owner] = v[owner] * factor
                else:
                    u.setdefault(owner, torch.empty_like(v[owner]))
                    torch.mul(piece.view(v[owner]), factor, out=piece.view(u[owner]))
        return [u.get(owner) for owner in self._owners]

    def _by_autograd(self, after: list[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = [(p, v) for p, v in zip(after, cotangents, strict=True) if v is not None and p.requires_grad]
        reached = [gradient for gradient in self._gradients if gradient is not None]
        if not pairs or not reached:
            return [None] * len(self._gradients)
        moved, v = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(moved, reached, v, allow_unused=True))
        transposed = [None if gradient is None else next(found) for gradient in self._gradients]
        return [None if u is None else u.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for u in transposed]


def _twin(optimizer: Optimizer, pieces: Sequence[Piece], differentiable: bool) -> Optimizer:
    """The optimizer over again, holding the pieces, which its step moves, and copies of their states."""
    for piece in pieces:
        piece.values.grad = piece.gradient
    options = {"differentiable": True, "foreach": False, "fused": False} if differentiable else {}
    twin = type(optimizer).__new__(type(optimizer))
    twin.__setstate__(
        {
            "defaults": {**optimizer.defaults, "differentiable": differentiable},
            "param_groups": [
                {**group, "params": [piece.values for piece in pieces if piece.group is group], **options}
                for group in optimizer.param_groups
            ],
            "state": defaultdict(
                dict, {piece.values: _copied(piece.state, differentiable) for piece in pieces if piece.state}
            ),
        }
    )
    return twin


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

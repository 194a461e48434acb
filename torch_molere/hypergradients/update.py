"""The next update of the optimizers as a differentiable function of the gradients, θ⁺ = U(θ, g)."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_molere.hypergradients.jacobians import diagonals, has_closed_form

DIFFERENTIABLE = "SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Adamax or ASGD of torch.optim"

WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
}
"""Wrappers that do nothing to a step but take or skip it."""

PYTORCH_WRAPS_IN = ("torch.optim.optimizer", "torch.optim.lr_scheduler")
"""Modules whose wrappers of a step change nothing in it: hooks, the gradient mode, a scheduler's counter."""

UNRELATED = {"zero_grad", "state_dict", "load_state_dict", "add_param_group"}
"""What a subclass may override (besides ``register_…`` and ``__…__``): no step calls it."""

PORTION = 2**20
"""Elements that go through an update together, or a sixteenth of all where that is more."""


def differentiable_optimizer(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's and Lightning's wrappers, whose ``step`` calls its own; else ``optimizer``.

    No other wrapper is seen through: its ``step`` may do anything (Lookahead, SAM).
    """
    while _is_known_wrapper(type(optimizer)):
        optimizer = optimizer.optimizer
    return optimizer


def _is_known_wrapper(kind: type) -> bool:
    # Lightning makes a class LightningSGD(LightningOptimizer, SGD); a subclass with a step of its own is another thing.
    known: list[Any] = [base for base in kind.__mro__ if f"{base.__module__}.{base.__qualname__}" in WRAPPERS]
    return bool(known) and _as_written(inspect.getattr_static(kind, "step")) is _as_written(known[0].step)


def check_differentiable(optimizer: Any) -> None:
    """Refuse an optimizer whose next update cannot be looked ahead at and differentiated.

    It must be one of torch.optim's classes with ``differentiable=True``, or a subclass that changes nothing in its
    step, alone or in one of the wrappers that :func:`differentiable_optimizer` sees through.

    Raises:
        TypeError: for anything else: another class, a wrapper, a step of one's own, an optimizer of torch.optim
            without that option (LBFGS, SparseAdam, Adafactor, Muon), and Rprop, whose derivative is zero.
        ValueError: where some parameter groups have ``maximize=True`` and others have not.
    """
    optimizer = differentiable_optimizer(optimizer)
    name = type(optimizer).__name__
    own = getattr(optimizer, "__dict__", {})
    inside = next((attribute for attribute, value in own.items() if isinstance(value, Optimizer)), None)
    if inside is not None:
        raise TypeError(
            f"optimizer {name} wraps another one, and what its own step() does besides cannot be differentiated; give "
            f"the {type(own[inside]).__name__} inside (here optimizer.{inside}) and step the wrapper as before; "
            "for SAM see the documentation"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}")
    known = _torch_class(optimizer)
    if known is None or "differentiable" not in inspect.signature(known).parameters:
        raise TypeError(
            f"optimizer {name} cannot be differentiated: torch.optim has no such class with differentiable=True; use "
            f"{DIFFERENTIABLE}"
        )
    if issubclass(known, torch.optim.Rprop):
        raise TypeError(
            f"optimizer {name} uses only the signs of the gradients, so that no weight of an instance would change its "
            f"update by a little; use {DIFFERENTIABLE}"
        )
    changed = _changed(optimizer, known)
    if changed:
        raise TypeError(
            f"optimizer {name} changes {', '.join(changed)} of torch.optim.{known.__name__}, so that its update is not "
            f"known; use torch.optim.{known.__name__} itself, and change gradients between backward() and step(); "
            "for SAM see the documentation"
        )
    maximizes([optimizer])


def maximizes(optimizers: Iterable[Optimizer]) -> bool:
    """Whether the optimizers go up (``maximize=True``): the loss is then something to be made large.

    Raises:
        ValueError: if some parameter groups, of one or of several optimizers, go up and others down.
    """
    flags = {bool(group.get("maximize", False)) for optimizer in optimizers for group in optimizer.param_groups}
    if len(flags) > 1:
        raise ValueError(
            "maximize is True in some parameter groups of the optimizer and False in others: one loss cannot be made "
            "large and small; give all groups the same maximize"
        )
    return True in flags


def parameters_of(*optimizers: Optimizer) -> list[Any]:
    """The parameters that the optimizers hold, in their order."""
    return [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]


def _torch_class(optimizer: Optimizer) -> type[Optimizer] | None:
    """The class of torch.optim that the optimizer is, or is derived from."""
    for kind in type(optimizer).__mro__:
        if kind is not Optimizer and getattr(torch.optim, kind.__name__, None) is kind:
            return kind
    return None


def _changed(optimizer: Optimizer, known: type[Optimizer]) -> list[str]:
    """The methods of ``known`` that the optimizer's class, or the optimizer itself, has replaced."""
    changed = []
    for name in dir(known):
        if name.startswith(("__", "register_")) or name in UNRELATED:
            continue
        original = _as_written(inspect.getattr_static(known, name))
        found = [inspect.getattr_static(type(optimizer), name)]
        found += [vars(optimizer)[name]] if callable(vars(optimizer).get(name)) else []
        if any(_as_written(each) is not original for each in found):
            changed.append(name)
    return changed


def _as_written(method: Any) -> Any:
    """A method without what PyTorch has put around it."""
    while True:
        method = getattr(method, "__func__", method)
        if getattr(method, "__globals__", {}).get("__name__") not in PYTORCH_WRAPS_IN:
            return method
        if not hasattr(method, "__wrapped__"):
            return method
        method = method.__wrapped__


def refuse_sparse(gradients: Iterable[Tensor | None]) -> None:
    """Raise TypeError for sparse gradients."""
    if any(gradient is not None and gradient.layout is not torch.strided for gradient in gradients):
        raise TypeError("gradients are sparse and cannot be differentiated through; use sparse=False in embeddings")


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` has told a fused optimizer that its gradients overflowed: its step will do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscaled(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients that the optimizer will use: a fused one takes a ``GradScaler``'s factor out in its own step."""
    scale = getattr(optimizer, "grad_scale", None)
    return [g if g is None or scale is None else g / scale.to(g.device) for g in gradients]


class Update:
    """The next update of one or several optimizers, taken on copies.

    The optimizers are read and never changed: the parameters, their states and the options of the groups are copied,
    and each optimizer's own ``step`` runs on the copies, without hooks. Its derivative is known in closed form
    (:mod:`torch_molere.hypergradients.jacobians`), or comes from autograd through that step with
    ``differentiable=True``.

    Args:
        optimizers: any that :func:`check_differentiable` accepts, without wrappers. None of them, and no parameter,
            may change between the construction and the last call of :meth:`look_ahead` or :meth:`vjp`.
        parameters: the parameters to look at, each held by exactly one of ``optimizers``.
        gradients: one for each parameter, of its shape, or None where the loss does not reach it (the optimizer skips
            it then). They are used as they are: see :func:`unscaled`.

    Raises:
        ValueError: if a parameter is held by none or by several of the optimizers.
        TypeError: for sparse gradients.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        holders = Counter(p for optimizer in optimizers for p in set(parameters_of(optimizer)))
        for place, parameter in enumerate(parameters):
            if holders[parameter] != 1:
                raise ValueError(
                    f"parameters[{place}] of shape {tuple(parameter.shape)} is held by {holders[parameter]} of the "
                    f"{len(optimizers)} optimizers; each parameter must be in exactly one of them"
                )
        refuse_sparse(gradients)
        self._optimizers = list(optimizers)
        self._parameters = list(parameters)
        self._gradients = {p: g.detach() for p, g in zip(parameters, gradients, strict=True) if g is not None}

    def look_ahead(self) -> list[Tensor]:
        """θ⁺, detached, one tensor for each parameter: bit for bit what the steps will make of them."""
        after = {parameter: parameter.detach().clone() for parameter in self._parameters}
        for optimizer, portion in self._portions():
            own = {parameter: after[parameter] for parameter in portion}
            _step_on_copies(optimizer, own, self._gradients, differentiable=False)
        return list(after.values())

    def vjp(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """``u = (∂U/∂g)ᵀ v``, one tensor for each parameter, for one cotangent v of θ⁺ each (None stands for zero).

        Where the update has no finite derivative (Adam at a gradient and a second moment of exactly zero, as in the
        weights of a dead unit) u is zero: there the gradients it would be multiplied with are zero too.
        """
        pairs = zip(self._parameters, cotangents, strict=True)
        v = {p: each for p, each in pairs if each is not None and p in self._gradients}
        found: dict[Tensor, Tensor] = {}
        for optimizer, portion in self._portions():
            own = {parameter: v[parameter] for parameter in portion if parameter in v}
            gradients = {parameter: self._gradients[parameter] for parameter in own}
            if has_closed_form(optimizer):
                found |= {p: own[p] * diagonal for p, diagonal in diagonals(optimizer, gradients).items()}
            elif own:
                found |= _vjp_by_autograd(optimizer, gradients, own)
        return [found[p] if p in found else torch.zeros_like(p) for p in self._parameters]

    def _portions(self) -> Iterator[tuple[Optimizer, list[Tensor]]]:
        """All parameters, some of one optimizer at a time, so that few copies of states are held at once."""
        most = max(PORTION, sum(parameter.numel() for parameter in self._parameters) // 16)
        known = set(self._parameters)
        for optimizer in self._optimizers:
            portion: list[Tensor] = []
            elements = 0
            for parameter in (p for p in parameters_of(optimizer) if p in known):
                if portion and elements + parameter.numel() > most:
                    yield optimizer, portion
                    portion, elements = [], 0
                portion.append(parameter)
                elements += parameter.numel()
            if portion:
                yield optimizer, portion


def _vjp_by_autograd(
    optimizer: Optimizer, gradients: Mapping[Tensor, Tensor], cotangents: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    after = {parameter: parameter.detach().clone() for parameter in gradients}
    leaves = {parameter: gradient.detach().requires_grad_() for parameter, gradient in gradients.items()}
    _step_on_copies(optimizer, after, leaves, differentiable=True)
    moved = [parameter for parameter in after if after[parameter].requires_grad]
    if not moved:
        return {}
    outputs, v = [after[parameter] for parameter in moved], [cotangents[parameter] for parameter in moved]
    u = torch.autograd.grad(outputs, [leaves[parameter] for parameter in moved], v, materialize_grads=True)
    finite = (torch.where(a.isfinite() | ~b.isfinite(), a, 0.0) for a, b in zip(u, v, strict=True))
    return dict(zip(moved, finite, strict=True))


def _step_on_copies(
    optimizer: Optimizer, values: Mapping[Tensor, Tensor], gradients: Mapping[Tensor, Tensor], differentiable: bool
) -> None:
    """Take the optimizer's step on ``values``, which stand for its parameters, and on copies of its state.

    With ``differentiable`` the values get a graph that leads to the gradients.
    """
    options = {"differentiable": True, "foreach": False, "fused": False} if differentiable else {}
    groups, state = [], {}
    for group in optimizer.param_groups:
        own = [parameter for parameter in group["params"] if parameter in values and parameter in gradients]
        for parameter in own:
            values[parameter].grad = gradients[parameter]
            if optimizer.state.get(parameter):
                state[values[parameter]] = _copied(optimizer.state[parameter], differentiable)
        if own:
            groups.append({**group, "params": [values[parameter] for parameter in own], **options})
    twin = type(optimizer).__new__(type(optimizer))
    defaults = {**optimizer.defaults, "differentiable": differentiable}
    twin.__setstate__({"defaults": defaults, "param_groups": groups, "state": defaultdict(dict, state)})
    twin._warned_capturable_if_run_uncaptured = True  # the optimizer itself says so, once
    with torch.set_grad_enabled(differentiable):
        if differentiable and isinstance(twin, torch.optim.SGD):
            _start_momentum(twin)
        _as_written(type(twin).step)(twin)  # without hooks, which are not meant for the copies
    for value in values.values():
        value.grad = None


def _start_momentum(twin: torch.optim.SGD) -> None:
    """Give SGD the momentum buffers that its first step would make from a detached gradient.

    The first buffer is the gradient itself, with no dampening τ: μ·(τ/μ)·g + (1 − τ)·g = g.
    """
    for group in twin.param_groups:
        if not group["momentum"]:
            continue
        for parameter in group["params"]:
            if twin.state[parameter].get("momentum_buffer") is not None:
                continue
            gradient = -parameter.grad if group["maximize"] else parameter.grad
            gradient = gradient.add(parameter.detach(), alpha=group["weight_decay"])
            twin.state[parameter]["momentum_buffer"] = gradient * (group["dampening"] / group["momentum"])


def _copied(state: Mapping[str, Any], differentiable: bool) -> dict[str, Any]:
    # The differentiable path computes bias corrections from the step tensor itself, the plain one from a Python
    # float: a float64 step makes them equal. It must be a copy also where the step is float64 already.
    return {
        name: value.detach().to(torch.float64 if name == "step" and differentiable else value.dtype, copy=True)
        if isinstance(value, Tensor)
        else value
        for name, value in state.items()
    }

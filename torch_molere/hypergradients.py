r"""Hypergradients: how the validation loss after the next update changes with each training instance's weight.

With :math:`L(θ; w) = \frac1n \sum_i w_i ℓ_i(θ)`, :math:`θ⁺ = U(θ, ∇_θ L(θ; w))` and
:math:`u = (∂U/∂g)^\top ∇_θ L_{val}(θ⁺)`,

.. math:: \frac{∂ L_{val}(θ⁺)}{∂ w_i} = \frac1n ⟨u, ∇_θ ℓ_i(θ)⟩,

the meta-gradient of MOLERE (Jain, Suggala and Shenoy, CVPR 2024) and Meta-Weight-Net for any elementwise optimizer U.
The n inner products are one directional derivative of the vector of losses along u.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import higher
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from torch_molere.distributed import averaged, gathered, processes
from torch_molere.evaluation import (
    Arguments,
    LossFn,
    RandomState,
    arguments_of,
    batch_size,
    buffer_copies,
    cross_entropy,
    detached,
    device_of,
    evaluate,
    map_tensors,
    own_forward,
    per_sample_losses,
    preserved_randomness,
)
from torch_molere.layout import ChannelsLast, channels_last
from torch_molere.sharded import any_sharded, full, is_sharded, standing_in
from torch_molere.update import Update, check_differentiable

Engine = Literal["auto", "forward", "finite", "unrolled"]
ENGINES: tuple[Engine, ...] = ("auto", "forward", "finite", "unrolled")

_FORWARD_AD = threading.RLock()
"""PyTorch's forward-mode levels are those of the process: one thread at a time."""

_LAYOUTS: WeakKeyDictionary[nn.Module, ChannelsLast] = WeakKeyDictionary()
"""What was found out about the models that :func:`hypergradient` was called with."""


@dataclass(frozen=True)
class TrainingForward:
    """A forward of the training batch that can be repeated at other parameters exactly as it ran.

    Dropout masks come from the same random state, and buffers (batch-norm statistics, spectral-norm vectors) start
    from the values they had before it. In channels-last order the values are the same but for rounding.
    """

    model: nn.Module
    loss_fn: LossFn
    arguments: Arguments
    targets: Any
    random_state: RandomState
    buffers: dict[str, Tensor]
    in_channels_last: bool = False

    def losses(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """``(B,)`` losses with ``parameters`` (by name) in place of the model's, in the parameters' own precision."""
        device, arguments = self.random_state.device, self.arguments
        if self.in_channels_last:
            arguments, parameters = channels_last(arguments), channels_last(dict(parameters))
        with preserved_randomness(device, self.random_state), torch.autocast(device.type, enabled=False):
            outputs = evaluate(self.model, arguments, parameters, self.buffers)
            return per_sample_losses(self.loss_fn, outputs, self.targets)

    def of_first(self, count: int) -> TrainingForward:
        """The same forward of the first ``count`` instances alone."""
        size = batch_size(self.targets)

        def first(tensor: Tensor) -> Tensor:
            return tensor[:count] if tensor.ndim and len(tensor) == size else tensor

        return replace(self, arguments=map_tensors(first, self.arguments), targets=map_tensors(first, self.targets))


def forward_mode(forward: TrainingForward, parameters: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    """⟨u, ∇ℓ_i(θ)⟩ by one pass of forward-mode differentiation: exact, no second-order graph.

    Attention runs on PyTorch's MATH kernel, the one that has a forward-mode rule.

    Raises:
        NotImplementedError: if an operation of the model has no forward-mode rule, or the model is sharded by FSDP2.
    """
    if any_sharded(parameters.values()):
        raise NotImplementedError("FSDP2 gathers the values of its own parameters, without their derivatives")
    with _FORWARD_AD, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch scripts its own forward-mode rules at the first use, and warns of its own deprecation.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        tangents: Tensor = torch.func.jvp(forward.losses, (parameters,), (direction,))[1]
    return tangents.detach()


def finite_difference(
    forward: TrainingForward,
    parameters: dict[str, Tensor],
    direction: dict[str, Tensor],
    losses: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """⟨u, ∇ℓ_i(θ)⟩ as (ℓ_i(θ + εu) − ℓ_i(θ)) / ε: one plain forward when ``losses`` = ℓ(θ) is known, else two.

    ε‖u‖ is ``scale`` times 1e-3 in single precision (the middle of the range found best) and 1e-6 in double precision,
    where truncation and rounding balance.

    Raises:
        TypeError: if the parameters have less than single precision, in which no step is both small and visible.
    """
    norm = full(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(direction.values())))))
    precision = min((u.dtype for u in direction.values()), key=lambda dtype: torch.finfo(dtype).bits)
    if torch.finfo(precision).bits < 32:
        raise TypeError(f"the finite engine needs float32 or float64 parameters, got {precision}; use engine='forward'")
    radius = scale * (1e-6 if precision == torch.float64 else 1e-3)
    # A zero direction has a zero derivative; the clamp keeps 0/0 out without asking the device for the value.
    step = radius / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    shifted = {name: torch.addcmul(parameters[name], direction[name], step) for name in parameters}
    with torch.no_grad():
        if losses is None:
            losses = forward.losses(parameters)
        return (forward.losses(shifted) - losses) * (norm / radius)


@dataclass(frozen=True)
class ValidationGradient:
    """A validation batch at θ⁺: its losses, what φ is to make small and its gradient (None where it does not reach),
    and the outputs.

    Where several processes train together, mean and gradient are of all their batches.
    """

    losses: Tensor
    mean: Tensor
    gradients: list[Tensor | None]
    outputs: Any


def validation_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Arguments, Any],
    parameters: Mapping[str, Tensor],
    seed: int | None = None,
    together: bool = True,
    splitter_loss_fn: LossFn | None = None,
    in_channels_last: bool = False,
) -> ValidationGradient:
    """Mean validation loss at ``parameters`` and its gradient, leaving model and random streams untouched.

    Args:
        model: the classifier.
        loss_fn: what the mean and its gradient are of, by instance.
        batch: the validation batch of this process.
        parameters: by name.
        seed: of the forward's random numbers; None goes on with the global ones.
        together: average over the batches of all processes.
        splitter_loss_fn: what the losses returned are; default ``loss_fn``.
        in_channels_last: run in channels-last order.
    """
    (positional, named), targets = batch
    with torch.enable_grad(), preserved_randomness(device_of(model), seed):
        if is_sharded(model):
            with standing_in(model, parameters, dict(model.named_buffers())) as own, own_forward(model):
                outputs = model(*positional, **named)
                losses = per_sample_losses(loss_fn, outputs, targets)
                everyone, _ = gathered(losses.detach())
                # FSDP2's own reduction is the mean over the processes.
                (losses.sum() * (processes() / len(everyone))).backward()
                gradients = [own[name].grad for name in parameters]
        else:
            arguments = batch[0]
            if in_channels_last:
                arguments, parameters = channels_last(arguments), channels_last(dict(parameters))
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
            outputs = evaluate(model, arguments, leaves, dict(model.named_buffers()))
            losses = per_sample_losses(loss_fn, outputs, targets)
            gradients = list(torch.autograd.grad(losses.mean(), list(leaves.values()), allow_unused=True))
            everyone = losses.detach()
            if together:
                everyone, _ = gathered(everyone)
                gradients = averaged(gradients, len(losses) / len(everyone))
    if splitter_loss_fn is not None and splitter_loss_fn is not loss_fn:
        with torch.no_grad():
            losses = per_sample_losses(splitter_loss_fn, outputs, targets)
    return ValidationGradient(losses.detach(), everyone.mean(), gradients, detached(outputs))


def hypergradient(
    model: nn.Module,
    optimizer: Optimizer,
    train_batch: tuple[Any, Any],
    validation_batch: tuple[Any, Any],
    weights: Tensor,
    *,
    loss_fn: LossFn | None = None,
    engine: Engine = "auto",
    steps: int = 1,
) -> Tensor:
    """``∂ L_val(θ⁺) / ∂ weights``, where θ⁺ follows the optimizer's next update on ``mean(weights * losses)``.

    Neither model nor optimizer is changed: parameters, buffers, ``.grad``, optimizer state, random streams and modes
    are as before. The validation loss is taken in the mode the model is in.

    Args:
        model: the classifier, at its present parameters.
        optimizer: the optimizer of ``model``, at its present state, any of ``torch.optim`` with a ``differentiable``
            flag. Parameters that it does not hold, or that need no gradient, stay constant.
        train_batch: ``(inputs, targets)`` of B instances.
        validation_batch: ``(inputs, targets)``.
        weights: ``(B,)`` floating.
        loss_fn: ``loss_fn(outputs, targets) -> (B,)``; default cross-entropy.
        engine: ``"forward"`` (exact; :func:`torch.func.jvp`), ``"finite"`` (a finite difference of the training
            losses), ``"unrolled"`` (``higher``, second-order graph; only for optimizers that ``higher`` has), or
            ``"auto"``: forward where the model's operations have forward-mode rules, else finite.
        steps: how many updates to look ahead, all on ``train_batch``; more than one needs ``engine="unrolled"``.

    Returns:
        ``(B,)`` of the dtype of ``weights``, detached.

    Where several processes train together, this is of the calling one's batches alone.

    Raises:
        TypeError: for an optimizer that cannot be differentiated, or a model sharded by FSDP2.
        ValueError: for an argument out of its range, or an optimizer that holds none of the model's parameters.
    """
    if is_sharded(model):
        raise TypeError("model is sharded by FSDP2, whose parameters only training gathers; use MetaReweighter")
    loss_fn = cross_entropy if loss_fn is None else loss_fn
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if steps > 1 and engine != "unrolled":
        raise ValueError(f"steps={steps} needs engine='unrolled', got engine={engine!r}")
    inputs, targets = train_batch
    size = batch_size(targets)
    if weights.shape != (size,) or not weights.is_floating_point():
        raise ValueError(f"weights must be floating ({size},), got {tuple(weights.shape)} of {weights.dtype}")
    parameters = trained_parameters(model, optimizer)
    validation = (arguments_of(validation_batch[0]), validation_batch[1])
    random_state = RandomState.now(device_of(model))
    forward = TrainingForward(model, loss_fn, arguments_of(inputs), targets, random_state, buffer_copies(model))
    if engine == "unrolled":
        return unrolled(forward, optimizer, validation, weights, steps=steps)
    check_differentiable(optimizer)
    names = list(parameters)
    before = {name: parameter.detach() for name, parameter in parameters.items()}
    layout = _LAYOUTS.setdefault(model, ChannelsLast())
    in_channels_last = layout.serves(model, loss_fn, (forward.arguments, targets), before, random_state)
    forward = replace(forward, in_channels_last=in_channels_last)
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    with torch.enable_grad():
        losses = forward.losses(leaves)
        loss = (weights.detach() * losses).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    update = Update(optimizer, list(parameters.values()), gradients)
    after = dict(zip(names, update.look_ahead(), strict=True))
    cotangents = validation_gradient(
        model, loss_fn, validation, after, together=False, in_channels_last=in_channels_last
    ).gradients
    del after  # its memory serves what follows
    direction = dict(zip(names, update.transpose(cotangents), strict=True))
    derivative: Tensor
    if engine == "finite":
        derivative = finite_difference(forward, before, direction, losses.detach())
    elif engine == "forward":
        derivative = forward_mode(forward, before, direction)
    else:
        try:
            derivative = forward_mode(forward, before, direction)
        except (NotImplementedError, RuntimeError):
            derivative = finite_difference(forward, before, direction, losses.detach())
    return (derivative / size).to(weights.dtype)


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The model's parameters that the optimizer updates, by name (tied ones once).

    Raises:
        ValueError: if there are none.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad and p in held}
    if not found:
        raise ValueError("optimizer holds none of the model's trainable parameters; build it from model.parameters()")
    return found


def unrolled(
    forward: TrainingForward,
    optimizer: Optimizer,
    validation: tuple[Arguments, Any],
    weights: Tensor,
    *,
    steps: int = 1,
    seed: int | None = None,
    val_loss_fn: LossFn | None = None,
) -> Tensor:
    """The reference engine: ``higher`` unrolls the updates on ``mean(weights * losses)`` and differentiates them.

    Args:
        forward: the training batch.
        optimizer: at its present state, of a kind that ``higher`` has.
        validation: the validation batch.
        weights: ``(B,)``.
        steps: how many updates, all on the training batch.
        seed: of the validation forward's random numbers; None goes on with those of training.
        val_loss_fn: what validation is measured by; default as in training.

    Raises:
        TypeError: if ``higher`` does not have the optimizer.
        ValueError: if the optimizer uses an option that ``higher`` would ignore.
    """
    check_unrollable(optimizer)
    w = weights.detach().clone().requires_grad_()
    (positional, named), targets = forward.arguments, forward.targets
    device = forward.random_state.device
    with (
        torch.enable_grad(),
        warnings.catch_warnings(),
        preserved_randomness(device, forward.random_state),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),  # the attention kernel that can be differentiated twice
    ):
        warnings.simplefilter("ignore")  # higher's own deprecation warnings
        with higher.innerloop_ctx(forward.model, optimizer, copy_initial_weights=True) as (functional, inner):
            for _ in range(steps):
                losses = per_sample_losses(forward.loss_fn, functional(*positional, **named), targets)
                inner.step((w * losses).mean())
            positional, named = validation[0]
            with preserved_randomness(device, seed):
                outputs = functional(*positional, **named)
                losses = per_sample_losses(val_loss_fn or forward.loss_fn, outputs, validation[1])
            (gradient,) = torch.autograd.grad(losses.mean(), w, allow_unused=True)
    return torch.zeros_like(w) if gradient is None else gradient.detach()


# Options that higher 0.2.1 reads; it silently ignores any other.
_HIGHER_OPTIONS: dict[type[Optimizer], frozenset[str]] = {
    torch.optim.SGD: frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"}),
    torch.optim.Adam: frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"}),
    torch.optim.RMSprop: frozenset({"lr", "alpha", "eps", "weight_decay", "momentum", "centered"}),
    torch.optim.Adagrad: frozenset({"lr", "lr_decay", "weight_decay", "eps", "initial_accumulator_value"}),
    torch.optim.Adadelta: frozenset({"lr", "rho", "eps", "weight_decay"}),
    torch.optim.Adamax: frozenset({"lr", "betas", "eps", "weight_decay"}),
}
_IMPLEMENTATION_OPTIONS = frozenset({"params", "foreach", "fused", "differentiable", "capturable", "initial_lr"})


def check_unrollable(optimizer: Optimizer) -> None:
    """Refuse what ``higher`` does not have, or would silently compute otherwise."""
    options = _HIGHER_OPTIONS.get(type(optimizer))
    if options is None:
        raise TypeError(
            f"engine='unrolled' has no {type(optimizer).__name__}: higher covers "
            f"{', '.join(kind.__name__ for kind in _HIGHER_OPTIONS)}; use engine='forward'"
        )
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in options | _IMPLEMENTATION_OPTIONS and value not in (False, None, 0):
                raise ValueError(f"engine='unrolled' would ignore {name}={value!r} of the optimizer; use 'forward'")

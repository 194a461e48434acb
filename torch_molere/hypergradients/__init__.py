"""Hypergradients: engines, the update they look through, and the check that finds the right one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_molere.calls import arguments_of, device_of
from torch_molere.distributed import fsdp
from torch_molere.hypergradients.check import agreement, derivative, examine, refusal
from torch_molere.hypergradients.engines import Engine, unrolled
from torch_molere.hypergradients.functional import Call, Replay
from torch_molere.hypergradients.meta_gradient import check_weights_shape, meta_gradient, validate
from torch_molere.hypergradients.update import check_differentiable, differentiable_optimizer, parameters_of
from torch_molere.losses import LossFn, PerSampleLoss

ENGINES: tuple[Engine, ...] = ("auto", "finite", "forward", "reverse", "unrolled")


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

    Neither model nor optimizer is changed: parameters, buffers, attributes, ``.grad``, optimizer state, random streams
    and modes are as before. The validation loss is taken in the mode the model is in.

    Args:
        model: the classifier, at its present parameters.
        optimizer: the optimizer of ``model``, at its present state, any of ``torch.optim`` with a ``differentiable``
            flag. Parameters that it does not hold, or that need no gradient, stay constant.
        train_batch: ``(inputs, targets)`` of B instances.
        validation_batch: ``(inputs, targets)``.
        weights: ``(B,)`` floating.
        loss_fn: a function ``(outputs, targets) -> (B,)`` or a ``torch.nn`` loss; default cross-entropy.
        engine: ``"forward"`` (exact; :func:`torch.func.jvp`), ``"finite"`` (a finite difference of the training
            losses), ``"reverse"`` (exact; backward differentiated once more), ``"unrolled"`` (``higher``, only for
            optimizers that it has), or ``"auto"``: the first of finite, forward and reverse that agrees with reverse
            mode.
        steps: how many updates to look ahead, all on ``train_batch``; more than one needs ``engine="unrolled"``.

    Returns:
        ``(B,)`` of the dtype of ``weights``, detached. Where several ranks train together, this is of the calling
        one's batches alone.

    Raises:
        TypeError: for an optimizer that cannot be differentiated, or a model sharded by FSDP2.
        ValueError: for an argument out of its range, or an optimizer that holds none of the model's parameters.
        RuntimeError: if no engine that may be used agrees with the model's own backward along the meta-gradient
            (``"unrolled"`` is not checked: it differentiates backward itself).
    """
    if fsdp.is_sharded(model):
        raise TypeError("model is sharded by FSDP2, whose parameters only training gathers; use MetaReweighter")
    criterion = loss_fn if isinstance(loss_fn, PerSampleLoss) else PerSampleLoss(loss_fn)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if steps > 1 and engine != "unrolled":
        raise ValueError(f"steps={steps} needs engine='unrolled', got engine={engine!r}")
    inputs, targets = train_batch
    size = check_weights_shape(weights, targets)
    optimizer = differentiable_optimizer(optimizer)
    owners = trained_parameters([optimizer], (model, *criterion.modules))
    device = device_of(model)
    validation = (arguments_of(validation_batch[0]), validation_batch[1])
    call = Call(model, device, arguments_of(inputs), (model, *criterion.modules))
    assert call.random is not None
    seed = int(call.random.cpu.to(torch.int64).sum())  # of the random streams as they are
    replay = Replay(model, criterion, call, lambda outputs: outputs, targets, owners, call.autocast)
    if engine == "unrolled":
        return unrolled(replay, optimizer, validation, weights, criterion, seed, steps=steps)
    check_differentiable(optimizer)
    values = [owner.detach() for owner in owners]
    own_weights = (weights.detach() / size).to(values[0].dtype)
    with torch.enable_grad():
        # With the parameters themselves, wherever the model has them.
        losses = replay.losses(owners, as_called=True)
    found, gradients = examine(engine, replay, values, losses, own_weights, together=False)
    _, direction = meta_gradient(
        [optimizer],
        owners,
        gradients,
        lambda after: validate(model, criterion, criterion, validation, owners, after, seed, together=False),
    )
    while True:
        result = derivative(found, replay, values, direction, losses.detach())
        reduced = call.autocast.enabled
        distance, right = agreement(found.engine, own_weights, result, direction, gradients, reduced=reduced)
        if right:
            return (result / size).to(weights.dtype)
        if engine != "auto" or found.engine == "reverse":
            raise RuntimeError(refusal(engine, [f"{found.engine!r} is {distance:.2g} off along the meta-gradient"]))
        found, _ = examine(engine, replay, values, losses, own_weights, only_reverse=True, together=False)


def trained_parameters(optimizers: list[Optimizer], modules: tuple[nn.Module, ...]) -> list[nn.Parameter]:
    """The parameters of the modules that the optimizers update, each once.

    Raises:
        ValueError: if there are none.
    """
    held = {id(parameter) for parameter in parameters_of(*optimizers)}
    of_modules = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    found = [parameter for number, parameter in of_modules.items() if number in held]
    if not found:
        raise ValueError("optimizer holds none of the model's trainable parameters; build it from model.parameters()")
    return found


__all__ = ["ENGINES", "Engine", "hypergradient", "trained_parameters"]

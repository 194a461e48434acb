"""Models whose parameters FSDP2 (``fully_shard``) has split over the processes.

Its hooks gather the model's own parameters at each forward, so other ones cannot be passed in their place as
:func:`torch.func.functional_call` does: they are written where the own ones are, and those put back bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors is a ``DTensor``."""
    # Whoever made one has imported its module; importing it here would cost every user a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model, or a part of it."""
    return any_sharded(model.parameters())


def full(tensor: Tensor) -> Tensor:
    """The full value of a ``DTensor``, in every process; any other tensor itself."""
    if not any_sharded([tensor]):
        return tensor
    value: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return value


def check_sharded(model: nn.Module, engine: str, order: str) -> None:
    """Refuse what cannot be right for a model whose parameters only its own hooks can gather.

    Raises:
        TypeError: for FSDP1, or FSDP2's reduced-precision parameters.
        ValueError: for an engine or order that needs other parameters in a differentiated forward.
    """
    first = sys.modules.get("torch.distributed.fsdp")
    if first is not None and any(isinstance(module, first.FullyShardedDataParallel) for module in model.modules()):
        raise TypeError("model is wrapped by FullyShardedDataParallel; shard it with fully_shard (FSDP2) instead")
    if not is_sharded(model):
        return
    if engine not in ("auto", "finite"):
        raise ValueError(f"hypergradient={engine!r} cannot serve a model sharded by FSDP2; use 'finite' or 'auto'")
    if order != "after":
        raise ValueError(f"order={order!r} cannot serve a model sharded by FSDP2; use 'after'")
    for state in _states(model):
        if state._mp_policy.param_dtype not in (None, torch.float32, torch.float64):
            raise TypeError(
                f"model is sharded with MixedPrecisionPolicy(param_dtype={state._mp_policy.param_dtype}), in which a "
                "finite difference of its losses is lost in rounding; keep param_dtype=None and use torch.autocast"
            )


def check_synchronised(model: nn.Module) -> None:
    """Refuse gradients that FSDP2 keeps back: they are not where the look-ahead reads them.

    Raises:
        RuntimeError: while ``set_requires_gradient_sync(False)`` holds.
    """
    if not is_sharded(model):
        return
    for state in _states(model):
        if any(not group.reduce_grads for group in _groups(state)):
            raise RuntimeError(
                "a model under set_requires_gradient_sync(False) keeps its gradients back; "
                "accumulate with the synchronisation on"
            )


@contextmanager
def standing_in(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Iterator[dict[str, nn.Parameter]]:
    """A sharded model with other values of parameters and buffers (by name) for a while.

    Yields:
        Its own sharded parameters, by name: a backward inside leaves the gradients there.
    """
    _reshard(model)
    own = dict(model.named_parameters())
    held: dict[str, Tensor] = {name: own[name] for name in parameters} | dict(model.named_buffers())
    kept = {name: tensor.detach().clone() for name, tensor in held.items()}
    gradients = {name: parameter.grad for name, parameter in own.items()}
    try:
        for parameter in own.values():
            parameter.grad = None
        _write(held, {**parameters, **buffers})
        yield own
    finally:
        _reshard(model)  # what the root module gathered would else be taken for the next forward
        _write(held, kept)
        for name, parameter in own.items():
            parameter.grad = gradients[name]


def _write(to: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in to.items():
            tensor.copy_(values[name])


def _reshard(model: nn.Module) -> None:
    for module in _wrapped(model):
        module.reshard()


def _wrapped(model: nn.Module) -> Iterator[Any]:
    """The parts of a model that FSDP2 wraps."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = () if module is None else module.FSDPModule
    return (part for part in model.modules() if isinstance(part, kind))


def _states(model: nn.Module) -> Iterator[Any]:
    """FSDP2's state of each module that it wraps; PyTorch has no public way to read its options."""
    return (module._get_fsdp_state() for module in _wrapped(model))


def _groups(state: Any) -> list[Any]:
    """The parameter groups of a state; PyTorch has renamed them."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in [state._fsdp_param_group] if group is not None]

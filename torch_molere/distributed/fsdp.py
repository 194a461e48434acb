"""Models whose parameters FSDP2 (``fully_shard``) has split over the ranks.

Its hooks gather the model's own parameters at each forward, so other ones cannot stand in their place: they are written
where the own ones are, and those are put back bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
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
    """The full value of a ``DTensor``, in every rank; any other tensor itself."""
    if not any_sharded([tensor]):
        return tensor
    value: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return value


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a ``DTensor``; any other tensor itself."""
    return tensor.to_local() if any_sharded([tensor]) else tensor  # type: ignore[attr-defined]


def check_sharded(model: nn.Module, engine: str, order: str) -> None:
    """Refuse what cannot be right for a model whose parameters only its own hooks can gather.

    Raises:
        TypeError: for FSDP1, or FSDP2's reduced-precision parameters.
        ValueError: for an engine or order that needs other parameters in a differentiated forward, or parameters that
            stay gathered after the forward.
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
    for state in _states(model):
        if any(not group.reduce_grads for group in _groups(state)):
            raise RuntimeError(
                "a model under set_requires_gradient_sync(False) keeps its gradients back; "
                "accumulate with the synchronisation on"
            )


@contextmanager
def standing_in(model: nn.Module, owners: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """A sharded model with other values of its parameters ``owners`` for a while.

    A backward inside leaves its gradients in the parameters' ``.grad``, which are put back afterwards.
    """
    _reshard(model)
    kept = [owner.detach().clone() for owner in owners]
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        _write(owners, values)
        yield
    finally:
        _reshard(model)  # what the root module gathered would else be taken for the next forward
        _write(owners, kept)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _write(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(to, values, strict=True):
            tensor.copy_(value)


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

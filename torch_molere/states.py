"""What a network may learn from and a state to be loaded must look like: checked before anything takes it over."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def whole(value: Any, name: str, least: int | None = 0) -> int:
    """``value``, an integer that is at least ``least``.

    Raises:
        ValueError: if it is none; names it.
    """
    if type(value) is not int or (least is not None and value < least):
        raise ValueError(f"{name} must be an integer{'' if least is None else f' ≥ {least}'}, got {value!r}")
    return value


def finite_gradients(network: nn.Module) -> bool:
    """Whether no gradient of ``network`` holds NaN or infinity, asked of the device once."""
    sums = [parameter.grad.sum() for parameter in network.parameters() if parameter.grad is not None]
    return not sums or bool(torch.isfinite(torch.stack([s.double() for s in sums])).all())


def load_optimizer(optimizer: Optimizer | None, state: Any) -> None:
    """Load ``state``, of which nothing is shared with ``optimizer`` afterwards, if a next step could start from it.

    PyTorch's own loading takes state of any shape and stumbles over it later.

    Args:
        optimizer: or None where there is nothing to learn, whose state is None.

    Raises:
        ValueError, or what a step of the optimizer raises: if the state does not fit. Nothing has changed then.
    """
    if optimizer is None or state is None:
        if optimizer is not None or state is not None:
            raise ValueError(
                f"optimizer's state must be {'None' if optimizer is None else 'a dict'}, got {state!r:.60}"
            )
        return
    state = copy.deepcopy(state)
    if "differentiable" in optimizer.defaults or isinstance(optimizer, torch.optim.SparseAdam):
        _try(copy.deepcopy(optimizer), copy.deepcopy(state))
    optimizer.load_state_dict(state)


def _try(twin: Optimizer, state: Any) -> None:
    twin.load_state_dict(state)
    for owner in twin.state:
        if not isinstance(owner, Tensor):
            raise ValueError(f"optimizer's state must be by parameter, got {owner!r:.60}")
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = _no_gradient(parameter, sparse=isinstance(twin, torch.optim.SparseAdam))
            for name, value in twin.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape not in (parameter.shape, torch.Size(())):
                    raise ValueError(f"optimizer's {name} must be {tuple(parameter.shape)}, got {tuple(value.shape)}")
    twin.step()


def _no_gradient(parameter: Tensor, sparse: bool) -> Tensor:
    if not sparse:
        return torch.zeros_like(parameter)
    first = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
    return torch.sparse_coo_tensor(first, torch.zeros_like(parameter[:1]), parameter.shape, check_invariants=False)

"""The arguments that people give, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_molere.hypergradients.update import parameters_of


def parts_of(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and indices of a batch; None where it has no indices."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise TypeError(
            "batch must be (inputs, targets) or (inputs, targets, indices), got "
            + (f"{len(batch)} elements" if isinstance(batch, (tuple, list)) else type(batch).__name__)
        )
    inputs, targets, *rest = batch
    return inputs, targets, rest[0] if rest else None


def check_model(model: Any, weighting: Any) -> None:
    """Refuse what can never work."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if weighting is not None and not isinstance(weighting, nn.Module):
        raise TypeError(f"weighting must be a torch.nn.Module, got {type(weighting).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            "model is, or has, a traced or scripted module, whose parameters cannot be replaced; give the module itself"
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise TypeError(f"model.{name} has sparse gradients, which cannot be differentiated; use sparse=False")


def check_apart(optimizers: Sequence[Optimizer]) -> None:
    """Refuse parameters that several optimizers hold."""
    held = [set(parameters_of(optimizer)) for optimizer in optimizers]
    if sum(map(len, held)) > len(set().union(*held)):
        raise ValueError("several optimizers hold the same parameters; each parameter must be in exactly one of them")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int) -> int:
    """``value``, an integer that is at least ``least``; else a ValueError that names it."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r:.60}")
    return value

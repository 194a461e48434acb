"""The arguments that people give, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_molere.hypergradients import Engine
from torch_molere.hypergradients.update import check_differentiable, differentiable_optimizer, parameters_of
from torch_molere.weighting import OnlineWeighting

STEP_ENGINES: tuple[Engine, ...] = ("auto", "finite", "forward", "reverse")


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


def check_settings(
    weighting: Any,
    weighting_lr: Any,
    every: Any,
    warmup_steps: Any,
    hypergradient: Any,
    order: Any,
    max_weight: Any,
    correct_fn: Any,
    scaler: Any,
    seed: Any,
) -> None:
    """Refuse arguments of a ``MetaReweighter`` that are out of their range."""
    if correct_fn is not None and not callable(correct_fn):
        raise TypeError(f"correct_fn must be callable, got {type(correct_fn).__name__}")
    if scaler is not None and not hasattr(scaler, "unscale_"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if hypergradient not in STEP_ENGINES:
        raise ValueError(f"hypergradient must be one of {STEP_ENGINES}, got {hypergradient!r}")
    if order not in ("after", "before"):
        raise ValueError(f"order must be 'after' or 'before', got {order!r}")
    if order == "after" and isinstance(weighting, OnlineWeighting) and weighting.meta_decay == 0.0:
        raise ValueError(
            "OnlineWeighting(decay=0) knows the meta-gradients of the present batch alone, which there are only in "
            "order='before'; pass that, or a decay above 0"
        )
    check_count("every", every, 1)
    check_count("warmup_steps", warmup_steps, 0)
    check_count("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"seed must be less than 2**63, got {seed}")
    if max_weight is not None and not (is_number(max_weight) and 1.0 <= max_weight < math.inf):
        raise ValueError(f"max_weight must be at least 1 (the mean weight) or None, got {max_weight!r}")
    if not (is_number(weighting_lr) and 0.0 < weighting_lr < math.inf):
        raise ValueError(f"weighting_lr must be a positive number, got {weighting_lr!r}")


def check_optimizers(given: Sequence[Any]) -> list[Optimizer]:
    """The optimizers inside the wrappers that are seen through; refuses what cannot be differentiated, and parameters
    that several of them hold."""
    optimizers = [differentiable_optimizer(each) for each in given]
    for each in optimizers:
        check_differentiable(each)
    held = [set(parameters_of(optimizer)) for optimizer in optimizers]
    if sum(map(len, held)) > len(set().union(*held)):
        raise ValueError("several optimizers hold the same parameters; each parameter must be in exactly one of them")
    return optimizers


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int) -> int:
    """``value``, an integer that is at least ``least``; else a ValueError that names it."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r:.60}")
    return value

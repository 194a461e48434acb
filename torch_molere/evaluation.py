"""Evaluating a user's model on a batch as the model takes it, without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, targets) -> (B,)``: one loss for each instance."""


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``, ``model(*inputs)`` for a tuple or list, ``model(**inputs)`` for a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def logits_of(outputs: Any) -> Tensor:
    """The tensor a model predicts: its output itself, or the output's ``.logits``."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"outputs must be a tensor or have a tensor .logits, got {type(outputs).__name__}; "
            "pass a loss_fn that reads your outputs"
        )
    return logits


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """The default ``loss_fn``: per-instance cross-entropy of ``(B, C)`` logits and ``(B,)`` class indices."""
    return F.cross_entropy(logits_of(outputs), targets, reduction="none")


def per_sample_losses(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """``loss_fn(outputs, targets)``, checked to be ``(B,)``.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it is a scalar or does not have one loss for each instance.
    """
    losses = loss_fn(outputs, targets)
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a tensor of per-sample losses, got {type(losses).__name__}")
    size = batch_size(targets)
    if losses.shape != (size,):
        advice = "use reduction='none'" if losses.ndim == 0 else "reduce all other dimensions, e.g. .flatten(1).mean(1)"
        raise ValueError(
            f"loss_fn must return one loss for each of the {size} instances, shape ({size},), "
            f"got {tuple(losses.shape)}; {advice}"
        )
    return losses


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tensor, tuple, list or dict (or any nesting of them)."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def batch_size(tree: Any) -> int:
    """The shared first dimension of every tensor in ``tree``.

    Raises:
        ValueError: if there is no tensor, a tensor has no dimension, or their first dimensions differ.
    """
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves(tree)}
    if len(sizes) != 1 or None in sizes:
        found = [tuple(leaf.shape) for leaf in leaves(tree)]
        raise ValueError(f"every tensor of a batch must have the same first dimension, got shapes {found}")
    return int(sizes.pop())  # type: ignore[arg-type]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each tensor in it."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def move(tree: Any, device: torch.device) -> Any:
    """``tree`` with every tensor on ``device``."""
    return map_tensors(lambda leaf: leaf.to(device, non_blocking=True), tree)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@dataclass(frozen=True)
class RandomState:
    """The random streams a forward on one device draws from, as they were when this was taken."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        """Set the streams back to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


@contextmanager
def preserved_randomness(device: torch.device, start: RandomState | int | None = None) -> Iterator[None]:
    """Run a block from ``start`` (a state to replay, or a seed) and leave the user's random streams as they were."""
    before = RandomState.now(device)
    try:
        if isinstance(start, RandomState):
            start.restore()
        elif start is not None:
            torch.default_generator.manual_seed(start)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(start)
        yield
    finally:
        before.restore()


def buffer_copies(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every buffer (batch-norm statistics, spectral-norm vectors, …) by name."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def evaluate(model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
    """The model's outputs with other parameters and buffers (by name) standing in for its own.

    ``buffers`` receive the in-place updates of the forward, so a caller hands in copies to keep the model's own.
    """
    return torch.func.functional_call(_Caller(model), _prefixed({**parameters, **buffers}), (inputs,))


class _Caller(nn.Module):
    """Gives :func:`torch.func.functional_call` one signature for tensor, tuple and dict inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call_model(self.model, inputs)


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}

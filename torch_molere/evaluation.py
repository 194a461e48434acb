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

from torch_molere.sharded import is_sharded, standing_in

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, targets) -> (B,)``: one loss for each instance."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of one call of a model."""


def arguments_of(inputs: Any) -> Arguments:
    """How a model is called with ``inputs``: ``model(inputs)``, ``model(*inputs)`` or ``model(**inputs)``."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def inputs_of(arguments: Arguments) -> Any:
    """The inverse of :func:`arguments_of`, where there is one (else the arguments themselves)."""
    positional, named = arguments
    if positional and named:
        return arguments
    if named:
        return named
    return positional[0] if len(positional) == 1 else positional


def logits_of(outputs: Any) -> Tensor:
    """The tensor a model predicts: its output itself, or the output's ``.logits``.

    Raises:
        TypeError: if there is no such tensor.
    """
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


def expected_error(outputs: Any, targets: Tensor) -> Tensor:
    """``1 − p_target``: how often a class drawn from the classifier's own probabilities would be wrong.

    A bounded loss for validation (``val_loss_fn=``): it follows the error rate, tells sure mistakes from unsure ones no
    more than the error rate does, and tolerates symmetric label noise (Ghosh, Kumar and Sastry, AAAI 2017).

    Args:
        outputs: ``(B, C)`` logits.
        targets: ``(B,)`` class indices.

    Returns:
        ``(B,)`` in [0, 1].
    """
    probabilities = logits_of(outputs).softmax(dim=1)
    return 1.0 - probabilities.gather(1, targets.long().unsqueeze(1)).squeeze(1)


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


def is_by_instance(leaf: Any) -> bool:
    """Whether a leaf of a batch has something for each instance; a tensor without dimensions is of the whole batch."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def batch_size(tree: Any) -> int:
    """The first dimension that every tensor in ``tree`` (those without any aside) shares.

    Raises:
        ValueError: if there is no tensor, or their first dimensions differ.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(tree) if is_by_instance(leaf)]
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"every tensor of a batch must have the same first dimension, got shapes {shapes}")
    return shapes[0][0]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each tensor in it."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def move(tree: Any, device: torch.device) -> Any:
    """``tree`` with every tensor on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), tree)


def detached(outputs: Any) -> Any:
    """``outputs`` cut from the graph: its tensors, or its ``.logits`` where it is an object that has them."""
    return map_tensors(Tensor.detach, getattr(outputs, "logits", outputs))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@dataclass(frozen=True)
class RandomState:
    """The random streams that a forward on one device draws from, as they were when this was taken."""

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


def evaluate(
    model: nn.Module, arguments: Arguments, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Any:
    """The model's outputs with other parameters and buffers (by name) standing in for its own.

    The forward updates copies of ``buffers`` in place, so neither they nor the model's own change. A model sharded by
    FSDP2 is evaluated without gradients.
    """
    if is_sharded(model):
        positional, named = arguments
        with torch.no_grad(), standing_in(model, parameters, buffers), own_forward(model):
            return model(*positional, **named)
    stand_ins = {**parameters, **{name: buffer.clone() for name, buffer in buffers.items()}}
    with own_forward(model):
        return torch.func.functional_call(model, stand_ins, *arguments)


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Without the autocast that Accelerate (and so the Trainer) puts around a model's forward."""
    own = model.__dict__.get("_original_forward")
    if own is None:
        yield
        return
    wrapped = model.forward
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped

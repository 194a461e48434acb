"""How a model is called, and the tensors in what it is given and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of one call of a model."""


def arguments_of(inputs: Any) -> Arguments:
    """How a model is called with ``inputs``: ``model(**inputs)`` for a mapping, ``model(*inputs)`` for a tuple or
    list that is none of strings, else ``model(inputs)``."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)) and not (inputs and all(isinstance(each, str) for each in inputs)):
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


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each leaf, through tuples, lists, mappings and dataclasses.

    Every container is made anew, of its own type; what is none of these is a leaf.
    """
    if isinstance(tree, Mapping):
        items = {key: map_leaves(function, value) for key, value in tree.items()}
        return items if type(tree) is dict else type(tree)(items)  # type: ignore[call-arg]
    if isinstance(tree, (tuple, list)):
        values = [map_leaves(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: map_leaves(function, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **fields)
    return function(tree)


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of ``tree``, in the order in which :func:`map_leaves` meets them."""
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves_of(value)]
    if isinstance(tree, (tuple, list)):
        return [leaf for value in tree for leaf in leaves_of(value)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [leaf for f in dataclasses.fields(tree) if f.init for leaf in leaves_of(getattr(tree, f.name))]
    return [tree]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each tensor in it."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors among the leaves of ``tree``."""
    return (leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor))


def move(tree: Any, device: torch.device) -> Any:
    """``tree`` with every tensor on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), tree)


def batch_size(tree: Any) -> int:
    """The first dimension that every tensor in ``tree`` shares (those without dimensions aside).

    Raises:
        ValueError: if there is no tensor, or their first dimensions differ.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_of(tree) if tensor.ndim]
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"every tensor of a batch must have the same first dimension, got shapes {shapes}")
    return shapes[0][0]


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


def detached(outputs: Any) -> Any:
    """``outputs`` cut from the graph: its tensors, or its ``.logits`` where it is an object that has them."""
    return map_tensors(Tensor.detach, getattr(outputs, "logits", outputs))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device

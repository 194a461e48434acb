"""What φ and Θ have in common: optimizers that take gradients made elsewhere, and states that are looked at first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_molere.hypergradients.functional import own_stream
from torch_molere.hypergradients.precision import full_precision
from torch_molere.interrupts import uninterrupted

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


def learning_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def optimizer_of(network: nn.Module, factory: OptimizerFactory | None, lr: float) -> Optimizer | None:
    """``factory`` of the parameters, or Adam; None where there is nothing to learn."""
    parameters = learning_parameters(network)
    if not parameters:
        return None
    if factory is not None:
        found = factory(parameters) if not isinstance(factory, Optimizer) and callable(factory) else factory
        if found is factory or not isinstance(found, Optimizer):
            raise TypeError(
                "an optimizer of φ or Θ is given by what makes it from a list of parameters, such as "
                f"functools.partial(torch.optim.SGD, lr=0.1), got {found!r:.60}"
            )
        return found
    adam = torch.optim.SparseAdam if _sparse_parameters(network) else torch.optim.Adam
    return adam(parameters, lr=lr)


def take_step(network: nn.Module, optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """One step of the optimizer with these gradients, one for each parameter that learns."""
    for parameter, gradient in zip(learning_parameters(network), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def check_states(network: nn.Module, optimizer: Optimizer | None, state: Any, optimizer_state: Any) -> None:
    """Refuse states from which no further step is possible, on copies.

    Raises:
        ValueError: for numbers that are not finite, or learning rates that are negative.
        Exception: what loading and stepping raise.
    """
    network, optimizer = copy.deepcopy((network, optimizer))
    network.load_state_dict(state)
    if (optimizer is None) != (optimizer_state is None):
        raise ValueError("an optimizer's state is there just where there is something to learn")
    if optimizer is not None:
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        _check_finite("parameters", network.state_dict())
        for group in optimizer.param_groups:
            if isinstance(group["lr"], bool) or not 0.0 <= float(group["lr"]) < math.inf:
                raise ValueError(f"lr must be a finite number ≥ 0, got {group['lr']!r:.60}")
        _check_finite("the optimizer's numbers", list(optimizer.state.values()))
        sparse = _sparse_parameters(network)
        ones = [torch.ones_like(parameter) for parameter in learning_parameters(network)]
        pairs = zip(learning_parameters(network), ones, strict=True)
        take_step(network, optimizer, [one.to_sparse(1) if id(p) in sparse else one for p, one in pairs])
    _check_finite("parameters after a step", network.state_dict())


def _sparse_parameters(network: nn.Module) -> set[int]:
    return {id(m.weight) for m in network.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse}


def _check_finite(what: str, tree: Any) -> None:
    if isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _check_finite(what, value)
    elif isinstance(tree, Tensor) and not bool(tree.isfinite().all()):
        raise ValueError(f"{what} must be finite")


def with_statistics(networks: Sequence[nn.Module | None]) -> list[nn.Module]:
    """The modules in the networks that write to buffers in their forward (batch normalisation)."""
    return [
        module
        for network in networks
        if network is not None
        for module in network.modules()
        if module._buffers and not type(module).__module__.startswith("torch_molere.")  # these write to none
    ]


@contextmanager
def networks_apart(
    writing: Sequence[nn.Module], device: torch.device, seed: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """φ and Θ run inside from a random stream of their own, without autocast, and leave no trace.

    Args:
        writing: their modules that write to buffers.
        device: where they lie.
        seed: of the stream.

    Yields:
        The buffers of these modules and the copies that they write to instead.
    """
    with own_stream(device, seed), full_precision(device):
        if not writing:
            yield []
            return
        own = [(module._buffers, name) for module in writing for name in module._buffers]
        buffers = [(holder, name, buffer) for holder, name in own if (buffer := holder[name]) is not None]
        copies = [(buffer, buffer.clone()) for _, _, buffer in buffers]
        with uninterrupted():
            try:
                for (holder, name, _), (_, copied) in zip(buffers, copies, strict=True):
                    holder[name] = copied
                yield copies
            finally:
                for holder, name, buffer in buffers:
                    holder[name] = buffer

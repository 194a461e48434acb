"""An optimizer's parameters in pieces: an elementwise update can be taken, and differentiated, a piece at a time.

What is then held besides is of the size of a piece. On the CPU that stays in the processor's cache, and the allocator
does not go back and forth with the system for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_molere.sharded import any_sharded

SIZE = 2**17
"""Elements of a piece, or of small parameters that make up one together."""


@dataclass(frozen=True)
class Piece:
    """Some elements of a parameter.

    Attributes:
        owner: the parameter as the optimizer holds it.
        group: its parameter group, with the options of its update.
        values, gradient, state: of these elements, as views; what the state has for the whole parameter, as it is.
        elements: which of the flattened parameter; None for all, in its own shape.
    """

    owner: Tensor
    group: dict[str, Any]
    values: Tensor
    gradient: Tensor | None
    state: dict[str, Any]
    elements: slice | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The piece's elements of a tensor of the parameter's shape."""
        return _view(tensor, self.elements)


def as_a_whole(
    optimizer: Optimizer, owners: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Piece]:
    """Each parameter in one piece."""
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    return [
        Piece(owner, group_of[owner], value, gradient, optimizer.state.get(owner, {}))
        for owner, value, gradient in zip(owners, values, gradients, strict=True)
    ]


def in_pieces(
    optimizer: Optimizer, owners: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Iterator[list[Piece]]:
    """Pieces of all parameters, as many at a time as make up :data:`SIZE`.

    On an accelerator they come whole and all together: few launches.
    """
    together: list[Piece] = []
    elements = 0
    for whole in as_a_whole(optimizer, owners, values, gradients):
        if whole.owner.device.type != "cpu":
            together.append(whole)
            continue
        for piece in _divided(whole):
            if together and elements + piece.values.numel() > SIZE:
                yield together
                together, elements = [], 0
            together.append(piece)
            elements += piece.values.numel()
    if together:
        yield together


def _divided(whole: Piece) -> Iterator[Piece]:
    def by_element(value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == whole.values.shape

    tensors = list(filter(by_element, (whole.values, whole.gradient, *whole.state.values())))
    size = whole.values.numel()
    if size <= SIZE or any_sharded(tensors) or not all(tensor.is_contiguous() for tensor in tensors):
        yield whole
        return
    for first in range(0, size, SIZE):
        elements = slice(first, first + SIZE)
        state = {name: _view(v, elements) if by_element(v) else v for name, v in whole.state.items()}
        gradient = None if whole.gradient is None else _view(whole.gradient, elements)
        yield Piece(whole.owner, whole.group, _view(whole.values, elements), gradient, state, elements)


def _view(tensor: Tensor, elements: slice | None) -> Tensor:
    return tensor if elements is None else tensor.view(-1)[elements]

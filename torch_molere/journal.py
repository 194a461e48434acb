"""A step that fails has not happened: how to take back each change, noted before the change is made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Journal:
    """Notes the inverse of every change made inside :meth:`all_or_nothing`; a failure there takes all of them back.

    Outside, its methods make the changes and note nothing.
    """

    def __init__(self) -> None:
        self._inverses: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = None

    @property
    def recording(self) -> bool:
        """Whether a change made now may be taken back."""
        return self._inverses is not None

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is changed inside happens as a whole or, where anything is raised, not at all.

        One inside another is a part of it.
        """
        if self.recording:
            yield
            return
        self._inverses = []
        try:
            yield
        except BaseException:
            inverses, self._inverses = self._inverses, None
            for inverse, arguments in reversed(inverses):
                inverse(*arguments)
            raise
        finally:
            self._inverses = None

    def commit(self) -> None:
        """What has happened so far stays, whatever fails later."""
        if self._inverses is not None:
            self._inverses = []

    def note(self, inverse: Callable[..., object], *arguments: Any) -> None:
        """``inverse(*arguments)`` takes back the change that is about to be made."""
        if self._inverses is not None:
            self._inverses.append((inverse, arguments))

    def keep(self, owner: object, *names: str) -> None:
        """Attributes of ``owner`` that are about to be replaced."""
        for name in names:
            self.note(setattr, owner, name, getattr(owner, name))

    def keep_rows(self, tensor: Tensor, rows: Tensor) -> None:
        """Rows of ``tensor``, by a ``(k,)`` long index, that are about to be written."""
        if self.recording:
            self.note(tensor.index_copy_, 0, rows, tensor.index_select(0, rows))

    def keep_network(self, network: nn.Module, optimizer: Optimizer | None) -> None:
        """A network that is about to be trained: parameters, buffers, gradients and its optimizer's state."""
        if not self.recording:
            return
        for parameter in network.parameters():
            self.note(setattr, parameter, "grad", parameter.grad)
        self.keep_tensors([*network.parameters(), *network.buffers()])
        if optimizer is not None:
            states = {owner: dict(state) for owner, state in optimizer.state.items() if isinstance(state, dict)}
            self.keep_tensors([v for state in states.values() for v in state.values() if isinstance(v, Tensor)])
            self.note(optimizer.state.update, {**optimizer.state, **states})
            self.note(optimizer.state.clear)

    def keep_tensors(self, tensors: list[Tensor]) -> None:
        """Tensors that are about to be written in place."""
        if self.recording and tensors:
            self.note(_copy, tensors, [tensor.detach().clone() for tensor in tensors])

    # Changes of lists and dictionaries that are noted as they are made.

    def put(self, container: Any, key: Any, value: Any) -> None:
        """``container[key] = value``, of a list or a dict."""
        if self._inverses is not None:
            if isinstance(container, MutableMapping) and key not in container:
                self._inverses.append((operator.delitem, (container, key)))
            else:
                self._inverses.append((operator.setitem, (container, key, container[key])))
        container[key] = value

    def delete(self, container: dict[Any, Any], key: Any) -> None:
        """``del container[key]``, of a dict."""
        self.note(operator.setitem, container, key, container[key])
        del container[key]

    def append(self, container: list[Any], value: Any) -> None:
        """``container.append(value)``."""
        self.note(container.pop)
        container.append(value)

    def pop(self, container: list[Any]) -> Any:
        """``container.pop()``."""
        value = container.pop()
        self.note(container.append, value)
        return value


def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

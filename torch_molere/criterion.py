"""``reweighter.loss`` as a module, to be assigned where a criterion stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_molere.losses import PerSampleLoss


class Criterion(nn.Module):
    """``reweighter.loss`` as a module. Copies and pickles of it have no reweighter and give the plain loss."""

    def __init__(self, plain: PerSampleLoss, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self._plain = plain
        if plain.modules:  # its parameters and buffers are found where a criterion's are
            self.loss_fn = plain.modules[0]
        self._loss: Callable[..., Tensor] | None = loss

    def forward(self, outputs: Any, targets: Any, indices: Tensor | None = None) -> Tensor:
        """The weighted training loss of :meth:`MetaReweighter.loss`."""
        if self._loss is None:
            return self._plain.mean(outputs, targets, self._plain(outputs, targets))
        return self._loss(outputs, targets, indices)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loss": None}

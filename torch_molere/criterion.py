"""``reweighter.loss`` as a module, to be assigned where a criterion stood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch_molere.reweighter import MetaReweighter


class Criterion(nn.Module):
    """``reweighter.loss`` as a module. Copies and pickles of it have no reweighter and give the plain loss."""

    def __init__(self, reweighter: MetaReweighter) -> None:
        super().__init__()
        self._plain = reweighter.criterion_of_training
        if self._plain.modules:  # its parameters and buffers are found where a criterion's are
            self.loss_fn = self._plain.modules[0]
        self._reweighter: MetaReweighter | None = reweighter

    def forward(self, outputs: Any, targets: Any, indices: Tensor | None = None) -> Tensor:
        """The weighted training loss of :meth:`MetaReweighter.loss`."""
        if self._reweighter is None:
            return self._plain.mean(outputs, targets, self._plain(outputs, targets))
        return self._reweighter.loss(outputs, targets, indices)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reweighter": None}

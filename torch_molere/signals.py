"""Per-sample signals: what a weighting or splitter may see of an instance besides its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_molere.samples import Samples

SIGNALS = ("loss", "margin", "probabilities", "label")


class Signals(nn.Module):
    """Turns samples into ``(B, width)`` features.

    - ``"loss"``: ``asinh(ℓ)``, close to ℓ where it is small and logarithmic where it is large; any task.
    - ``"margin"``: the probabilistic margin; needs class indices.
    - ``"probabilities"``: the C softmax probabilities; needs class indices and ``num_classes``.
    - ``"label"``: the target, one-hot; needs class indices and ``num_classes``.

    Args:
        names: which of them, in which order.
        num_classes: C; needed for ``"probabilities"`` and ``"label"``.

    Raises:
        ValueError: for an unknown or missing name, or a signal that needs ``num_classes`` without it.
    """

    def __init__(self, names: Sequence[str], num_classes: int | None = None) -> None:
        super().__init__()
        unknown = [name for name in names if name not in SIGNALS]
        if unknown or not names or isinstance(names, str):
            raise ValueError(f"signals must be a sequence of some of {SIGNALS}, got {names!r}")
        wide = [name for name in names if name in ("probabilities", "label")]
        if wide and num_classes is None:
            raise ValueError(f"signals {wide} need num_classes, got None; pass the number of classes")
        self.names = tuple(names)
        self.num_classes = num_classes
        # Follows .to(dtype): the signals come in the precision of the network that reads them.
        self.register_buffer("_precision", torch.empty(()), persistent=False)
        self.width = sum(num_classes or 1 if name in wide else 1 for name in names)

    def forward(self, samples: Samples) -> Tensor:
        """``(B, width)`` in the module's floating dtype (float32; after ``.double()``, float64).

        Raises:
            ValueError: if a signal needs class indices and the targets are none, or C is not ``num_classes``.
        """
        precision = self.get_buffer("_precision").dtype
        return torch.cat([self._signal(name, samples).to(precision) for name in self.names], dim=1)

    def _signal(self, name: str, samples: Samples) -> Tensor:
        if name == "loss":
            return samples.losses.asinh().unsqueeze(1)
        if samples.classes is None:
            raise ValueError(f"signal {name!r} needs (B, C) logits and class-index targets; use signals=('loss',)")
        if name == "margin":
            return samples.margins.unsqueeze(1)
        if samples.outputs.shape[1] != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes}, but the model has {samples.outputs.shape[1]} outputs")
        return (
            samples.outputs.softmax(dim=1)
            if name == "probabilities"
            else F.one_hot(samples.classes.long(), samples.outputs.shape[1])
        )

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}, num_classes={self.num_classes}"


def signal_network(signals: Signals, hidden: int, bias: float = 0.0) -> nn.Sequential:
    """One hidden layer on the signals, whose single output starts at ``bias`` for every instance."""
    head = nn.Linear(hidden, 1)
    start_at(head, bias)
    return nn.Sequential(signals, nn.Linear(signals.width, hidden), nn.ReLU(), head)


def start_at(head: nn.Linear, bias: float) -> None:
    """Make a linear layer put out ``bias`` whatever it is given, until it learns."""
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, bias)

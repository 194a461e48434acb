"""Signals: what a weighting or splitter may see of an instance besides its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_molere.samples import Samples

SIGNALS = ("loss", "running_loss", "margin", "running_margin", "meta_gradient", "probabilities", "label")
DEFAULT_SIGNALS = ("loss", "running_loss", "margin", "running_margin", "meta_gradient")
LARGEST_META_GRADIENT = 3.0
"""In standard deviations of its batch: a larger one is seen as this."""


class Signals(nn.Module):
    """Turns samples into ``(B, width)`` features, cut from the graph.

    - ``"loss"``, ``"running_loss"``: ``asinh(ℓ)``, close to ℓ where it is small and logarithmic where it is large;
    - ``"margin"``, ``"running_margin"``: probabilistic margins in [-1, 1]; need classes;
    - ``"meta_gradient"``: two features, the running mean of the row's own meta-gradient in standard deviations, cut to
      [-3, 3], and 1 where there is one, else 0;
    - ``"probabilities"``: the C softmax probabilities; needs classes and ``num_classes``;
    - ``"label"``: the class, one-hot (zeros where it is ignored); needs classes and ``num_classes``.

    Without ``indices`` the running ones are the present ones, and there is no meta-gradient.

    Args:
        names: which of them, in which order; None for the first five. Then the margins are 0 where targets are no
            classes.
        num_classes: C; needed for ``"probabilities"`` and ``"label"``.

    Raises:
        ValueError: for an unknown or missing name, or a signal that needs ``num_classes`` without it.
    """

    _precision: Tensor

    def __init__(self, names: Sequence[str] | None = None, num_classes: int | None = None) -> None:
        super().__init__()
        self.by_default = names is None
        names = DEFAULT_SIGNALS if names is None else names
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
        self.width = sum((num_classes or 1) if name in wide else 1 + (name == "meta_gradient") for name in names)

    def forward(self, samples: Samples) -> Tensor:
        """``(B, width)`` in the module's floating dtype (float32; after ``.double()``, float64).

        Raises:
            ValueError: if a signal that was asked for needs classes and the targets are none, or C is not
                ``num_classes``.
        """
        precision = self._precision.dtype
        wide, columns = [], []
        for name in self.names:
            if name == "loss":
                columns.append(samples.losses.asinh())
            elif name == "running_loss":
                columns.append(samples.running_losses.asinh())
            elif name == "meta_gradient":
                columns.append(samples.meta_gradients.clamp(-LARGEST_META_GRADIENT, LARGEST_META_GRADIENT))
                columns.append(samples.has_meta_gradient.to(precision))
            elif name in ("margin", "running_margin"):
                columns.append(self._margins(name, samples))
            else:
                if columns:
                    wide.append(torch.stack(columns, dim=1).to(precision))
                    columns = []
                wide.append(self._classwise(name, samples).to(precision))
        if columns:
            wide.append(torch.stack(columns, dim=1).to(precision))
        return wide[0] if len(wide) == 1 else torch.cat(wide, dim=1)

    def _margins(self, name: str, samples: Samples) -> Tensor:
        margins = samples.margins if name == "margin" else samples.running_margins
        if margins is not None:
            return margins
        if self.by_default:
            return torch.zeros_like(samples.losses)
        raise ValueError(f"signal {name!r} needs (B, C) logits and class targets; use signals=('loss',)")

    def _classwise(self, name: str, samples: Samples) -> Tensor:
        if samples.classes is None:
            raise ValueError(f"signal {name!r} needs (B, C) logits and class targets; use signals=('loss',)")
        if samples.outputs.shape[1] != self.num_classes:
            raise ValueError(f"num_classes={self.num_classes}, but the model has {samples.outputs.shape[1]} outputs")
        if name == "probabilities":
            return samples.outputs.softmax(dim=1)
        known = (samples.classes >= 0).unsqueeze(1)
        return F.one_hot(samples.classes.clamp_min(0), samples.outputs.shape[1]) * known

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

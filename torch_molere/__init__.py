"""Learned reweighting with hard validation samples (MOLERE) for any PyTorch training loop."""

from torch_molere.hypergradients import hypergradient
from torch_molere.margins import margins, probabilistic_margin, split_by_margin

__version__ = "0.1.0"
__all__ = ["hypergradient", "margins", "probabilistic_margin", "split_by_margin"]

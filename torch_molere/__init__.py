"""Learned reweighting with hard validation samples (MOLERE) for any PyTorch training loop."""

from torch_molere.data import with_indices
from torch_molere.distributed.state import DistributedState
from torch_molere.hypergradients import hypergradient
from torch_molere.losses import expected_error
from torch_molere.margins import margins, probabilistic_margin, split_by_margin
from torch_molere.reweighter import MetaReweighter, StepResult
from torch_molere.samples import Samples
from torch_molere.splitting import LearnedSplitter, MarginSplitter, RandomSplitter
from torch_molere.validation import ValidationBuffer
from torch_molere.weighting import (
    FreeWeighting,
    GroupWeighting,
    InputWeighting,
    OnlineWeighting,
    RandomWeighting,
    SignalWeighting,
)

__version__ = "0.2.0"
__all__ = [
    "DistributedState",
    "FreeWeighting",
    "GroupWeighting",
    "InputWeighting",
    "LearnedSplitter",
    "MarginSplitter",
    "MetaReweighter",
    "OnlineWeighting",
    "RandomSplitter",
    "RandomWeighting",
    "Samples",
    "SignalWeighting",
    "StepResult",
    "ValidationBuffer",
    "expected_error",
    "hypergradient",
    "margins",
    "probabilistic_margin",
    "split_by_margin",
    "with_indices",
]

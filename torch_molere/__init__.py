"""Learned reweighting with hard validation samples (MOLERE) for any PyTorch training loop."""

from torch_molere.checkpoint import load_checkpoint, save_checkpoint
from torch_molere.distributed_state import DistributedState
from torch_molere.evaluation import expected_error
from torch_molere.hypergradients import hypergradient
from torch_molere.margins import margins, probabilistic_margin, split_by_margin
from torch_molere.reweighter import MetaReweighter, StepResult
from torch_molere.samples import Samples
from torch_molere.splitting import LearnedSplitter, MarginSplitter, RandomSplitter
from torch_molere.weighting import FreeWeighting, InputWeighting, SignalWeighting

__version__ = "0.1.0"
__all__ = [
    "DistributedState",
    "FreeWeighting",
    "InputWeighting",
    "LearnedSplitter",
    "MarginSplitter",
    "MetaReweighter",
    "RandomSplitter",
    "Samples",
    "SignalWeighting",
    "StepResult",
    "expected_error",
    "hypergradient",
    "load_checkpoint",
    "margins",
    "probabilistic_margin",
    "save_checkpoint",
    "split_by_margin",
]

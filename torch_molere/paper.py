"""MOLERE as in the paper (Jain, Suggala and Shenoy, CVPR 2024, with the schedule of its supplement), as arguments."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_molere.splitting import LearnedSplitter
from torch_molere.validation.buffer import ValidationBuffer
from torch_molere.weighting import InputWeighting


def paper_arguments(
    network: nn.Module, num_outputs: int, warmup_steps: int, fraction: float, lr: float
) -> dict[str, Any]:
    """Arguments of :class:`~torch_molere.MetaReweighter`; see its ``as_in_paper`` for what they mean."""
    sgd = partial(torch.optim.SGD, lr=lr)
    splitter = LearnedSplitter(network=copy.deepcopy(network))
    return {
        "weighting": InputWeighting.from_classifier(network, num_outputs),
        "weighting_optimizer": sgd,
        "validation": ValidationBuffer(splitter=splitter, fraction=fraction, hold_out=True, optimizer=sgd),
        "order": "before",
        "every": 5,
        "warmup_steps": warmup_steps,
        "shrinkage": None,
        "max_weight": None,
    }

"""A small problem, and one thread."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.problems import Judged, Problem

CLASSES, ROWS, TRUSTED = 3, 60, 12


@pytest.fixture(autouse=True)
def own_threads(one_thread):
    """The networks are so small that threads only wait for each other."""


@pytest.fixture
def problem():
    """Separable classes, a quarter of the labels wrong, but for the last rows, which are trusted."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(ROWS) % CLASSES
    inputs = torch.randn(ROWS, 5, generator=generator) + 2.0 * F.one_hot(clean, 5)
    doubtful = (torch.arange(ROWS) % 4 == 0) & (torch.arange(ROWS) < ROWS - TRUSTED)
    labels = torch.where(doubtful, (clean + 1) % CLASSES, clean)
    judged = Judged(inputs[:30] + 0.1, clean[:30])
    trusted = torch.arange(ROWS - TRUSTED, ROWS)
    return Problem(inputs, labels, clean, np.arange(ROWS), trusted, CLASSES, judged, judged)

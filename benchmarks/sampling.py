"""Which training rows are kept and which labels they carry: subsets, long tails, label noise; all fixed by seed 0."""

from __future__ import annotations

import re

import numpy as np
import typer
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def balanced_subset(labels: Rows, size: int) -> Rows:
    """``size`` rows with equally many of each class (as equal as the classes allow), drawn with seed 0.

    Args:
        labels: ``(N,)`` class indices.
        size: in [1, N].

    Returns:
        ``(size,)`` row numbers in ascending order.
    """
    if not 1 <= size <= len(labels):
        raise typer.BadParameter(
            f"{size} rows asked for, but the training set has {len(labels)}; give 1 to {len(labels)}",
            param_hint="--subset",
        )
    rank = _rank_in_class(labels)
    # The first round takes one row of every class, the second another one, and so on until there are enough.
    return np.sort(np.lexsort((labels, rank))[:size])


def long_tail(labels: Rows, imbalance: float) -> Rows:
    """Class c keeps ``round(n_max · imbalance^(−c / (C − 1)))`` rows (at least one, at most what it has), by seed 0.

    The profile of Cui et al. (CVPR 2019): the last class has ``imbalance`` times fewer rows than the first.

    Args:
        labels: ``(N,)`` class indices.
        imbalance: ≥ 1.

    Returns:
        Row numbers in ascending order.
    """
    if not (np.isfinite(imbalance) and imbalance >= 1.0):
        raise typer.BadParameter(f"must be a number ≥ 1, got {imbalance}", param_hint="--imbalance")
    counts = np.bincount(labels)
    position = np.arange(len(counts)) / max(len(counts) - 1, 1)
    wanted = np.maximum(1, np.round(counts.max() * imbalance**-position))
    return np.flatnonzero(_rank_in_class(labels) < wanted[labels])


def _rank_in_class(labels: Rows) -> Rows:
    """``(N,)``: each row's place in a random order of its own class."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.empty_like(by_class)
    rank[by_class] = np.arange(len(labels)) - starts
    return rank


def noise_rate(text: str) -> float:
    """The rate in ``symmetric:RATE``."""
    match = re.fullmatch(r"symmetric:(\d*\.?\d+)", text)
    rate = float(match[1]) if match else np.nan
    if not 0.0 < rate < 1.0:
        raise typer.BadParameter(
            f"{text!r} must be symmetric:RATE with a rate between 0 and 1, for instance symmetric:0.4",
            param_hint="--label-noise",
        )
    return rate


def symmetric_noise(labels: Rows, rate: float, num_classes: int, seed: int = 0) -> Rows:
    """Exactly ``round(rate · N)`` labels, drawn with ``seed``, are replaced by one of the OTHER classes, uniformly.

    So ``rate`` is the share of wrong labels (where the noise may hit the true class again, only
    ``rate · (C − 1) / C`` would be wrong).

    Args:
        labels: ``(N,)`` class indices.
        rate: in (0, 1).
        num_classes: C.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    wrong = random.permutation(len(labels))[: round(rate * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + random.integers(1, num_classes, size=len(wrong))) % num_classes
    return noisy

"""Rows to act on, with scores: likely wrong labels, hard but right ones, rows that hurt validation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from torch_molere.history import SampleHistory

History: TypeAlias = SampleHistory | pd.DataFrame

LEAST_ROWS = 20
ROUNDS = 100
HURTS = 2.0
"""In standard errors: a row whose mean meta-gradient is further above zero hurts validation."""


@dataclass(frozen=True)
class LabelIssues:
    """Likely wrong labels.

    Attributes:
        rows: one row of the frame for each row that is more likely wrong than right, the likeliest first: index ``row``
            and columns ``probability`` (that the label is wrong, in [0, 1]), ``label``, ``prediction``, ``margin``,
            ``weight``. cleanlab calls them ``label_score`` = 1 − ``probability``, ``given_label``, ``predicted_label``.
        probability: of every row that has a margin, by ``row``.
        rate: the estimated share of wrong labels, the mean of ``probability``; NaN where the margins do not part the
            rows in two. Then wrong labels are few or were memorised at once, and which of the two cannot be told: look
            at the rows with the least ``margin`` of the history by hand.
    """

    rows: pd.DataFrame
    probability: pd.Series
    rate: float


def frame(history: History) -> pd.DataFrame:
    """The table of a history, or the frame as it is."""
    return history if isinstance(history, pd.DataFrame) else history.to_pandas()


def label_issues(history: History) -> LabelIssues:
    """Which labels are likely wrong, by how training saw them.

    A mixture of two beta distributions is fitted to the rows' mean margins (Arazo et al., ICML 2019, who fit it to
    losses): networks fit right labels first, so the mean over training is low where the label is wrong. The probability
    is that of the lower component. It is an estimate: classes that are hard as a whole look like wrong labels, and a
    network that memorises within the first epochs hides them. Where the two components do not part the rows (their
    means are less than 0.25 apart on a scale of 0 to 1), the probability is 0 everywhere and the rate NaN.

    Args:
        history: ``reweighter.history``, or a frame of a :class:`~torch_molere.report.Run`.

    Raises:
        ValueError: if fewer than 20 rows have a margin (targets that are no classes have none).
    """
    known = frame(history).dropna(subset=["margin"])
    if len(known) < LEAST_ROWS:
        raise ValueError(
            f"label_issues needs at least {LEAST_ROWS} rows with margins, got {len(known)}; margins need targets that "
            "are classes, and batches with indices"
        )
    probability = pd.Series(lower_component((known["margin"].to_numpy() + 1.0) / 2.0), known.index, name="probability")
    found = pd.DataFrame(
        {
            "probability": probability,
            "label": known["target"],
            "prediction": known["prediction"],
            "margin": known["margin"],
            "weight": known["weight"],
        }
    )
    rows = found[probability > 0.5].sort_values(["probability", "margin"], ascending=[False, True])
    return LabelIssues(rows, probability, float(probability.mean()) if probability.any() else math.nan)


def lower_component(values: np.ndarray) -> np.ndarray:
    """``(N,)`` posterior of the lower one of two beta distributions, fitted by expectation maximisation with moments.

    Args:
        values: ``(N,)`` in [0, 1].
    """
    x = np.clip(values, 1e-3, 1.0 - 1e-3)
    low = (x < 0.5).astype(float) * 0.9 + 0.05
    share = np.array([low.mean(), 1.0 - low.mean()])
    means = np.zeros(2)
    for _ in range(ROUNDS):
        densities = []
        for k, weights in enumerate((low, 1.0 - low)):
            total = max(weights.sum(), 1e-12)
            mean = (weights * x).sum() / total
            variance = max((weights * (x - mean) ** 2).sum() / total, 1e-4)
            both = max(mean * (1.0 - mean) / variance - 1.0, 1e-2)
            a, b = mean * both, (1.0 - mean) * both
            means[k] = mean
            densities.append(share[k] * np.exp(_log_beta(x, a, b)))
        following = densities[0] / np.maximum(densities[0] + densities[1], 1e-300)
        share = np.array([following.mean(), 1.0 - following.mean()])
        done = np.abs(following - low).max() < 1e-4
        low = following
        if done:
            break
    if means[1] - means[0] < 0.25:
        return np.zeros_like(x)
    # A beta distribution with a heavy end may overtake the other one beyond its mean.
    low = np.where(x <= means[0], np.maximum(low, low[x <= means[0]].max(initial=0.0)), low)
    return np.where(x >= means[1], np.minimum(low, low[x >= means[1]].min(initial=1.0)), low)


def _log_beta(x: np.ndarray, a: float, b: float) -> np.ndarray:
    constant = torch.lgamma(torch.tensor([a + b, a, b], dtype=torch.double)).numpy()
    density: np.ndarray = (a - 1.0) * np.log(x) + (b - 1.0) * np.log1p(-x) + constant[0] - constant[1] - constant[2]
    return density


def hard_rows(history: History, count: int = 100) -> pd.DataFrame:
    """Rows with the least running margins whose labels are more likely right than wrong, hardest first.

    Returns:
        Index ``row`` and columns ``running_margin``, ``label``, ``prediction``, ``weight``, ``probability`` (that the
        label is wrong).
    """
    table, issues = frame(history), label_issues(history)
    right = issues.probability[issues.probability <= 0.5]
    chosen = table.loc[right.index].assign(probability=right, label=table["target"]).nsmallest(count, "running_margin")
    return chosen[["running_margin", "label", "prediction", "weight", "probability"]]


def harmful_rows(history: History) -> pd.DataFrame:
    """Rows whose own meta-gradient is above zero by more than two standard errors: more weight on them makes validation
    worse. The most harmful first.

    The meta-gradient is in standard deviations of its batch, so the mean of n of them, under the running mean's decay
    of 0.8, has a standard error of √((1 − 0.8)/(1 + 0.8)) for large n, and of 1/√n for small n.

    Returns:
        Index ``row`` and columns ``meta_gradient``, ``errors`` (how many standard errors above zero), ``label``,
        ``prediction``, ``weight``.
    """
    table = frame(history).dropna(subset=["meta_gradient"])
    n = table["meta_seen"].to_numpy(dtype=float)
    decay = 0.8
    squares = (1.0 - decay ** (2.0 * n)) / (1.0 - decay**2)
    error = np.sqrt(squares) * (1.0 - decay) / (1.0 - decay**n)
    scored = table.assign(errors=table["meta_gradient"] / error, label=table["target"])
    return scored[scored["errors"] > HURTS].sort_values("errors", ascending=False)[
        ["meta_gradient", "errors", "label", "prediction", "weight"]
    ]


def without(dataset: Dataset[object], rows: Iterable[int]) -> Subset[object]:
    """The dataset without some rows, for retraining: ``without(dataset, label_issues(history).rows.index)``.

    Raises:
        IndexError: for a row that the dataset does not have.
    """
    left_out = set(map(int, rows))
    size = len(dataset)  # type: ignore[arg-type]
    if left_out and not (min(left_out) >= 0 and max(left_out) < size):
        raise IndexError(f"rows must lie in 0 … {size - 1}, the dataset's, got {min(left_out)} to {max(left_out)}")
    return Subset(dataset, [row for row in range(size) if row not in left_out])


def sampling_weights(history: History, size: int) -> Tensor:
    """``(size,)`` double, for ``torch.utils.data.WeightedRandomSampler``: each row's mean weight, and one for rows that
    were never weighed.

    Args:
        size: rows of the dataset.

    Raises:
        IndexError: if the history knows rows beyond ``size``.
    """
    known = frame(history)["weight"].dropna()
    if len(known) and known.index.max() >= size:
        raise IndexError(f"the history knows row {known.index.max()}, but size is {size}; give the dataset's length")
    weights = torch.ones(size, dtype=torch.double)
    weights[torch.tensor(known.index.to_numpy())] = torch.tensor(known.to_numpy(), dtype=torch.double)
    return weights

"""Rows to act on."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta
from torch.utils.data import TensorDataset

from torch_molere.report import hard_rows, harmful_rows, label_issues, sampling_weights, without
from torch_molere.report.findings import lower_component


def history(wrong=300, right=700, seed=0):
    """A table with known wrong rows: the first ones."""
    random = np.random.default_rng(seed)
    margins = np.concatenate([random.beta(2, 6, wrong), random.beta(8, 2, right)]) * 2 - 1
    size = wrong + right
    return pd.DataFrame(
        {
            "margin": margins,
            "running_margin": margins,
            "weight": random.uniform(0.5, 1.5, size),
            "target": random.integers(10, size=size),
            "prediction": random.integers(10, size=size),
            "meta_gradient": np.linspace(1, -1, size),
            "meta_seen": np.full(size, 40),
        },
        index=pd.RangeIndex(size, name="row"),
    )


def test_the_posterior_is_that_of_the_mixture_that_made_the_values():
    random = np.random.default_rng(1)
    x = np.concatenate([random.beta(2, 6, 3000), random.beta(8, 2, 7000)])
    low, high = 0.3 * beta(2, 6).pdf(x), 0.7 * beta(8, 2).pdf(x)
    assert np.abs(lower_component(x) - low / (low + high)).mean() < 0.03


@pytest.mark.parametrize("wrong", [50, 300, 450])
def test_wrong_labels_are_found_and_their_share_estimated(wrong):
    issues = label_issues(history(wrong, 1000 - wrong))
    assert issues.rate == pytest.approx(wrong / 1000, abs=0.04)
    found = set(issues.rows.index)
    assert len(found & set(range(wrong))) > 0.85 * wrong and len(found - set(range(wrong))) < 0.05 * 1000
    assert issues.rows["probability"].is_monotonic_decreasing


def test_rows_of_one_kind_have_no_wrong_labels():
    issues = label_issues(history(0, 1000))
    assert np.isnan(issues.rate) and len(issues.rows) == 0


def test_the_probability_falls_with_the_margin():
    issues = label_issues(history())
    by_margin = issues.probability.iloc[np.argsort(history()["margin"].to_numpy())]
    assert (np.diff(by_margin) <= 1e-12).all()


def test_hard_rows_are_the_hardest_whose_labels_are_likely_right():
    table, issues = history(), label_issues(history())
    found = hard_rows(table, 5)
    rest = table.drop(issues.rows.index)
    assert found.index.tolist() == rest.nsmallest(5, "running_margin").index.tolist()
    assert (found["probability"] <= 0.5).all()


def test_rows_that_hurt_validation():
    found = harmful_rows(history())
    error = np.sqrt((1 - 0.8) / (1 + 0.8))  # of a mean with decay 0.8, after many encounters
    expected = history()["meta_gradient"]
    assert found.index.tolist() == expected[expected > 2 * error].index.tolist()
    once = history().assign(meta_seen=1, meta_gradient=np.linspace(-3, 3, 1000))
    assert (harmful_rows(once)["meta_gradient"] > 2).all() and len(harmful_rows(once)) > 100


def test_what_training_again_takes():
    data = TensorDataset(torch.arange(1000), torch.zeros(1000))
    issues = label_issues(history())
    rest = without(data, issues.rows.index)
    assert len(rest) == 1000 - len(issues.rows) and not set(rest.indices) & set(issues.rows.index)
    weights = sampling_weights(history(), 1200)
    assert weights[:1000].tolist() == history()["weight"].tolist() and (weights[1000:] == 1).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least 20 rows with margins, got 0"):
        label_issues(history().assign(margin=np.nan))
    with pytest.raises(IndexError, match="rows must lie in 0 … 9"):
        without(TensorDataset(torch.zeros(10)), [10])
    with pytest.raises(IndexError, match="knows row 999, but size is 10"):
        sampling_weights(history(), 10)

"""Intervals, summaries and stored runs."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import typer

from benchmarks.figures import changes_by_bucket
from benchmarks.results import Runs, as_frame, cells, interval, markdown, summarise
from benchmarks.training import Outcome


def test_interval_of_two_values_in_closed_form():
    # n = 2: s / √n = |a − b| / 2 and t_{1, 0.975} = tan(0.475 π), the Cauchy quantile.
    found = interval([1.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(1.5 * math.tan(0.475 * math.pi), rel=1e-12)


def test_interval_is_scipys():
    values = np.random.default_rng(0).normal(3.0, 2.0, 7)
    found = interval(values)
    low, high = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-12)


def test_one_value_has_no_interval():
    assert interval([0.5]).shown(".2f", 100) == "50.00 ± –"
    assert interval([]).shown(".2f") == "–"
    assert interval([0.25, 0.25]).shown("+.2f") == "+0.25 ± 0.00"


def frame_of(accuracies):
    rows = [
        {
            "method": method,
            "seed": seed,
            "accuracy": accuracy,
            "balanced_accuracy": accuracy,
            "test_margin": accuracy / 4,
            "seconds_per_step": 2.0 if method == "ERM" else 3.0,
        }
        for method, by_seed in accuracies.items()
        for seed, accuracy in by_seed.items()
    ]
    return pd.DataFrame(rows)


def test_differences_are_paired_by_seed():
    frame = frame_of({"MOLERE": {1: 0.52, 0: 0.41}, "ERM": {0: 0.40, 1: 0.50, 2: 0.9}})
    erm, molere = summarise(frame)
    assert (erm.method, erm.seeds, molere.method, molere.seeds) == ("ERM", 3, "MOLERE", 2)
    assert molere.difference.mean == pytest.approx(0.015)
    assert molere.difference.half == pytest.approx(0.005 * math.tan(0.475 * math.pi))
    assert molere.cost == 1.5
    assert cells(erm)[3] == "–"
    assert cells(molere) == ("MOLERE", "2", "46.50 ± 69.88", "+1.50 ± 6.35", "0.116 ± 0.175", "1.50×")


def test_one_seed_and_no_nan_on_show():
    text = markdown(summarise(frame_of({"ERM": {0: 0.4}, "LRW-Hard": {0: 0.5}})))
    assert "| LRW-Hard | 1 | 50.00 ± – | +10.00 ± – | 0.125 ± – | 1.50× |" in text
    assert "nan" not in text


def test_summary_frame_has_unrounded_numbers():
    frame = as_frame(summarise(frame_of({"ERM": {0: 1 / 3, 1: 2 / 3}})))
    assert frame.loc[0, "accuracy"] == 0.5
    assert frame.loc[0, "accuracy_half"] == pytest.approx(math.tan(0.475 * math.pi) / 6)


def outcome(method, seed, accuracy=0.5):
    numbers = {"method": method, "seed": seed, "accuracy": accuracy}
    return Outcome(numbers, torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.4, 0.5]))


CONFIG = {"configuration": {"model": "mlp", "recipe": {"lr": 0.1}}}


def test_runs_are_kept_exactly(tmp_path):
    runs = Runs(tmp_path / "a")
    runs.start(CONFIG, resume=False, overwrite=False)
    assert runs.finished() == set()
    runs.add(outcome("ERM", 0, accuracy=1 / 3))
    runs.add(outcome("MOLERE", 0))
    again = Runs(tmp_path / "a")
    again.start(CONFIG, resume=True, overwrite=False)
    assert again.finished() == {("ERM", 0), ("MOLERE", 0)}
    assert again.frame()["accuracy"].tolist() == [1 / 3, 0.5]
    assert torch.equal(again.erm_margins(0), torch.tensor([0.3, 0.4, 0.5]))
    assert again.test_margins("MOLERE", 0).tolist() == torch.tensor([0.1, -0.2]).tolist()
    assert not list((tmp_path / "a").rglob("*.partial"))


def test_resuming_another_configuration_names_the_difference(tmp_path):
    Runs(tmp_path).start(CONFIG, resume=False, overwrite=False)
    other = {"configuration": {"model": "mlp", "recipe": {"lr": 0.2}}}
    with pytest.raises(typer.BadParameter, match=r"recipe\.lr was 0\.1 and is 0\.2"):
        Runs(tmp_path).start(other, resume=True, overwrite=False)


def test_overwriting_drops_the_comparison_and_nothing_else(tmp_path):
    runs = Runs(tmp_path)
    runs.start(CONFIG, resume=False, overwrite=False)
    runs.add(outcome("ERM", 0))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(typer.BadParameter, match="--resume"):
        runs.start(CONFIG, resume=False, overwrite=False)
    runs.start(CONFIG, resume=False, overwrite=True)
    assert runs.finished() == set()
    assert not list((tmp_path / "margins").iterdir())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_changes_by_bucket():
    before = [np.array([-1.0, -0.95, 0.5, 1.0]), np.array([-0.9, 0.55, 0.45, 0.99])]
    after = [margins + change for margins, change in zip(before, (0.1, 0.3), strict=True)]
    means, counts = changes_by_bucket(before, after)
    # Buckets [-1, -0.8): three instances, [0.4, 0.6): three, [0.8, 1]: two; over two seeds.
    assert counts.tolist() == [1.5, 0, 0, 0, 0, 0, 0, 1.5, 0, 1]
    assert means[[0, 7, 9]] == pytest.approx([0.5 / 3, 0.7 / 3, 0.2])
    assert np.isnan(means[1])

"""Intervals, paired differences, winners, tables, claims and figures, from made-up runs."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image

from benchmarks import pages
from benchmarks.methods import DEFAULT, RANDOM
from benchmarks.problems import Setting
from benchmarks.report import (
    buckets,
    difference,
    interval,
    markdown,
    markdown_table,
    panels,
    table,
    winner,
    with_winners,
)
from benchmarks.store import Store
from benchmarks.studies import Claim, Study, tried
from benchmarks.sweeps import Sweep

MADE = {"command": "python -m benchmarks some", "machine": {"processor": "some", "cores": 2}}
STUDY = Study(
    "some",
    "Does it?",
    (Setting("one"), Setting("two")),
    (RANDOM, DEFAULT),
    claims=(
        Claim("above plain by 3", ("one",), "default", "plain", 0.03),
        Claim("above plain by 20", ("one",), "default", "plain", 0.2),
        Claim("above its best epoch", ("one",), "default", "plain", minus="best_accuracy"),
        Claim("no harm", (), "random weights", "plain", -0.003),
        Claim("of nobody", (), "nobody", "plain"),
    ),
)


@pytest.fixture
def frame():
    """Two settings, three seeds; the default is 0.1 above plain training, random weights 0.01 below."""
    rows = []
    for setting in ("one", "two"):
        for seed in range(3):
            base = 0.5 + 0.1 * seed
            values = {"plain": base, "default": base + 0.1 + 0.001 * seed, "random weights": base - 0.01}
            values |= {tried(lr, 1e-4).name: base + lr for lr in (0.02, 0.05, 0.2)}
            for method, accuracy in values.items():
                row = {"setting": setting, "method": method, "seed": seed, "accuracy": accuracy, "selection": accuracy}
                rows.append(
                    row | {"best_accuracy": accuracy + 0.05, "label_errors": 0.4, "rows": 100, "weight_sd": 0.2}
                )
    return pd.DataFrame(rows)


def test_intervals_are_scipy_s():
    values = [1.0, 2.0, 4.0, 7.0]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    found = interval(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.count == 4 and not found.clear and interval([2.0, 2.1, 2.2]).clear
    assert interval([1.0, np.nan]).shown() == "1.0 ± –" and interval([]).shown() == "–"
    assert interval([0.5, 0.7]).shown("+.1f", 100) == "+60.0 ± 127.1"


def test_differences_are_paired_by_seed(frame):
    part = frame[frame["setting"] == "one"]
    change = difference(part, "default", "plain", "accuracy")
    assert change.mean == pytest.approx(0.101) and change.half < 0.003  # though plain's own spread is 0.1
    assert difference(part, "default", "plain", "accuracy", "best_accuracy").mean == pytest.approx(0.051)
    assert difference(part[part["seed"] > 0], "default", "plain", "accuracy").count == 2


def test_a_family_stands_by_its_winner_on_the_selection_rows(frame):
    families = {tried(lr, 1e-4).name: "plain" for lr in (0.02, 0.05, 0.2)}
    best = tried(0.2, 1e-4).name
    frame.loc[frame["method"] == best, "accuracy"] = 0.0  # by the selection rows, not by the test
    assert winner(frame[frame["method"].isin(families)]) == best
    chosen = with_winners(frame, families)
    assert set(chosen["method"]) == {"plain", "default", "random weights", "plain, tuned"}
    assert set(chosen[chosen["method"] == "plain, tuned"]["winner"]) == {best} and len(chosen) == 24


def test_tables(frame):
    part = frame[frame["setting"] == "one"]
    shown = table(part, ["plain", "default", "nobody", "random weights"], ["accuracy", "best_accuracy", "nll"])
    assert shown[""].tolist() == ["plain", "default", "random weights"]
    assert shown["minus plain"].tolist() == ["", "**+10.1 ± 0.2**", "**-1.0 ± 0.0**"]
    assert shown["at its best epoch, %"].tolist() == ["65.0", "75.1", "64.0"] and "NLL" not in shown
    assert markdown(pd.DataFrame({"": ["a"], "b": [1]})) == markdown_table([["", "b"], ["a", "1"]])
    assert markdown_table([["", "b"], ["a", "1"]]) == "|  | b |\n| --- | ---: |\n| a | 1 |\n"


def test_verdicts(frame):
    found = pages.verdicts(STUDY, pages.parts_of(STUDY, frame))
    assert found[["claim", "setting", ""]].to_numpy().tolist() == [
        ["above plain by 3", "one", "held"],
        ["above plain by 20", "one", "not reached"],
        ["above its best epoch", "one", "held"],
        ["no harm", "one", "not held"],
        ["no harm", "two", "not held"],
    ]
    frame.loc[frame["method"] == "default", "accuracy"] -= 0.2
    assert pages.verdicts(STUDY, pages.parts_of(STUDY, frame))[""].tolist()[0] == "reversed"


def test_too_few_seeds_are_no_result(frame):
    assert not pages.parts_of(STUDY, frame[frame["seed"] < 2])
    assert len(pages.parts_of(STUDY, frame[(frame["seed"] < 2) | (frame["setting"] == "two")])) == 1


def test_figures(frame, tmp_path):
    parts = [(name, part) for name, part in frame.groupby("setting")]
    panels(parts, ["plain", "default", "random weights", "nobody"], "accuracy", tmp_path / "a.png")
    for bucket in range(10):
        frame[f"margin_{bucket}"] = 0.1 * bucket
    buckets([("one", frame[frame["setting"] == "one"])], ["default"], tmp_path / "b.png")
    for name in "ab":
        assert len(np.unique(np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")))) > 20


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """The page of one study with these runs."""

    def page(study, runs):
        monkeypatch.setattr(pages, "STUDIES", {"some": study})
        store = Store(tmp_path / "some")
        store.start(study.settings, (*study.tried, *study.methods), MADE)
        runs.to_csv(store.table, index=False)
        pages.render(tmp_path)
        return (tmp_path / "README.md").read_text()

    return page


def test_the_page(frame, tmp_path, rendered):
    page = rendered(STUDY, frame)
    for text in (
        "## Verdicts",
        "## `some`",
        "Does it?",
        "python -m benchmarks some",
        "**two**: 100 rows",
        "plain, tuned",
    ):
        assert text in page
    assert "40 % wrong labels" in page and "2 cores of an some" in page
    assert (tmp_path / "some" / "differences.png").exists()


def test_sweeps_are_one_table_and_one_figure(frame, tmp_path, rendered):
    sweep = Sweep("wrong", {"20 %": Setting(""), "40 %": Setting("")}, (0, 100))
    none, some, more, unrun = sweep.settings
    assert [each.name for each in sweep.settings][:2] == ["wrong, 20 %, 0 trusted", "wrong, 20 %, 100 trusted"]
    assert [each.trusted for each in sweep.settings] == [0, 100, 0, 100]
    parts = {
        none.name: frame[frame["setting"] == "one"],
        some.name: frame[frame["setting"] == "two"].replace({"method": {"default": "default, trusted"}}),
        more.name: frame[frame["setting"] == "two"],
    }
    unrun_sweep = Sweep("rare", {"10": Setting("")}, (0,))
    settings = (*sweep.settings, *unrun_sweep.settings)
    study = Study("some", "?", settings, (RANDOM, DEFAULT), sweeps=(sweep, unrun_sweep))
    runs = pd.concat([part.assign(setting=name) for name, part in parts.items()])
    page = rendered(study, runs)
    lines = [line for line in page.splitlines() if line.startswith("| wrong")]
    gains = "**+20.0 ± 0.0** | **-1.0 ± 0.0** | **+10.1 ± 0.2** | **+5.1 ± 0.2** | **-9.9 ± 0.2** |"
    assert lines == [f"| {name} | 60.0 ± 24.8 | 65.0 | {gains}" for name in (none.name, some.name, more.name)]
    assert unrun.name not in page
    assert len(np.unique(np.asarray(Image.open(tmp_path / "some" / "amounts.png").convert("L")))) > 20

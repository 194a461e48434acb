"""The main job: four situations on scikit-learn's digits, in one table and one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from rich import box
from rich.table import Table

from benchmarks import report
from benchmarks.catalogue import DIGITS
from benchmarks.methods import DEFAULT, PLAIN, RANDOM, TRUSTED
from benchmarks.report import difference, forest, interval, save
from benchmarks.store import Store
from benchmarks.studies import Study

STUDY = Study(
    "main",
    "What learned reweighting at its defaults does to plain training in four situations.",
    (
        replace(DIGITS, name="clean labels"),
        replace(DIGITS, name="45 % wrong labels, 50 trusted", labels="next:0.45", trusted=50),
        replace(DIGITS, name="long tail, none trusted", imbalance=30.0, epochs=120),
        replace(DIGITS, name="misleading cue, none trusted", cue=0.95),
    ),
    (RANDOM, DEFAULT, TRUSTED),
    grid=False,
)
METHODS = (PLAIN, *STUDY.methods)
WORDS = {
    PLAIN.name: "plain training",
    RANDOM.name: "random weights",
    DEFAULT.name: "MetaReweighter",
    TRUSTED.name: "… validation=trusted",
}


def numbers(frame: pd.DataFrame) -> list[list[str]]:
    """Rows of the table: situation, method, accuracy, difference from plain training, worst class, best epoch."""
    rows = []
    for setting in STUDY.settings:
        part = frame[frame["setting"] == setting.name]
        for method in METHODS:
            own = part[part["method"] == method.name]
            if own.empty:
                continue
            change = difference(part, method.name, PLAIN.name, "accuracy")
            cells = (
                interval(own["accuracy"]).shown(".1f", 100),
                "" if method == PLAIN else change.shown("+.1f", 100),
                f"{100 * own['worst_class'].mean():.0f}",
                f"{100 * own['best_accuracy'].mean():.1f}",
            )
            rows.append([setting.name, WORDS[method.name], *cells])
    return rows


COLUMNS = ("situation", "method", "accuracy, %", "minus plain", "worst", "best")


def table(frame: pd.DataFrame) -> Table:
    """The table for the screen."""
    seeds = frame["seed"].nunique()
    shown = Table(
        title="scikit-learn's digits, a small MLP",
        caption=f"± 95 % t intervals over {seeds} seeds; differences are paired by seed; every method trains on "
        "the same rows, trusted ones too",
        box=box.SIMPLE_HEAD,
    )
    for place, name in enumerate(COLUMNS[1:]):
        shown.add_column(name, justify="right" if place else "left", no_wrap=True)
    last = None
    for situation, *cells in numbers(frame):
        if situation != last:
            shown.add_section()
            shown.add_row(f"[bold]{situation}")
        shown.add_row(f"  {cells[0]}", *cells[1:])
        last = situation
    return shown


def draw(frame: pd.DataFrame, path: Path) -> Path:
    """The picture: for each situation, what each method adds to plain training."""
    names = [method.name for method in STUDY.methods]
    with plt.rc_context(report.STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(9, 4.6), sharex=True, sharey=True, layout="constrained", dpi=160)
        for axes, setting in zip(grid.flat, STUDY.settings, strict=True):
            part = frame[frame["setting"] == setting.name]
            forest(axes, part, names, "accuracy", PLAIN.name)
            plain = 100 * part[part["method"] == PLAIN.name]["accuracy"].mean()
            axes.set_yticks(range(len(names)), [WORDS[name] for name in names])
            axes.set_title(f"{setting.name}\n", fontsize=10.5)
            axes.text(0, 1.03, f"plain training: {plain:.1f} %", transform=axes.transAxes, fontsize=9, color="#666666")
            if not setting.trusted:
                axes.text(0, len(names) - 1, " no trusted rows here", color="#AAAAAA", va="center", fontsize=8)
        figure.suptitle("What reweighting adds to plain training: points of test accuracy", x=0.01, ha="left")
        figure.supxlabel(
            "mean over seeds with its 95 % interval, and each seed (small); to the right is better", fontsize=9
        )
        save(figure, path)
    return path


def section(folder: Path) -> str:
    """The main job's part of the page of results."""
    store = Store(folder)
    frame = store.frame()
    if frame.empty:
        return ""
    draw(frame, folder / "main.png")
    return (
        f"## The main job\n\n`{store.described()['made_by'][-1]['command']}`, {frame['seed'].nunique()} seeds.\n\n"
        f"{report.markdown_table([list(COLUMNS), *numbers(frame)])}\n"
        f"![four situations on digits]({folder.name}/main.png)\n\n"
    )

"""How a gain depends on how much is wrong or rare, and on how many rows are trusted: one table and one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.methods import DEFAULT, PLAIN, TRUSTED
from benchmarks.problems import Setting
from benchmarks.report import BLUE, GREEN, ORANGE, STYLE, difference, interval, save, shown_difference

TUNED = f"{PLAIN.name}, tuned"


@dataclass(frozen=True)
class Sweep:
    """A problem in several amounts, each with several numbers of trusted rows.

    Attributes:
        name: of the problem.
        amounts: the setting without trusted rows, by its amount.
        trusted: numbers of trusted rows, from 0.
        unit: what the numbers are called where they are shown.
    """

    name: str
    amounts: Mapping[str, Setting]
    trusted: Sequence[int]
    unit: str = "trusted rows"

    def named(self, amount: str, trusted: int) -> Setting:
        """One setting of the sweep."""
        return replace(self.amounts[amount], name=f"{self.name}, {amount}, {trusted} trusted", trusted=trusted)

    @property
    def settings(self) -> list[Setting]:
        """All of them, amount by amount."""
        return [self.named(amount, trusted) for amount in self.amounts for trusted in self.trusted]


def reweighted(setting: Setting) -> str:
    """The library as it comes, with the trusted rows if there are any."""
    return TRUSTED.name if setting.trusted else DEFAULT.name


def table(sweeps: Sequence[Sweep], parts: Mapping[str, pd.DataFrame], others: Sequence[str]) -> pd.DataFrame:
    """A row for each setting: plain training, and points over it, bold where the interval leaves zero out.

    Args:
        parts: the runs by setting.
        others: further methods that have a column.
    """

    def over(part: pd.DataFrame, method: str, other: str, minus: str = "") -> str:
        if not {method, other} <= set(part["method"]):
            return ""
        return shown_difference(part, method, other, "accuracy", minus)

    rows = []
    for sweep in sweeps:
        for setting in sweep.settings:
            if setting.name not in parts:
                continue
            part, own = parts[setting.name], reweighted(setting)
            plain = part[part["method"] == PLAIN.name]
            rows.append(
                {
                    "": setting.name,
                    "plain, %": interval(plain["accuracy"]).shown(".1f", 100.0),
                    "at its best epoch, %": f"{100.0 * plain['best_accuracy'].mean():.1f}",
                    "plain, tuned, minus plain": over(part, TUNED, PLAIN.name),
                    **{f"{method}, minus plain": over(part, method, PLAIN.name) for method in others},
                    "reweighted, minus plain": over(part, own, PLAIN.name),
                    "minus its best epoch": over(part, own, PLAIN.name, "best_accuracy"),
                    "minus plain, tuned": over(part, own, TUNED),
                }
            )
    return pd.DataFrame(rows)


def draw(sweeps: Sequence[Sweep], parts: Mapping[str, pd.DataFrame], path: Path, columns: int = 3) -> None:
    """A panel for each sweep that was run: points over plain training by the number of trusted rows, a line for each
    amount."""
    sweeps = [sweep for sweep in sweeps if any(setting.name in parts for setting in sweep.settings)]
    columns = min(columns, len(sweeps))
    rows = -(-len(sweeps) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(3.9 * columns, 0.6 + 3.2 * rows), squeeze=False, layout="constrained", dpi=150
        )
        for axes, sweep in zip(grid.flat, sweeps, strict=False):
            _panel(axes, sweep, parts)
        for axes in grid.flat[len(sweeps) :]:
            axes.set_visible(False)
        for line in grid:
            line[0].set_ylabel("points over plain training")
        figure.supxlabel(
            "Solid: the library as it comes, with the trusted rows as validation, mean and 95 % interval. Dashed: "
            "plain training at its best rate and decay.\nEvery method trains on the trusted rows too.",
            fontsize=9,
            color="#555555",
        )
        save(figure, path)


def _panel(axes: Axes, sweep: Sweep, parts: Mapping[str, pd.DataFrame]) -> None:
    axes.axhline(0.0, color="#BBBBBB", lw=0.8)
    for number, (amount, colour) in enumerate(zip(sweep.amounts, (BLUE, GREEN, ORANGE), strict=False)):
        named = enumerate(sweep.named(amount, trusted) for trusted in sweep.trusted)
        run = [(place + 0.08 * (number - 1), setting) for place, setting in named if setting.name in parts]
        if not run:
            continue
        places = [place for place, _ in run]
        own = [difference(parts[each.name], reweighted(each), PLAIN.name, "accuracy") for _, each in run]
        tuned = [difference(parts[each.name], TUNED, PLAIN.name, "accuracy") for _, each in run]
        means, halves = [100.0 * each.mean for each in own], [100.0 * np.nan_to_num(each.half) for each in own]
        axes.errorbar(places, means, halves, color=colour, lw=2.0, elinewidth=1.0, marker="o", ms=5, label=amount)
        axes.plot(places, [100.0 * each.mean for each in tuned], "--", color=colour, lw=1.0, alpha=0.7)
    axes.set_xticks(range(len(sweep.trusted)), [f"{number:,}" if number else "none" for number in sweep.trusted])
    axes.set_xlabel(sweep.unit)
    axes.set_title(sweep.name, fontsize=10)
    axes.legend(frameon=False, fontsize=9)

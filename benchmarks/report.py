"""What stored runs say: t intervals, differences paired by seed, tables in Markdown and on the screen, figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.store import write

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}
GREY, BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = [
    "#666666",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

NAMES = {
    "accuracy": "accuracy, %",
    "balanced": "balanced accuracy, %",
    "worst_class": "worst class, %",
    "worst_group": "worst group, %",
    "selection": "selection rows, %",
    "best_accuracy": "at its best epoch, %",
    "hard_third": "hard third, %",
    "middle_third": "middle third, %",
    "easy_third": "easy third, %",
    "train_accuracy": "fits of its rows, %",
    "margin": "margin",
    "nll": "NLL",
    "ece": "calibration error, %",
    "weight_sd": "spread of weights",
    "seconds": "seconds",
    "accuracy_noise": "on noise, %",
    "accuracy_blur": "on blur, %",
    "accuracy_contrast": "on contrast, %",
    "accuracy_pixelate": "on pixelation, %",
}


@dataclass(frozen=True)
class Interval:
    """``mean ± half``; half is NaN where one value alone says nothing of its spread."""

    mean: float
    half: float
    count: int = 0

    @property
    def clear(self) -> bool:
        """Whether it leaves zero out."""
        return abs(self.mean) > self.half

    def shown(self, form: str = ".1f", scale: float = 1.0) -> str:
        """For instance ``97.1 ± 0.3``, by a format such as ``.1f``."""
        if np.isnan(self.mean):
            return "–"
        half = "–" if np.isnan(self.half) else f"{scale * self.half:{form.removeprefix('+')}}"
        return f"{scale * self.mean:{form}} ± {half}"


def interval(values: Any, confidence: float = 0.95) -> Interval:
    """The mean with Student's t interval, ``t_{n−1} · s / √n`` to both sides; values that are NaN do not count."""
    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2:
        return Interval(float(sample[0]) if len(sample) else np.nan, np.nan, len(sample))
    quantile = scipy.stats.t.ppf((1.0 + confidence) / 2.0, len(sample) - 1)
    return Interval(float(sample.mean()), float(quantile * scipy.stats.sem(sample)), len(sample))


def difference(part: pd.DataFrame, method: str, other: str, measure: str, minus: str = "") -> Interval:
    """Of one setting, paired by seed.

    Args:
        part: rows of one setting.
        minus: the other's column; the same by default.
    """
    a = part[part["method"] == method].set_index("seed")[measure]
    b = part[part["method"] == other].set_index("seed")[minus or measure]
    return interval((a - b).dropna())


def shown_difference(part: pd.DataFrame, method: str, other: str, measure: str, minus: str = "") -> str:
    """:func:`difference` as tables have it, bold where the interval leaves zero out."""
    factor, form = scale_of(measure)
    change = difference(part, method, other, measure, minus)
    text = change.shown(f"+{form}", factor)
    return f"**{text}**" if change.clear else text


def with_winners(frame: pd.DataFrame, families: dict[str, str]) -> pd.DataFrame:
    """The members of each family replaced by the one that is best on the selection rows, as ``FAMILY, tuned``.

    Args:
        frame: of all runs.
        families: family by method.
    """
    parts = [frame[~frame["method"].isin(families)]]
    for setting in frame["setting"].unique():
        for family in dict.fromkeys(families.values()):
            names = [name for name, own in families.items() if own == family]
            own = frame[(frame["setting"] == setting) & frame["method"].isin(names)]
            if len(own):
                best = winner(own)
                parts.append(own[own["method"] == best].assign(method=f"{family}, tuned", winner=best))
    return pd.concat(parts, ignore_index=True)


def winner(frame: pd.DataFrame) -> str:
    """The method with the highest mean accuracy on the selection rows."""
    return str(frame.groupby("method")["selection"].mean().idxmax())


def scale_of(measure: str) -> tuple[float, str]:
    """The factor and format in which a measure is shown."""
    percent = NAMES.get(measure, measure).endswith("%")
    return (100.0, ".1f") if percent else (1.0, ".1f" if measure == "seconds" else ".3f")


def table(part: pd.DataFrame, methods: Sequence[str], measures: Sequence[str], baseline: str = "plain") -> pd.DataFrame:
    """One setting: a row for each method, the first measure also as differences from the baseline, bold where clear."""
    main, *others = [measure for measure in measures if measure in part and part[measure].notna().any()]
    tuned = f"{baseline}, tuned"
    rows = []
    for method in methods:
        own = part[part["method"] == method]
        if own.empty:
            continue
        factor, form = scale_of(main)
        row = {"": method, NAMES.get(main, main): interval(own[main]).shown(form, factor)}
        for other in (baseline, tuned):
            if other in set(part["method"]):
                row[f"minus {other}"] = "" if method == other else shown_difference(part, method, other, main)
        for measure in others:
            factor, form = scale_of(measure)
            row[NAMES.get(measure, measure)] = f"{factor * own[measure].mean():{form}}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(frame.columns) - 1)]
    rows = [list(frame.columns), rule, *frame.astype(str).to_numpy().tolist()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as Markdown."""
    head, *others = rows
    return markdown(pd.DataFrame(others, columns=pd.Index(head)))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, at once, and let go of it."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    write(path, image.getvalue())


def colour_of(method: str) -> str:
    """Grey for plain training, others by what they are."""
    for word, colour in (
        ("plain", GREY),
        ("random w", YELLOW),
        ("shuffled", PINK),
        ("trusted", GREEN),
        ("default", ORANGE),
    ):
        if word in method:
            return colour
    return BLUE


def forest(axes: Axes, part: pd.DataFrame, methods: Sequence[str], measure: str, baseline: str | None) -> None:
    """Each method's mean, or paired difference from a baseline, with its interval and its seeds.

    Args:
        axes: to draw on.
        part: rows of one setting.
        methods: from top to bottom; those without runs keep their place.
        measure: a column.
        baseline: a method, or None for the values themselves.
    """
    factor, form = scale_of(measure)
    pivoted = factor * part.pivot(index="seed", columns="method", values=measure)
    if baseline:
        pivoted = pivoted.sub(pivoted[baseline], axis=0)
        axes.axvline(0.0, color="#BBBBBB", lw=0.8)
    for place, method in enumerate(methods):
        if method not in pivoted or method == baseline:
            continue
        values = pivoted[method].dropna().to_numpy()
        mean = interval(values)
        colour = colour_of(method)
        half = np.nan_to_num(mean.half)
        axes.hlines(place, mean.mean - half, mean.mean + half, color=colour, lw=2.4)
        axes.plot(values, np.full(len(values), place - 0.27), "o", color=colour, ms=3, alpha=0.5, mew=0)
        axes.plot(mean.mean, place, "o", color=colour, ms=7, mec="white", mew=1.0, zorder=3)
        axes.annotate(
            f"{mean.mean:{'+' if baseline else ''}{form}}",
            (mean.mean, place),
            (0, -7),
            textcoords="offset points",
            ha="center",
            va="top",
            color=colour,
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.05", "color": "white"},
            zorder=2,
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)


def panels(
    parts: Sequence[tuple[str, pd.DataFrame]],
    methods: Sequence[str],
    measure: str,
    path: Path,
    *,
    baseline: str | None = "plain",
    columns: int = 2,
    title: str = "",
    note: str = "",
) -> None:
    """One panel for each setting, with the methods that it has."""
    shown = [[m for m in methods if m != baseline and (part["method"] == m).any()] for _, part in parts]
    columns = min(columns, len(parts))
    heights = [0.9 + 0.36 * max(map(len, shown[start : start + columns])) for start in range(0, len(parts), columns)]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(heights),
            columns,
            figsize=(1.0 + 5.0 * columns, 0.7 + sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
            dpi=150,
        )
        for axes, (name, part), own in zip(grid.flat, parts, shown, strict=False):
            forest(axes, part, own, measure, baseline)
            axes.set_title(name, fontsize=10)
        for axes in grid.flat[len(parts) :]:
            axes.set_visible(False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="#333333")
        measured = NAMES.get(measure, measure)
        said = f"{measured}: minus {baseline}, paired" if baseline else measured
        figure.supxlabel(f"{said}; mean, 95 % interval, and each seed (small). {note}", fontsize=9, color="#555555")
        save(figure, path)


def buckets(parts: Sequence[tuple[str, pd.DataFrame]], methods: Sequence[str], path: Path, count: int = 10) -> None:
    """Change of the mean test margin against plain training, in buckets of a reference model's margin."""
    centres = np.linspace(-1.0 + 1.0 / count, 1.0 - 1.0 / count, count)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(parts), figsize=(2 + 3 * len(parts), 3.6), sharey=True, squeeze=False, layout="constrained", dpi=150
        )
        for axes, (name, part) in zip(grid[0], parts, strict=True):
            axes.axhline(0.0, color="#BBBBBB", lw=0.8)
            for colour, method in zip((YELLOW, SKY, ORANGE, BLUE, GREEN, PINK), methods, strict=False):
                if method in set(part["method"]):
                    changes = [difference(part, method, "plain", f"margin_{bucket}").mean for bucket in range(count)]
                    axes.plot(centres, changes, "o-", color=colour, ms=3.5, lw=1.6, label=method)
            axes.set_title(name, fontsize=10)
        grid[0][0].set_ylabel("margin minus plain's")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        figure.supxlabel("margin of the test instance under another plain model", fontsize=9)
        save(figure, path)

"""The picture of a comparison: accuracy by method, and where each method moves the test margins."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.isotonic import isotonic_regression

from benchmarks.results import Margins, Runs, Summary, write

COLOURS = {
    "ERM": "#555555",
    "LRW-Easy": "#E69F00",
    "LRW-Random": "#56B4E9",
    "LRW-Hard": "#0072B2",
    "MOLERE": "#D55E00",
}
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

EDGES = np.linspace(-1.0, 1.0, 11)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
REFERENCE = "ERM, other seed"
Buckets = NDArray[np.float64]  # one number for each bucket

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


_COUNT: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": "#999999"}


def changes_by_bucket(before: Sequence[Margins], after: Sequence[Margins]) -> tuple[Buckets, Buckets]:
    """The mean change of margin in ten buckets of the margin before, over all seeds together.

    Args:
        before: ``(N,)`` margins for each seed.
        after: ``(N,)`` margins of the same instances.

    Returns:
        ``(10,)`` mean changes, NaN where a bucket is empty, and ``(10,)`` instances in each bucket, a mean over seeds.
    """
    old, new = np.concatenate(before).astype(float), np.concatenate(after).astype(float)
    bucket = np.clip(np.digitize(old, EDGES) - 1, 0, len(EDGES) - 2)
    counts = np.bincount(bucket, minlength=len(EDGES) - 1)
    totals = np.bincount(bucket, weights=new - old, minlength=len(EDGES) - 1)
    means = np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return means, counts / len(before)


def draw(runs: Runs, summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Draw the finished runs into a PNG."""
    frame = runs.frame()
    margins = {
        (method, seed): runs.test_margins(method, seed)
        for method, seed in zip(frame["method"], frame["seed"], strict=True)
    }
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.0, 3.9), width_ratios=(1.0, 1.25), layout="constrained", dpi=200
        )
        _accuracy_panel(left, frame, summaries)
        _margin_panel(right, margins)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="#555555")
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, at once, and let go of it."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    write(path, image.getvalue())


def _accuracy_panel(axes: Axes, frame: pd.DataFrame, summaries: Sequence[Summary]) -> None:
    """Mean and 95 % interval of each method, its seeds as small dots above."""
    names = [summary.method for summary in summaries]
    for place, summary in enumerate(summaries):
        colour = COLOURS[summary.method]
        seeds = 100 * frame.loc[frame["method"] == summary.method, "accuracy"]
        mean, half = 100 * summary.accuracy.mean, 100 * np.nan_to_num(summary.accuracy.half)
        axes.hlines(place, mean - half, mean + half, color=colour, lw=2.2)
        axes.plot(mean, place, "o", color=colour, ms=7, mec="white", mew=1.2, zorder=3)
        axes.plot(seeds, np.full(len(seeds), place - 0.24), "o", color=colour, ms=3.5, alpha=0.5, mew=0)
        axes.annotate(
            f"{mean:.2f}",
            (mean, place),
            (0, -7),
            textcoords="offset points",
            ha="center",
            va="top",
            color=colour,
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.1", "color": "white"},
        )
    if names[0] == "ERM":
        axes.axvline(100 * summaries[0].accuracy.mean, color="#BBBBBB", lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels():
        label.set_color(COLOURS[label.get_text()])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title("Test accuracy, %")
    axes.set_xlabel("mean, 95 % interval, and each seed (small)")


def _margin_panel(axes: Axes, margins: Mapping[tuple[str, int], Margins]) -> None:
    """Mean change of margin by bucket of ERM's margin, one line for each method."""
    lines, counts = _margin_lines(margins)
    axes.hlines(0.0, -1.0, 1.0, color="#BBBBBB", lw=0.8)
    for name, means in lines.items():
        shown = np.isfinite(means)
        look: dict[str, Any] = {"color": "#999999", "lw": 1.2, "ls": (0, (3, 2))}
        if name != REFERENCE:
            look = {"color": COLOURS[name], "lw": 1.8, "marker": "o", "ms": 3.5}
        axes.plot(CENTRES[shown], means[shown], **look)
    axes.set_xlim(-2.05, 1.0)  # room for the names
    axes.spines["bottom"].set_bounds(-1.0, 1.0)
    axes.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    axes.set_title("Change of test margin against ERM")
    axes.set_xlabel("ERM's margin of the test instance; grey: instances", loc="right")
    if lines:
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.1 * (high - low), high)  # room for the counts
        _label_lines(axes, lines)
        for centre, count in zip(CENTRES, counts, strict=True):
            axes.text(centre, 0.02, _shown(count), **_COUNT, transform=axes.get_xaxis_transform())


def _shown(count: float) -> str:
    """A count in at most four characters; nothing for none."""
    if count < 1000:
        return f"{count:.0f}" if count else ""
    return f"{count / 1000:.1f}k" if count < 9950 else f"{count / 1000:.0f}k"


def _margin_lines(
    margins: Mapping[tuple[str, int], Margins],
) -> tuple[dict[str, Buckets], Buckets]:
    """The changes of margin for each method with an ERM run beside it, and the size of each bucket.

    Margins regress to their mean whenever a model is trained again, so ERM with another seed stands beside the methods.
    """
    seeds = [seed for method, seed in margins if method == "ERM"]
    pairs = {
        method: [(("ERM", seed), (method, seed)) for seed in seeds if (method, seed) in margins]
        for method in COLOURS
        if method != "ERM"
    }
    if len(seeds) > 1:
        others = seeds[1:] + seeds[:1]
        pairs = {REFERENCE: [(("ERM", s), ("ERM", t)) for s, t in zip(seeds, others, strict=True)]} | pairs
    lines, counts = {}, np.zeros(len(CENTRES))
    for name, pair in pairs.items():
        if pair:
            lines[name], found = changes_by_bucket([margins[a] for a, _ in pair], [margins[b] for _, b in pair])
            counts = counts if counts.any() else found
    return lines, counts


def _label_lines(axes: Axes, lines: Mapping[str, Buckets]) -> None:
    """Each line's name left of its start, moved no further than it takes to keep the names apart."""
    starts = {name: int(np.flatnonzero(np.isfinite(means))[0]) for name, means in lines.items()}
    names = sorted(lines, key=lambda name: -lines[name][starts[name]])
    low, high = axes.get_ylim()
    spread = 0.085 * (high - low) * np.arange(len(names))
    wanted = np.array([lines[name][starts[name]] for name in names])
    # Names at least one spacing apart and as near to where they belong as that allows: an isotonic regression.
    places = isotonic_regression(wanted + spread, increasing=False) - spread
    for name, place, start in zip(names, places, wanted, strict=True):
        colour = COLOURS.get(name, "#888888")
        axes.text(-1.2, place, name, ha="right", va="center", fontsize=9, color=colour)
        axes.plot([-1.17, CENTRES[starts[name]] - 0.05], [place, start], color=colour, lw=0.6, alpha=0.6)

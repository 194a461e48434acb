"""The pictures of the cost: of a step beside the peers', and how it grows with each thing that is varied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.figures import COLOURS, STYLE, save

FREQUENCIES = {"every 5": "o", "every 1": "D"}


def draw_steps(columns: Mapping[str, pd.DataFrame], methods: Sequence[str], path: Path) -> None:
    """Draw and store what a step costs, a panel for each model and optimizer.

    Args:
        columns: by the panel's title, ``contender``, ``low``, ``median``, ``high``.
        methods: from top to bottom, the first ours.
        path: of the PNG.
    """
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 4, figsize=(11, 4.6), sharex=True, sharey=True, layout="constrained", dpi=150)
        for axes, (title, ratios) in zip(grid.flat, columns.items(), strict=False):
            for row, method in enumerate(methods):
                colour = COLOURS["MOLERE" if row == 0 else "LRW-Hard"]
                for often, marker in FREQUENCIES.items():
                    for found in ratios[ratios.contender.str.startswith(f"{method}, {often}")].itertuples():
                        axes.plot([found.low, found.high], [row, row], color=colour, linewidth=2, alpha=0.5)
                        axes.plot(found.median, row, color=colour, marker=marker, markersize=5)
                        axes.annotate(
                            f"{found.median:.2f}",
                            (found.median, row),
                            (0, 5),
                            textcoords="offset points",
                            color=colour,
                            fontsize=8,
                            ha="center",
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # above the line at 1
                        )
            axes.axvline(1.0, color=COLOURS["ERM"], linewidth=0.8, linestyle="--")
            axes.set(title=title, yticks=range(len(methods)), yticklabels=methods, xlim=(0.4, None))
            axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
            axes.tick_params(labelbottom=True)
        grid.flat[0].set_ylim(len(methods) - 0.6, -0.7)  # the first on top
        legend, *others = grid.flat[len(columns) :]
        for axes in (legend, *others):
            axes.axis("off")
        marks = [
            Line2D([], [], color="#555555", marker=m, linewidth=2, label=often) for often, m in FREQUENCIES.items()
        ]
        legend.legend(handles=marks, title="a meta-update", loc="center", frameon=False, alignment="left")
        figure.supxlabel("time of a step relative to ERM: median and quartiles", fontsize=10, color="#333333")
        save(figure, path)


def draw_growth(frame: pd.DataFrame, ratios: pd.DataFrame, path: Path) -> None:
    """Draw and store the growth plots.

    Args:
        frame: the stored rows, of which the buffer's operations are drawn in microseconds.
        ratios: ``varied``, ``value``, ``contender``, ``low``, ``median``, ``high``: MOLERE's steps beside ERM's.
        path: of the PNG.
    """
    ours = ratios[ratios.contender == "MOLERE"]
    buffer = frame[frame.varied == "buffer capacity"]
    with plt.rc_context(STYLE):
        panels = list(ours.varied.unique())
        figure, grid = plt.subplots(2, (len(panels) + 2) // 2, figsize=(11, 5.6), layout="constrained", dpi=150)
        for axes, varied in zip(grid.flat, panels, strict=False):
            part = ours[ours.varied == varied].astype({"value": float})
            axes.fill_between(part.value, part.low, part.high, color=COLOURS["MOLERE"], alpha=0.2, linewidth=0)
            axes.plot(part.value, part["median"], color=COLOURS["MOLERE"], marker="o", markersize=4)
            axes.axhline(1.0, color=COLOURS["ERM"], linewidth=0.8, linestyle="--")
            axes.set(title=varied, ylim=(0.9, max(1.6, 1.05 * part.high.max())))
            _logarithmic(axes, part.value)
        grid.flat[0].set_ylabel("time of a step relative to ERM")
        grid.flat[3].set_ylabel("time of a step relative to ERM")
        axes = grid.flat[len(panels)]
        for name, colour in zip(("insert", "draw", "release"), ("#0072B2", "#009E73", "#CC79A7"), strict=True):
            medians = buffer[buffer.contender == name].groupby("value").seconds.median() * 1e6
            axes.plot(medians.index, medians, color=colour, marker="o", markersize=4)
            axes.annotate(
                name,
                (medians.index[-1], medians.iloc[-1]),
                (6, 0),
                textcoords="offset points",
                color=colour,
                va="center",
            )
        axes.set(title="buffer capacity", ylabel="µs, 13 in, 128 drawn, 13 out", ylim=(0, None))
        _logarithmic(axes, medians.index)
        axes.margins(x=0.25)
        save(figure, path)


def _logarithmic(axes: Axes, values: pd.Index | pd.Series) -> None:
    axes.set_xscale("log")
    axes.set_xticks(list(values), [_short(value) for value in values])
    axes.minorticks_off()


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"

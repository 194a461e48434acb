"""The picture of how the cost grows: one panel for each thing that is varied."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.figures import COLOURS, STYLE, save


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

"""The pictures of the cost: of a step beside the peers', and how it grows with each thing that is varied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.report import BLUE, GREY, ORANGE, STYLE, save


def draw_steps(parts: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw and store what a step costs, a panel for each model and optimizer.

    Args:
        parts: by the panel's title, ``contender``, ``low``, ``median``, ``high``.
        path: of the PNG.
    """
    names = list(dict.fromkeys(name for part in parts.values() for name in part.contender if name != "ERM"))
    columns = min(4, len(parts))
    rows = -(-len(parts) // columns)
    with plt.rc_context(STYLE):
        size = (2.0 + 2.4 * columns, 0.7 + rows * (0.7 + 0.3 * len(names)))
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained", dpi=150
        )
        for axes, (title, part) in zip(grid.flat, parts.items(), strict=False):
            for found in part[part.contender != "ERM"].itertuples():
                row, colour = names.index(found.contender), ORANGE if "MOLERE" in found.contender else BLUE
                axes.plot([found.low, found.high], [row, row], color=colour, linewidth=2, alpha=0.5)
                axes.plot(found.median, row, "o", color=colour, markersize=5)
                place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{found.median:.2f}", (found.median, row), color=colour, fontsize=8, **place)
            axes.axvline(1.0, color=GREY, linewidth=0.8, linestyle="--")
            axes.set(title=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.6, -0.8))
        for axes in grid.flat[len(parts) :]:
            axes.set_visible(False)
        figure.supxlabel("time of a step relative to ERM: median and quartiles", fontsize=10, color="#333333")
        save(figure, path)


def draw_growth(ratios: pd.DataFrame, path: Path) -> None:
    """Draw and store the growth plots.

    Args:
        ratios: ``varied``, ``value``, ``contender``, ``low``, ``median``, ``high``: MOLERE's steps beside ERM's.
        path: of the PNG.
    """
    ours = ratios[ratios.contender == "MOLERE"]
    panels = list(ours.varied.unique())
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            1, len(panels), figsize=(2.6 * len(panels), 2.8), squeeze=False, layout="constrained", dpi=150
        )
        for axes, varied in zip(grid[0], panels, strict=True):
            part = ours[ours.varied == varied]
            axes.fill_between(part.value, part.low, part.high, color=ORANGE, alpha=0.2, linewidth=0)
            axes.plot(part.value, part["median"], color=ORANGE, marker="o", markersize=4)
            axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle="--")
            axes.set(title=varied, ylim=(0.9, max(1.6, 1.05 * part.high.max())), xscale="log")
            axes.set_xticks(list(part.value), [f"{value:,}" for value in part.value], fontsize=8)
            axes.minorticks_off()
        grid[0][0].set_ylabel("time of a step relative to ERM")
        save(figure, path)

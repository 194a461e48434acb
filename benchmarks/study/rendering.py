"""Tables, figures and ``benchmarks/results/README.md``, from the stored files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.figures import STYLE, save
from benchmarks.provenance import machine_name
from benchmarks.results import Interval, interval, markdown_table, write
from benchmarks.study import claims, overhead, people
from benchmarks.study.claims import LEAST_SEEDS, difference, reported
from benchmarks.study.problems import Setting
from benchmarks.study.store import Stored
from benchmarks.study.studies import STUDIES, Study

NAMES = {
    "accuracy": "accuracy, %",
    "balanced_accuracy": "balanced accuracy, %",
    "worst_class": "worst class, %",
    "margin": "margin",
    "hard_third_by_margin": "hard third, %",
    "easy_third_by_margin": "easy third, %",
    "hard_third_by_loss": "hard third by loss, %",
    "train_accuracy": "train accuracy, %",
    "nll": "NLL",
    "ece": "ECE, %",
    "brier": "Brier",
    "accuracy_seen": "shifts seen, %",
    "accuracy_unseen": "shifts unseen, %",
    "easy_third_by_loss": "easy third by loss, %",
    "gap": "gap of the losses",
    "accuracy_stable": "stopped at a stable gap, %",
    "epoch_stable": "its epoch",
    "accuracy_least": "stopped at the least loss, %",
    "epoch_least": "its epoch",
}
COLUMNS = 4
"""Of panels, where a figure has one measure."""

COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#A6761D", "#C5B0D5")


def _shown(value: Interval, measure: str, sign: str = "") -> str:
    percent = NAMES[measure].endswith("%")
    digits = 1 if measure.startswith("epoch") else 3
    return value.shown(f"{sign}.2f", 100) if percent else value.shown(f"{sign}.{digits}f")


def table(part: pd.DataFrame, chosen: Study) -> str:
    """Methods by measures: the baseline's values, and the other methods' paired differences from them.

    A difference whose interval leaves zero out is bold.
    """
    methods = [method.name for method in chosen.methods if method.name in set(part["method"])]
    measures = [measure for measure in chosen.measures if measure in part and part[measure].notna().any()]
    rows = [["", *(NAMES[measure] for measure in measures)]]
    for method in methods:
        own = part[part["method"] == method]
        cells = []
        for measure in measures:
            if method == "ERM":
                cells.append(_shown(interval(own[measure].to_numpy()), measure))
                continue
            change = difference(part, method, measure)
            text = _shown(change, measure, "+")
            cells.append(f"**{text}**" if abs(change.mean) > change.half else text)
        rows.append([method, *cells])
    return markdown_table(rows)


def _panel(axes: Axes, part: pd.DataFrame, setting: str, methods: Sequence[str], measure: str) -> None:
    """Each method's paired difference from plain training, with its interval and its seeds."""
    percent = 100 if NAMES[measure].endswith("%") else 1
    pivoted = part.pivot(index="seed", columns="method", values=measure)
    axes.axvline(0.0, color="#BBBBBB", lw=0.8)
    for place, method in enumerate(methods):
        if method not in pivoted:
            continue
        changes = percent * (pivoted[method] - pivoted["ERM"]).to_numpy()
        change = interval(changes)
        colour = "#999999" if method.startswith("ERM") else COLOURS[1] if method.startswith("MOLERE") else COLOURS[2]
        axes.hlines(place, change.mean - change.half, change.mean + change.half, color=colour, lw=2.2)
        axes.plot(change.mean, place, "o", color=colour, ms=6, mec="white", zorder=3)
        axes.plot(changes, np.full(len(changes), place - 0.28), "o", color=colour, ms=3, alpha=0.5, mew=0)
    axes.set_title(f"{setting}\n(ERM {percent * pivoted['ERM'].mean():.{1 if percent == 100 else 3}f})", fontsize=9)


def figure(parts: Sequence[tuple[str, pd.DataFrame]], chosen: Study, path: Path) -> None:
    """One panel for each setting and each measure drawn: a row of them a measure, or of one measure several."""
    present = set().union(*(set(part["method"]) for _, part in parts))
    methods = [method.name for method in chosen.methods if method.name in present and method.name != "ERM"]
    cells = [(measure, *part) for measure in chosen.measures[: chosen.drawn] for part in parts]
    columns = min(len(parts), COLUMNS) if chosen.drawn == 1 else len(parts)
    rows = -(-len(cells) // columns)
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(
            rows,
            columns,
            figsize=(2.6 + 2.4 * columns, 0.5 + rows * (0.8 + 0.36 * len(methods))),
            sharey=True,
            squeeze=False,
            layout="constrained",
            dpi=150,
        )
        for axes, (measure, setting, part) in zip(panels.flat, cells, strict=False):
            _panel(axes, part, setting, methods, measure)
        for axes in panels.flat[len(cells) :]:
            axes.set_visible(False)
        for row, first in enumerate(panels[:, 0]):
            first.set_yticks(range(len(methods)), methods)
            first.set_ylim(len(methods) - 0.5, -0.6)
            if chosen.drawn > 1:
                first.set_ylabel(NAMES[chosen.measures[row]])
        names = NAMES[chosen.measures[0]] if chosen.drawn == 1 else "each"
        drawn.supxlabel(f"{names}: minus ERM, paired; 95 % interval, each seed small", fontsize=9)
        save(drawn, path)


def margin_figure(parts: Sequence[tuple[str, pd.DataFrame]], chosen: Study, path: Path) -> None:
    """Change of mean margin against plain training, in buckets of a reference model's margin."""
    centres = np.linspace(-0.9, 0.9, 10)
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(
            1,
            len(parts),
            figsize=(3.4 + 3.1 * len(parts), 3.6),
            sharey=True,
            squeeze=False,
            layout="constrained",
            dpi=150,
        )
        for axes, (setting, part) in zip(panels[0], parts, strict=True):
            axes.axhline(0.0, color="#BBBBBB", lw=0.8)
            names = [m.name for m in chosen.methods if m.weighs != "equally" and m.name in set(part["method"])]
            for place, name in enumerate(names, start=1):
                changes = [difference(part, name, f"margin_bucket_{bucket}").mean for bucket in range(10)]
                axes.plot(centres, changes, "o-", color=COLOURS[place], ms=3.5, lw=1.6, label=name)
            axes.set_xticks((-0.8, -0.4, 0.0, 0.4, 0.8))
            axes.set_title(setting, fontsize=9)
        panels[0][0].set_ylabel("margin minus ERM's")
        drawn.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        drawn.supxlabel("margin of the test instance under the reference model", fontsize=9)
        save(drawn, path)


def gap_figure(parts: Sequence[tuple[str, pd.DataFrame]], chosen: Study, path: Path) -> None:
    """The gap between validation and training loss, and the test accuracy, over the epochs."""
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(
            2,
            len(parts),
            figsize=(1.2 + 2.6 * len(parts), 5.0),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
            dpi=150,
        )
        for column, (setting, part) in enumerate(parts):
            epochs = range(1, 1 + sum(name.startswith("gap_") for name in part.dropna(axis="columns")))
            means = part.groupby("method").mean(numeric_only=True)
            for colour, method in zip(COLOURS, chosen.methods, strict=False):
                for row, (kind, scale) in enumerate((("gap", 1), ("accuracy", 100))):
                    values = [scale * means.loc[method.name, f"{kind}_{epoch}"] for epoch in epochs]
                    panels[row][column].plot(epochs, values, color=colour, lw=1.6, label=method.name)
            panels[0][column].set_title(setting, fontsize=9)
        panels[0][0].set_ylabel("validation minus training loss")
        panels[1][0].set_ylabel("test accuracy, %")
        panels[0][0].legend(frameon=False, fontsize=8)
        drawn.supxlabel("epoch", fontsize=9)
        save(drawn, path)


def _model(setting: Setting) -> str:
    if setting.model == "mlp":
        return f"MLP {setting.hidden}"
    return setting.model if setting.side is None else f"{setting.model} on {setting.side}×{setting.side} pixels"


def section(chosen: Study, folder: Path) -> str:
    """A study's part of the README, its figures drawn; empty if nothing can be reported."""
    stored = Stored(folder)
    parts = reported(stored.frame(), chosen)
    if not parts:
        return ""
    config: dict[str, Any] = json.loads(stored.config.read_text(encoding="utf-8"))
    drawn = f"{chosen.name if chosen.shares else 'differences'}.png"
    figure(parts, chosen, folder / drawn)
    text = (
        f"## `{chosen.name}`\n\n{chosen.question}\n\n"
        f"Judged on the {config['data']['judged_on']} ({config['data']['judged_rows']:,} instances with clean labels); "
        f"{machine_name(config)}. `{config['command']}`\n\n"
    )
    if chosen.finding:
        text += f"{chosen.finding}\n\n"
    for setting, part in parts:
        first = next(s for s in chosen.settings if s.name == setting)
        erm = part[part["method"] == "ERM"]
        text += (
            f"**{setting}**: {erm['train_rows'].iloc[0]:,} rows, {_model(first)}, {first.epochs} epochs, "
            f"{100 * erm['label_errors'].mean():.1f} % wrong labels; ERM fits "
            f"{100 * erm['train_accuracy'].mean():.1f} % of them; {part['seed'].nunique()} seeds.\n\n"
            f"{table(part, chosen)}\n"
        )
    text += f"![{chosen.name}: differences from plain training]({folder.name}/{drawn})\n\n"
    if chosen.margins:
        margin_figure(parts, chosen, folder / "margins.png")
        text += f"![{chosen.name}: change of margin]({folder.name}/margins.png)\n\n"
    if any(setting.validated for setting in chosen.settings):
        gap_figure(parts, chosen, folder / "epochs.png")
        text += f"![{chosen.name}: over the epochs]({folder.name}/epochs.png)\n\n"
    return text


def _by_seed(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The rows and the configuration of a study that is no list of single runs, if it has enough seeds."""
    stored = Stored(folder)
    frame = stored.frame()
    if frame["seed"].nunique() < LEAST_SEEDS:
        return None
    return frame, json.loads(stored.config.read_text(encoding="utf-8"))


def human_section(folder: Path) -> str:
    """Agreement with people, by score."""
    if (found := _by_seed(folder)) is None:
        return ""
    frame, config = found
    rows = [["score", "rank correlation", "AUROC", "average precision"]]
    for method, own in frame.groupby("method", sort=False):
        cells = [
            interval(own[name].dropna().to_numpy()).shown(".3f") for name in ("spearman", "auroc", "average_precision")
        ]
        rows.append([str(method), *cells])
    (setting,) = people.STUDY.settings
    wrong = 100 * frame["wrong"].mean()
    return (
        f"## `human`\n\n{people.STUDY.question}\n\n"
        f"{setting.rows:,} rows, MLP {setting.hidden}, {setting.epochs} epochs, {wrong:.1f} % "
        f"wrong labels, {frame['seed'].nunique()} seeds; larger is better. `{config['command']}`\n\n"
        f"{people.STUDY.finding}\n\n"
        f"{markdown_table(rows)}\n"
    )


def overhead_section(folder: Path) -> str:
    """Time and memory, by method."""
    if (found := _by_seed(folder)) is None:
        return ""
    frame, config = found
    rows = [["", *(f"{s.name}, {what}" for s in overhead.STUDY.settings for what in ("time", "added MB"))]]
    for method in overhead.STUDY.methods:
        cells = []
        for setting in overhead.STUDY.settings:
            part = frame[frame["setting"] == setting.name]
            seconds = part.pivot(index="seed", columns="method", values="seconds")
            cells.append(interval((seconds[method.name] / seconds["ERM"]).to_numpy()).shown(".2f"))
            cells.append(interval(part[part["method"] == method.name]["added"].to_numpy() / 1e6).shown(".1f"))
        rows.append([method.name, *cells])
    return (
        f"## `overhead`\n\n{overhead.STUDY.question}\n\n{frame['seed'].nunique()} seeds; {machine_name(config)}, "
        f"one thread. `{config['command']}`\n\n{overhead.STUDY.finding}\n\n{markdown_table(rows)}\n"
    )


HEAD = """# Results

Rendered from the stored files by `python -m benchmarks.study render`; do not edit by hand.

Everyone trains an MLP on fixed k-means features (in `architecture` another model, on the images themselves) with SGD,
with the same budget, initialisation and order of data for one seed; every seed draws its own training rows, so that
intervals (95 %, Student's t) cover the choice of data. Rows of a table after ERM's are **differences from ERM with the
same seed**, bold where the interval leaves zero out. Nothing is tuned on the test set: choices between variants were
made by the studies whose names begin with `select`, on rows held out of the training set. Hard and easy thirds are
those of another model, an MLP trained on all the rows that the runs draw theirs from. "MOLERE" alone is the library at
its defaults; every other method is without a floor of the weights unless its name gives one, as in the paper.

"""


def render(results: Path) -> None:
    """Write ``README.md`` in the folder of results, and every study's figures."""
    parts = [claims.section(results)]
    parts += [section(chosen, results / chosen.folder) for chosen in STUDIES.values()]
    parts += [human_section(results / "study-human"), overhead_section(results / "study-overhead")]
    write(results / "README.md", HEAD + "".join(parts).rstrip() + "\n")

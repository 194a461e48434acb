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
from benchmarks.results import Interval, interval, write
from benchmarks.study import people
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
}
LEAST_SEEDS = 3
"""With fewer in a setting, its runs are stored but not reported."""

COLOURS = ("#555555", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def difference(frame: pd.DataFrame, method: str, measure: str, baseline: str = "ERM") -> Interval:
    """A measure of a method minus the baseline's with the same seed, within one setting."""
    pivoted = frame.pivot(index="seed", columns="method", values=measure)
    if method not in pivoted or baseline not in pivoted:
        return Interval(np.nan, np.nan)
    return interval((pivoted[method] - pivoted[baseline]).dropna().to_numpy())


def reported(frame: pd.DataFrame, chosen: Study) -> list[tuple[str, pd.DataFrame]]:
    """The settings with enough seeds of plain training, each with the seeds that every one of its methods has."""
    parts = []
    for setting in chosen.settings:
        own = frame[frame["setting"] == setting.name]
        counts = own.groupby("seed")["method"].nunique()
        complete = own[own["seed"].isin(counts.index[counts == own["method"].nunique()])]
        if complete["seed"].nunique() >= LEAST_SEEDS:
            parts.append((setting.name, complete))
    return parts


def _shown(value: Interval, measure: str, sign: str = "") -> str:
    percent = NAMES[measure].endswith("%")
    return value.shown(f"{sign}.2f", 100) if percent else value.shown(f"{sign}.3f")


def table(part: pd.DataFrame, chosen: Study) -> str:
    """Methods by measures: the baseline's values, and the other methods' paired differences from them.

    A difference whose interval leaves zero out is bold.
    """
    methods = [method.name for method in chosen.methods if method.name in set(part["method"])]
    measures = [measure for measure in chosen.measures if measure in part and part[measure].notna().any()]
    rows = [["", *(NAMES[measure] for measure in measures)], ["---", *["---:"] * len(measures)]]
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
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
    """One panel for each setting, one row of them for each measure drawn."""
    present = set().union(*(set(part["method"]) for _, part in parts))
    methods = [method.name for method in chosen.methods if method.name in present and method.name != "ERM"]
    with plt.rc_context(STYLE):
        drawn, panels = plt.subplots(
            chosen.drawn,
            len(parts),
            figsize=(2.6 + 2.4 * len(parts), 0.5 + chosen.drawn * (0.8 + 0.36 * len(methods))),
            sharey=True,
            squeeze=False,
            layout="constrained",
            dpi=150,
        )
        for row, measure in zip(panels, chosen.measures, strict=False):
            for axes, (setting, part) in zip(row, parts, strict=True):
                _panel(axes, part, setting, methods, measure)
            row[0].set_yticks(range(len(methods)), methods)
            row[0].set_ylim(len(methods) - 0.5, -0.6)
            if chosen.drawn > 1:
                row[0].set_ylabel(NAMES[measure])
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
            figsize=(1.2 + 3.1 * len(parts), 3.6),
            sharey=True,
            squeeze=False,
            layout="constrained",
            dpi=150,
        )
        for axes, (setting, part) in zip(panels[0], parts, strict=True):
            axes.axhline(0.0, color="#BBBBBB", lw=0.8)
            names = [m.name for m in chosen.methods if m.weighs != "equally" and m.name in set(part["method"])]
            for colour, name in zip(COLOURS[1:], names, strict=False):
                changes = [difference(part, name, f"margin_bucket_{bucket}").mean for bucket in range(10)]
                axes.plot(centres, changes, "o-", color=colour, ms=3.5, lw=1.6, label=name)
            axes.set_title(setting, fontsize=9)
        panels[0][0].set_ylabel("margin minus ERM's")
        panels[0][-1].legend(frameon=False, fontsize=8)
        drawn.supxlabel("margin of the test instance under the reference model", fontsize=9)
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
    figure(parts, chosen, folder / "differences.png")
    text = (
        f"## `{chosen.name}`\n\n{chosen.question}\n\n"
        f"Judged on the {config['data']['judged_on']} ({config['data']['judged_rows']:,} instances with clean labels); "
        f"{config['machine']['cores']} cores of an {config['machine']['processor']}. `{config['command']}`\n\n"
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
    text += f"![{chosen.name}: differences from plain training]({folder.name}/differences.png)\n\n"
    if chosen.margins:
        margin_figure(parts, chosen, folder / "margins.png")
        text += f"![{chosen.name}: change of margin]({folder.name}/margins.png)\n\n"
    return text


def human_section(folder: Path) -> str:
    """Agreement with people, by score."""
    stored = Stored(folder)
    frame = stored.frame()
    if frame.empty or frame["seed"].nunique() < LEAST_SEEDS:
        return ""
    config: dict[str, Any] = json.loads(stored.config.read_text(encoding="utf-8"))
    rows = []
    for method, own in frame.groupby("method", sort=False):
        cells = [
            interval(own[name].dropna().to_numpy()).shown(".3f") for name in ("spearman", "auroc", "average_precision")
        ]
        rows.append(f"| {method} | {' | '.join(cells)} |\n")
    wrong = 100 * frame["wrong"].mean()
    return (
        f"## `human`\n\n{people.QUESTION}\n\n"
        f"{people.SETTING.rows:,} rows, MLP {people.SETTING.hidden}, {people.SETTING.epochs} epochs, {wrong:.1f} % "
        f"wrong labels, {frame['seed'].nunique()} seeds; larger is better. `{config['command']}`\n\n"
        "| score | rank correlation | AUROC | average precision |\n| --- | ---: | ---: | ---: |\n"
        f"{''.join(rows)}\n"
    )


HEAD = """# Results

Rendered from the stored files by `python -m benchmarks.study render`; do not edit by hand.

Everyone trains an MLP on fixed k-means features (in `architecture` another model, on the images themselves) with SGD,
with the same budget, initialisation and order of data for one seed; every seed draws its own training rows, so that
intervals (95 %, Student's t) cover the choice of data. Rows of a table after ERM's are **differences from ERM with the
same seed**, bold where the interval leaves zero out. Nothing is tuned on the test set: choices between variants were
made by the studies whose names begin with `select`, on rows held out of the training set. Hard and easy thirds are
those of another model, trained on four times as many rows.

"""


def render(results: Path) -> None:
    """Write ``README.md`` in the folder of results, and every study's figures."""
    parts = [section(chosen, results / f"study-{name}") for name, chosen in STUDIES.items()]
    parts.append(human_section(results / "study-human"))
    write(results / "README.md", HEAD + "".join(parts).rstrip() + "\n")

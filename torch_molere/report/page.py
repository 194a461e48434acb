"""The report: one page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from torch_molere.report.findings import HURTS, LEAST_ROWS, LabelIssues, harmful_rows, label_issues
from torch_molere.report.recorder import Run

try:
    import altair as alt
    import jinja2
    import vl_convert
except ImportError as error:
    raise ImportError(f"the report needs {error.name}: pip install 'torch-molere[report]'", name=error.name) from error

SHOWN = 24
"""Rows of a gallery."""

MOST_ROWS = 50_000
"""Rows of the table; of more, those with the least margins."""

BUCKETS = 10
CELLS = 40
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Okabe and Ito's colours, which colour-blind readers tell apart."""


def write(
    run: Run,
    path: str | Path,
    *,
    picture: Callable[[int], str] | None = None,
    text: Callable[[int], str] | None = None,
    classes: Sequence[str] = (),
    baseline: Run | None = None,
    title: str = "",
) -> Path:
    """Write the page of a run.

    Args:
        run: as a :class:`Recorder` left it.
        path: of the HTML file, replaced at once.
        picture: gives a row's thumbnail as a data URI.
        text: gives a row's text.
        classes: names of the classes.
        baseline: a run of plain training on the same rows, to compare margins with.
        title: of the page; the folder's name by default.

    Returns:
        The path.
    """
    table = run.rows()
    issues = _issues(table)
    table = table.assign(wrong=issues.probability.reindex(table.index) if issues else np.nan)
    names = {int(c): classes[c] if c < len(classes) else str(c) for c in sorted(table["target"].unique()) if c >= 0}
    galleries = _galleries(table, names, picture, text)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torch_molere.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        title=title or run.folder.name,
        tiles=_tiles(run, table, issues),
        charts=[
            (name, _inside_script(chart.to_json(indent=None)), note)
            for name, chart, note in _charts(run, table, baseline)
        ],
        classes=_classes(table, names),
        galleries=galleries,
        data=_inside_script(json.dumps(_data(run, table, names))),
        bundle=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        shown=min(len(table), MOST_ROWS),
        rows=len(table),
        steps=run.steps[-1],
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _inside_script(text: str) -> str:
    """JSON that no class name can end the script element with."""
    return text.replace("<", "\\u003c")


def _issues(table: pd.DataFrame) -> LabelIssues | None:
    return label_issues(table) if table["margin"].notna().sum() >= LEAST_ROWS else None


def _tiles(run: Run, table: pd.DataFrame, issues: LabelIssues | None) -> list[tuple[str, str, str]]:
    """(what, number, explanation)."""
    weights = table["weight"].dropna()
    effective = weights.sum() ** 2 / (len(weights) * (weights**2).sum()) if (weights > 0).any() else np.nan
    tiles = [
        ("rows seen", f"{len(table):,}", f"over {run.steps[-1]:,} steps"),
        ("right at last sight", _percent((table["target"] == table["prediction"]).mean()), "of training rows"),
        ("turned down", _percent((weights < 0.5).mean()), "rows with a mean weight below ½"),
        ("effective sample", _percent(effective), "(Σw)² / nΣw² of the rows' mean weights"),
    ]
    if issues is not None:
        told = "estimated from margins" if np.isfinite(issues.rate) else "margins do not part rows in two: no estimate"
        tiles.append(("likely wrong labels", _percent(issues.rate), told))
    if table["meta_gradient"].notna().any():
        share = len(harmful_rows(table)) / len(table)
        tiles.append(("hurt validation", _percent(share), f"meta-gradient > {HURTS:g} standard errors above 0"))
    return tiles


def _percent(share: float) -> str:
    return "–" if not np.isfinite(share) else f"{100 * share:.1f} %"


Chart = tuple[str, Any, str]


def _charts(run: Run, table: pd.DataFrame, baseline: Run | None) -> list[Chart]:
    """(title, chart, note)."""
    charts: list[Chart] = []
    loss = run.numbers.filter(items=["step", "validation/loss"]).dropna()
    if len(loss.columns) == 2 and len(loss) > 1:
        charts.append(
            (
                "Validation loss",
                _lines(loss, ["validation/loss"], "loss"),
                "It may rise although training goes well: validation is drawn from the rows that are hard at the time, "
                "so the set gets harder as the model gets better.",
            )
        )
    spread = [name for name in ("weights/effective", "weights/zero", "weights/at_bound") if name in run.numbers]
    if spread and len(run.numbers) > 1:
        charts.append(
            (
                "Weights over training",
                _lines(run.numbers, spread, "share"),
                "Effective sample size of a batch, weights at zero, weights at the bound. All equal: 1, 0, 0.",
            )
        )
    own = [
        name
        for name in run.numbers
        if "/" not in name and name not in ("step", "steps", "epoch", "meta_updates", "meta_seconds", "shrinkage")
    ]
    if own and len(run.numbers) > 1:
        charts.append(
            (
                "Your numbers",
                _lines(run.numbers, own, own[0] if len(own) == 1 else ""),
                "As given to Recorder.record().",
            )
        )
    weights = table["weight"].dropna().to_numpy()
    if len(weights):
        counts, edges = np.histogram(weights, 40, (0.0, max(float(weights.max()), 2.0)))
        bars = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "rows": counts})
        chart = (
            alt.Chart(bars)
            .mark_bar(color=BLUE)
            .encode(
                alt.X("from:Q", bin=alt.BinParams(binned=True), title="mean weight (plain training: 1)"),
                x2="to:Q",
                y=alt.Y("rows:Q", title="rows"),
                tooltip=["from", "to", "rows"],
            )
        )
        charts.append(("Weights of the rows", chart, "Left of 1: turned down. Right of 1: counts for more."))
        charts += _density(table)
    if baseline is not None:
        charts += _against(table, baseline)
    return [(name, _sized(chart), note) for name, chart, note in charts]


def _sized(chart: Any) -> Any:
    return chart.properties(
        width="container", height=220, background="transparent", autosize={"type": "fit-x", "contains": "padding"}
    )


def _lines(numbers: pd.DataFrame, names: Sequence[str], title: str) -> Any:
    long = numbers.melt("step", list(names), "which", "value").dropna()
    long["which"] = long["which"].str.rpartition("/")[2].str.replace("_", " ")
    return (
        alt.Chart(long)
        .mark_line(point={"size": 18})
        .encode(
            alt.X("step:Q"),
            alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            alt.Color(
                "which:N",
                title=None,
                legend=alt.Legend(orient="top") if len(names) > 1 else None,
                scale=alt.Scale(range=[BLUE, ORANGE, GREEN, PURPLE]),
            ),
            tooltip=["which", "step", "value"],
        )
    )


def _density(table: pd.DataFrame) -> list[Chart]:
    known = table[["running_margin", "weight"]].dropna()
    if not len(known):
        return []
    top = max(float(known["weight"].max()), 2.0)
    counts, x, y = np.histogram2d(known["running_margin"], known["weight"], CELLS, ((-1.0, 1.0), (0.0, top)))
    column, row = np.nonzero(counts)
    cells = pd.DataFrame(
        {
            "margin": x[column],
            "margin to": x[column + 1],
            "weight": y[row],
            "weight to": y[row + 1],
            "rows": counts[column, row].astype(int),
        }
    )
    chart = (
        alt.Chart(cells)
        .mark_rect()
        .encode(
            alt.X("margin:Q", scale=alt.Scale(domain=[-1, 1]), title="running margin (below 0: predicted otherwise)"),
            alt.Y("weight:Q", title="mean weight"),
            alt.Color("rows:Q", scale=alt.Scale(type="log", scheme="viridis"), title="rows"),
            x2="margin to:Q",
            y2="weight to:Q",
            tooltip=["margin", "weight", "rows"],
        )
    )
    note = "Bottom left: hard and turned down, as wrong labels are. Top left: hard and counted for more."
    return [("Weight against margin", chart, note)]


def _against(table: pd.DataFrame, baseline: Run) -> list[Chart]:
    """The paper's panel: the mean change of margin, in buckets of the baseline's margin."""
    both = table[["running_margin"]].assign(before=baseline.rows()["running_margin"]).dropna()
    if not len(both):
        return []
    before = both["before"]
    bucket = ((before + 1.0) / 2.0 * BUCKETS).astype(int).clip(0, BUCKETS - 1)
    change = (both["running_margin"] - before).groupby(bucket).agg(["mean", "size"]).reset_index(names="bucket")
    change["margin"] = change["bucket"] * 2.0 / BUCKETS - 1.0
    change["margin to"] = change["margin"] + 2.0 / BUCKETS
    chart = (
        alt.Chart(change)
        .mark_bar()
        .encode(
            alt.X("margin:Q", bin=alt.BinParams(binned=True), title="running margin of the baseline"),
            alt.Y("mean:Q", title="mean change of margin"),
            alt.Color("sign:N", legend=None, scale=alt.Scale(domain=["up", "down"], range=[BLUE, ORANGE])),
            x2="margin to:Q",
            tooltip=["margin", "mean", "size"],
        )
        .transform_calculate(sign="datum.mean >= 0 ? 'up' : 'down'")
    )
    note = "Rows that the baseline finds hard are on the left. (Some rise on the left is regression to the mean.)"
    return [("Margins against the baseline", chart, note)]


def _classes(table: pd.DataFrame, names: dict[int, str]) -> list[dict[str, Any]]:
    known = table[table["target"] >= 0].assign(right=lambda t: t["target"] == t["prediction"])
    found = known.groupby("target").agg(
        rows=("seen", "size"),
        right=("right", "mean"),
        weight=("weight", "mean"),
        sent=("sent", "mean"),
        wrong=("wrong", "mean"),
    )
    share = found["sent"] * found["rows"]
    found["validation"] = share / share.sum() if share.sum() > 0 else np.nan
    rows = found.to_dict("index")
    return [{"name": names[int(label)], **{k: float(v) for k, v in row.items()}} for label, row in rows.items()]


def _galleries(
    table: pd.DataFrame,
    names: dict[int, str],
    picture: Callable[[int], str] | None,
    text: Callable[[int], str] | None,
) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(title, explanation, cards)."""
    right = table[~(table["wrong"] > 0.5)]
    chosen = [
        ("Hardest", "least running margin among rows whose labels are likely right", right, "running_margin", True),
        ("Most turned down", "least mean weight", table, "weight", True),
        (
            "Most likely mislabelled",
            "by the mixture of margins over training",
            table[table["wrong"] > 0.5],
            "wrong",
            False,
        ),
        (
            "Most helpful for validation",
            "most negative meta-gradient",
            table[table["meta_gradient"] < 0],
            "meta_gradient",
            True,
        ),
    ]
    galleries = []
    for title, note, among, column, ascending in chosen:
        among = among.dropna(subset=[column]).sort_values([column, "margin"], ascending=[ascending, True]).head(SHOWN)
        cards = [
            {
                "row": int(row),
                "label": names.get(int(values["target"]), "–"),
                "prediction": names.get(int(values["prediction"]), "–"),
                "margin": values["running_margin"],
                "weight": values["weight"],
                "picture": picture(int(row)) if picture else "",
                "text": text(int(row)) if text else "",
            }
            for row, values in among.iterrows()
        ]
        if cards:
            galleries.append((title, note, cards))
    return galleries


COLUMNS = {
    "running_margin": "margin",
    "running_loss": "loss",
    "weight": "weight",
    "meta_gradient": "meta-gradient",
    "wrong": "label wrong?",
    "seen": "seen",
    "sent": "in validation",
}


def _data(run: Run, table: pd.DataFrame, names: dict[int, str]) -> dict[str, Any]:
    """Columns for the table, as little-endian arrays; and for each row its margin and weight over time, in 8 bits."""
    if len(table) > MOST_ROWS:
        table = table.nsmallest(MOST_ROWS, "running_margin")
    largest = max(float(np.nanmax(table["weight"].to_numpy(), initial=0.0)), 2.0)
    margins, weights = [], []
    for number in range(len(run.steps)):
        then = run.rows(number).reindex(table.index)
        margins.append(_bytes((then["running_margin"].to_numpy() + 1.0) / 2.0))
        weights.append(_bytes(then["weight"].to_numpy() / largest))
    return {
        "rows": len(table),
        "index": _packed(table.index.to_numpy(np.float64)),
        "target": _packed(table["target"].to_numpy(np.int16)),
        "prediction": _packed(table["prediction"].to_numpy(np.int16)),
        "columns": [[label, _packed(table[name].to_numpy(np.float32))] for name, label in COLUMNS.items()],
        "names": names,
        "steps": run.steps,
        "largest": largest,
        "margins": [_packed(values) for values in margins],
        "weights": [_packed(values) for values in weights],
    }


def _bytes(share: np.ndarray) -> np.ndarray:
    """0 to 254 for shares from 0 to 1, 255 where there is none."""
    return np.where(np.isnan(share), 255, np.clip(np.nan_to_num(share), 0.0, 1.0) * 254).round().astype(np.uint8)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()

"""The page of results and its figures, from the stored files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import costs, demo, mixture, sweeps
from benchmarks.catalogue import STUDIES
from benchmarks.methods import DEFAULT, TRUSTED
from benchmarks.problems import Setting
from benchmarks.provenance import machine_name
from benchmarks.report import buckets, difference, interval, markdown, panels, scale_of, table, with_winners
from benchmarks.store import Store, write
from benchmarks.studies import Claim, Study

LEAST_SEEDS = 3
"""With fewer in a setting, its runs are stored but not reported."""

Parts = list[tuple[Setting, pd.DataFrame]]


def parts_of(study: Study, frame: pd.DataFrame) -> Parts:
    """The runs of each setting that has enough of them, families by their winners."""
    if frame.empty:
        return []
    frame = with_winners(frame, study.families)
    found = [(setting, frame[frame["setting"] == setting.name]) for setting in study.settings]
    return [(setting, part) for setting, part in found if part["seed"].nunique() >= LEAST_SEEDS]


def verdicts(study: Study, parts: Parts) -> pd.DataFrame:
    """A row for each claim and setting: held, not reached (clear, but less), reversed or not clear."""
    rows = []
    for claim in study.claims:
        for setting, part in parts:
            if claim.settings and setting.name not in claim.settings:
                continue
            if {claim.method, claim.other} <= set(part["method"]):
                rows.append(_verdict(study, claim, setting, part))
    return pd.DataFrame(rows)


def _verdict(study: Study, claim: Claim, setting: Setting, part: pd.DataFrame) -> dict[str, Any]:
    change = difference(part, claim.method, claim.other, claim.measure, claim.minus)
    factor, form = scale_of(claim.measure)
    if claim.least < 0:
        verdict = "held" if change.mean >= claim.least else "not held"
    elif change.mean >= claim.least and change.clear and change.mean > 0:
        verdict = "held"
    elif change.clear and change.mean < 0:
        verdict = "reversed"
    else:
        verdict = "not reached" if change.clear and claim.least else "not clear"
    found = f"{change.shown(f'+{form}', factor)} ({change.count} seeds)"
    return {"claim": claim.text, "study": study.name, "setting": setting.name, "found": found, "": verdict}


def section(study: Study, folder: Path) -> str:
    """A study's part of the page, its figures drawn; empty if nothing can be reported."""
    store = Store(folder)
    parts = parts_of(study, store.frame())
    if not parts:
        return ""
    made = store.described()["made_by"]
    commands = "".join(f"`{each['command']}` " for each in made)
    text = f"## `{study.name}`\n\n{study.question}\n\n{machine_name(made[-1])}; {commands}\n\n"
    text += f"{study.finding}\n\n" if study.finding else ""
    claims = verdicts(study, parts)
    if len(claims):
        text += f"{markdown(claims.drop(columns='study'))}\n"
    return text + (_swept(study, parts, folder) if study.sweeps else _each(study, parts, folder))


def _swept(study: Study, parts: Parts, folder: Path) -> str:
    """Many settings in one table, and the gains drawn."""
    by_name = {setting.name: part for setting, part in parts}
    own = {DEFAULT.name, TRUSTED.name}
    text = f"{markdown(sweeps.table(study.sweeps, by_name, [m.name for m in study.methods if m.name not in own]))}\n"
    sweeps.draw(study.sweeps, by_name, folder / "amounts.png")
    return f"{text}![points over plain training by the number of trusted rows]({folder.name}/amounts.png)\n\n"


def _each(study: Study, parts: Parts, folder: Path) -> str:
    """A table for each setting, and the differences drawn."""
    text = ""
    for setting, part in parts:
        plain = part[part["method"] == "plain"]
        text += f"**{setting.name}**: {_described(setting, plain)}; {part['seed'].nunique()} seeds.\n\n"
        text += f"{markdown(_found(part) if study.find else table(part, study.rows, study.measures))}\n"
        text += _called(part) if study.find else ""
        winners = part[["method", "winner"]].dropna().drop_duplicates() if "winner" in part else pd.DataFrame()
        if len(winners):
            text += "Tuned: " + "; ".join(winners["winner"]) + ".\n\n"
    if not study.find:
        named = [(setting.name, part) for setting, part in parts]
        panels(named, study.rows, study.measures[0], folder / "differences.png")
        text += f"![differences from plain training]({folder.name}/differences.png)\n\n"
        if study.thirds:
            buckets(named, ("easy", "random", "soft", "hard", "default"), folder / "margins.png")
            text += f"![change of margin]({folder.name}/margins.png)\n\n"
    return text


def _described(setting: Setting, plain: pd.DataFrame) -> str:
    shape = "" if setting.side is None else f" at {setting.side}×{setting.side}"
    rows = f"{plain['rows'].mean():,.0f} rows, " if len(plain) else ""
    wrong = plain["label_errors"].mean() if len(plain) else 0.0
    return (
        f"{rows}{setting.data}{shape}, {setting.model}, {setting.epochs} epochs, batch {setting.batch_size}, SGD "
        f"{setting.lr:g}, decay {setting.weight_decay:g}" + (f", {100 * wrong:.0f} % wrong labels" if wrong else "")
    )


def _found(part: pd.DataFrame) -> pd.DataFrame:
    """A row for each score: AUROC, average precision, agreement with people."""
    rows = []
    scores = dict.fromkeys(name.partition(": ")[2] for name in part.columns if ": " in name)
    for method, own in part.groupby("method", sort=False):
        for score in scores:
            values = {kind: own.get(f"{kind}: {score}") for kind in ("auroc", "precision", "people")}
            shown = {k: interval(v).shown(".3f") for k, v in values.items() if v is not None and v.notna().any()}
            if shown:
                rows.append({"score": f"{method}: {score}"} | shown)
    return pd.DataFrame(rows).fillna("–")


def _called(part: pd.DataFrame) -> str:
    """What ``label_issues`` says of each run's rows, in percent."""
    rows = []
    for method, own in part.dropna(subset=["called"]).groupby("method", sort=False):
        shown = {
            name: interval(100 * own[column]).shown(".1f")
            for name, column in (
                ("calls wrong, %", "called"),
                ("of these are, %", "called_right"),
                ("estimates, %", "estimated"),
                ("true, %", "label_errors"),
            )
        }
        rows.append({"label_issues": str(method)} | shown)
    return f"{markdown(pd.DataFrame(rows))}\n" if rows else ""


HEAD = """# Results

Rendered from the stored files by `python -m benchmarks render`; do not edit by hand.

For one seed every method has the same rows, initialisation, order of data and number of steps; every seed draws its own
rows, so that intervals (95 %, Student's t) cover the choice of data. Differences are paired by seed, **bold** where the
interval leaves zero out. Trusted rows are trained on by every method. "plain, tuned" is plain training at the rate and
weight decay that is best on 2,000 rows set apart from the training file, whose labels are clean, which favours it; "at
its best epoch" is a column and no competitor. Nothing is chosen by the test set. "shuffled" deals a method's learned
weights out to other instances of the same batch. "default" is the library as it comes, "default, tuned" the same at the
rate and decay of "plain, tuned".

"""


def render(results: Path) -> None:
    """Write ``README.md`` in the folder of results, and every study's figures."""
    sections = [section(study, results / study.name) for study in STUDIES.values()]
    tables = [verdicts(study, parts_of(study, Store(results / study.name).frame())) for study in STUDIES.values()]
    claims = pd.concat([each for each in tables if len(each)]) if any(map(len, tables)) else pd.DataFrame()
    text = HEAD + (f"## Verdicts\n\n{markdown(claims)}\n" if len(claims) else "")
    text += (
        demo.section(results / "main")
        + "".join(sections)
        + mixture.section(results / "mixture")
        + costs.section(results)
    )
    write(results / "README.md", text.rstrip() + "\n")

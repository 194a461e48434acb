"""What the paper claims, and in which of the stored settings it held: by paired differences, not by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.results import Interval, interval
from benchmarks.study.store import Stored
from benchmarks.study.studies import STUDIES, Study

LEAST_SEEDS = 3
"""With fewer in a setting, its runs are stored but not reported."""


@dataclass(frozen=True)
class Claim:
    """That a method is above another by a measure.

    Attributes:
        text: the claim in words.
        method, other: names of methods.
        measure: a column; larger is better.
        studies: where it is looked up.
    """

    text: str
    method: str
    other: str
    measure: str
    studies: tuple[str, ...]


ORDER = ("ordering", "growth", "noise", "imbalance")
EVERYWHERE = (*ORDER, "baselines", "shift", "architecture")
CLAIMS = (
    Claim("random validation instances serve better than easy ones", "LRW-Random", "LRW-Easy", "accuracy", ORDER[:2]),
    Claim("hard ones serve better than random ones", "LRW-Hard", "LRW-Random", "accuracy", ORDER),
    Claim("random better than easy ones, weights with a floor", "LRW-Random, floor 0.3", "LRW-Easy, floor 0.3",
          "accuracy", ORDER[:1]),
    Claim("hard better than random ones, weights with a floor", "LRW-Hard, floor 0.3", "LRW-Random, floor 0.3",
          "accuracy", ORDER[:1]),
    *(
        Claim(f"weights against {kind.lower()} rows, with a floor, are better than equal ones on the same rows",
              f"LRW-{kind}, floor 0.3", f"ERM on LRW-{kind}'s rows", "accuracy", ORDER[:1])
        for kind in ("Easy", "Random", "Hard")
    ),
    Claim("learned ones (held out, as in the paper) better than hard ones", "MOLERE, held out", "LRW-Hard", "accuracy",
          ORDER),
    Claim("MOLERE, held out, is more accurate than plain training", "MOLERE, held out", "ERM", "accuracy", EVERYWHERE),
    Claim("MOLERE at our defaults is more accurate than plain training", "MOLERE", "ERM", "accuracy", EVERYWHERE),
    Claim("and so on the hard third of the test set", "MOLERE", "ERM", "hard_third_by_margin",
          ("ordering", "growth", "baselines", "noise", "architecture")),
    Claim("validating on shifted rows teaches to see through the shift", "LRW, shifted rows, φ 1e-2",
          "LRW, random rows, φ 1e-2", "accuracy_seen", ("shift",)),
    Claim("validating on a few trusted rows is better than only training on them", "LRW, trusted rows", "ERM",
          "accuracy", ("noise", "imbalance")),
    Claim("the same, weights with a floor", "LRW, trusted rows, floor 0.3", "ERM", "accuracy", ("noise", "imbalance")),
)  # fmt: skip


def difference(frame: pd.DataFrame, method: str, measure: str, baseline: str = "ERM") -> Interval:
    """A measure of a method minus the baseline's with the same seed, within one setting."""
    if measure not in frame:
        return Interval(float("nan"), float("nan"))
    pivoted = frame.pivot(index="seed", columns="method", values=measure)
    if method not in pivoted or baseline not in pivoted:
        return Interval(float("nan"), float("nan"))
    return interval((pivoted[method] - pivoted[baseline]).dropna().to_numpy())


def reported(frame: pd.DataFrame, chosen: Study) -> list[tuple[str, pd.DataFrame]]:
    """The settings with enough seeds of plain training, each with the seeds that every one of its methods has."""
    parts = []
    own_methods = frame[frame["method"].isin([method.name for method in chosen.methods])]
    for setting in chosen.settings:
        own = own_methods[own_methods["setting"] == setting.name]
        counts = own.groupby("seed")["method"].nunique()
        complete = own[own["seed"].isin(counts.index[counts == own["method"].nunique()])]
        if complete["seed"].nunique() >= LEAST_SEEDS:
            parts.append((setting.name, complete))
    return parts


def verdicts(claim: Claim, results: Path) -> Iterator[tuple[str, Interval]]:
    """Each setting with the paired difference there; the first of those that are the same runs by another name."""
    seen = set()
    for name in claim.studies:
        chosen = STUDIES[name]
        for setting, part in reported(Stored(results / chosen.folder).frame(), chosen):
            change = difference(part, claim.method, claim.measure, claim.other)
            if change.half == change.half and change not in seen:  # not NaN
                seen.add(change)
                yield f"{name}: {setting}", change


def section(results: Path) -> str:
    """A table of all claims that can be judged; empty if none can."""
    rows = []
    for claim in CLAIMS:
        found = list(verdicts(claim, results))
        if not found:
            continue
        above, below = ([(s, c) for s, c in found if sign * c.mean > c.half] for sign in (1.0, -1.0))
        listed = ["; ".join(f"{s} ({c.shown('+.1f', 100)})" for s, c in part) or "nowhere" for part in (above, below)]
        unclear = len(found) - len(above) - len(below)
        rows.append(f"| {claim.text} | {listed[0]} | {listed[1]} | {unclear} of {len(found)} |\n")
    if not rows:
        return ""
    return (
        "## Claims\n\nWhere each claim held and where it was reversed: settings in which the 95 % interval of the "
        "paired difference, in percentage points, leaves zero out. In the others nothing is clear; of twenty settings "
        "without any effect one would be expected to seem to have one.\n\n"
        "| claim | held | reversed | neither |\n| --- | --- | --- | ---: |\n"
        f"{''.join(rows)}\n"
    )

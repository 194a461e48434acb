"""The runs of a comparison on disk, and what they say: t intervals, differences paired by seed, the table."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.training import METHODS, Outcome

Margins = NDArray[np.float32]


class Runs:
    """A folder that holds a comparison: ``config.json``, one row of ``results.csv`` for each finished run, its margins.

    A run counts as finished when its row is there; the row is written last, and every file is replaced at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = folder / "results.csv"
        self.config = folder / "config.json"

    def start(self, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Make the folder ready for runs of this configuration.

        Args:
            config: to be stored; its entry ``"configuration"`` says what decides the results.
            resume: keep the finished runs of the same configuration.
            overwrite: drop earlier runs.

        Raises:
            typer.BadParameter: if the folder holds something and neither is given, or its configuration differs.
        """
        if resume and self.config.exists():
            self._check_same(config["configuration"])
            return
        if not overwrite and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise typer.BadParameter(
                f"{self.folder} is not empty; give --resume to go on with it, --overwrite to drop its runs, "
                "or another --out",
                param_hint="--out",
            )
        self._drop()
        (self.folder / "margins").mkdir(parents=True, exist_ok=True)
        write(self.config, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def _check_same(self, configuration: dict[str, Any]) -> None:
        here = _flat(json.loads(json.dumps(configuration)))
        there = _flat(json.loads(self.config.read_text(encoding="utf-8"))["configuration"])
        different = [
            f"{name} was {there.get(name)!r} and is {here.get(name)!r}"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        if different:
            raise typer.BadParameter(
                f"{self.folder} holds runs of another configuration: {'; '.join(different)}. Give the same options, "
                "or another --out",
                param_hint="--resume",
            )

    def _drop(self) -> None:
        """Remove a comparison's own files, and nothing else that may lie in the folder."""
        for name in ("results.csv", "config.json", "summary.csv", "table.md", "compare.png"):
            (self.folder / name).unlink(missing_ok=True)
        for path in (self.folder / "margins").glob("*.npz"):
            path.unlink()

    def frame(self) -> pd.DataFrame:
        """One row for each finished run; empty at first."""
        if not self.table.exists():
            return pd.DataFrame({"method": pd.Series(dtype=str), "seed": pd.Series(dtype=int)})
        return pd.read_csv(self.table)

    def finished(self) -> set[tuple[str, int]]:
        """The (method, seed) pairs that need no run any more."""
        frame = self.frame()
        return set(zip(frame["method"], frame["seed"], strict=True))

    def add(self, outcome: Outcome) -> None:
        """Keep a finished run; of ERM's, the training margins too, which LRW-Hard and LRW-Easy split by."""
        method, seed = outcome.numbers["method"], outcome.numbers["seed"]
        margins = {"test": outcome.test_margins.numpy()}
        if method == "ERM":
            margins["train"] = outcome.train_margins.numpy()
        packed = io.BytesIO()
        np.savez_compressed(packed, **margins)  # type: ignore[arg-type]
        write(self._margins(method, seed), packed.getvalue())
        earlier = self.table.read_text(encoding="utf-8") if self.table.exists() else ""
        write(self.table, earlier + pd.DataFrame([outcome.numbers]).to_csv(index=False, header=not earlier))

    def test_margins(self, method: str, seed: int) -> Margins:
        """``(N,)`` of the test set."""
        with np.load(self._margins(method, seed)) as stored:
            return stored["test"]

    def erm_margins(self, seed: int) -> Tensor:
        """``(N,)`` of the training set under ERM."""
        with np.load(self._margins("ERM", seed)) as stored:
            return torch.from_numpy(stored["train"])

    def _margins(self, method: str, seed: int) -> Path:
        return self.folder / "margins" / f"{method}-{seed}.npz"


def write(path: Path, content: str | bytes) -> None:
    """Replace a file at once: a reader finds the old content or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


@dataclass(frozen=True)
class Interval:
    """``mean ± half``; half is NaN where one value alone says nothing of its spread."""

    mean: float
    half: float

    def shown(self, form: str, scale: float = 1.0) -> str:
        """For instance ``97.12 ± 0.31``, by a format such as ``.2f``."""
        if np.isnan(self.mean):
            return "–"
        half = "–" if np.isnan(self.half) else f"{scale * self.half:{form.removeprefix('+')}}"
        return f"{scale * self.mean:{form}} ± {half}"


def interval(values: Sequence[float] | NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """The mean with Student's t interval, ``t_{n−1} · s / √n`` to both sides."""
    sample = np.asarray(values, dtype=float)
    if len(sample) == 0:
        return Interval(np.nan, np.nan)
    if len(sample) == 1:
        return Interval(float(sample[0]), np.nan)
    quantile = scipy.stats.t.ppf((1.0 + confidence) / 2.0, len(sample) - 1)
    return Interval(float(sample.mean()), float(quantile * scipy.stats.sem(sample)))


@dataclass(frozen=True)
class Summary:
    """One method over its finished seeds.

    Attributes:
        method: its name.
        seeds: how many.
        accuracy, balanced_accuracy, margin: on the test set.
        difference: of the accuracy from ERM's with the same seed.
        cost: seconds per training step over ERM's with the same seed. LRW trains on fewer rows in as many epochs, so
            it takes fewer steps of the same size: a whole run's time would flatter it. The median over the seeds, since
            the first run of a process also pays for what is loaded and compiled once.
    """

    method: str
    seeds: int
    accuracy: Interval
    balanced_accuracy: Interval
    difference: Interval
    margin: Interval
    cost: float


def summarise(frame: pd.DataFrame) -> list[Summary]:
    """Each method with a finished run, in the usual order."""
    erm = frame[frame["method"] == "ERM"].set_index("seed").add_suffix("_erm")
    summaries = []
    for method in METHODS:
        own = frame[frame["method"] == method].set_index("seed")
        if own.empty:
            continue
        both = own.join(erm, how="inner")
        difference = [] if method == "ERM" else both["accuracy"] - both["accuracy_erm"]
        summaries.append(
            Summary(
                method,
                len(own),
                interval(own["accuracy"]),
                interval(own["balanced_accuracy"]),
                interval(difference),
                interval(own["test_margin"]),
                float((both["seconds_per_step"] / both["seconds_per_step_erm"]).median()),
            )
        )
    return summaries


COLUMNS = ("method", "seeds", "accuracy, %", "minus ERM", "margin", "step time")


def cells(summary: Summary) -> tuple[str, ...]:
    """A row of the table under :data:`COLUMNS`."""
    return (
        summary.method,
        str(summary.seeds),
        summary.accuracy.shown(".2f", 100),
        summary.difference.shown("+.2f", 100),
        summary.margin.shown(".3f"),
        "–" if np.isnan(summary.cost) else f"{summary.cost:.2f}×",
    )


def markdown(summaries: Sequence[Summary]) -> str:
    """The table in Markdown."""
    return markdown_table([COLUMNS, *map(cells, summaries)])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as Markdown; all columns but the first are numbers."""
    head, *others = rows
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def as_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """The same numbers unrounded: ``summary.csv``."""
    return pd.DataFrame(
        {
            "method": summary.method,
            "seeds": summary.seeds,
            **{
                f"{name}{part}": getattr(getattr(summary, name), attribute)
                for name in ("accuracy", "balanced_accuracy", "difference", "margin")
                for part, attribute in (("", "mean"), ("_half", "half"))
            },
            "cost": summary.cost,
        }
        for summary in summaries
    )

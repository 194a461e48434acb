"""A study's results on disk: one row of ``results.csv`` a finished run, and its full configuration beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from benchmarks.results import write
from benchmarks.study.methods import Method
from benchmarks.study.problems import Setting

KEY = ["setting", "method", "seed"]


class Stored:
    """A folder with ``results.csv`` and ``config.json``. Every file is replaced at once, so a stop loses one run.

    A study may grow by settings, methods and seeds; what it holds already must have been run in the same way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = folder / "results.csv"
        self.config = folder / "config.json"

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the folder ready for runs of a configuration.

        Raises:
            typer.BadParameter: if it holds runs of another configuration; names what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        here = json.loads(json.dumps(config))
        if self.config.exists():
            there = json.loads(self.config.read_text(encoding="utf-8"))
            defaults = asdict(Setting(""))  # an attribute that came later had no other value before
            there["settings"] = {name: defaults | setting for name, setting in there["settings"].items()}
            different = [
                f"{part} {name!r}"
                for part in ("data", "settings", "methods")
                for name in there[part]
                if name in here[part] and there[part][name] != here[part][name]
            ]
            if different:
                raise typer.BadParameter(
                    f"{self.folder} holds runs with another {', '.join(different)}; delete the folder or give another",
                    param_hint="--out",
                )
            for part in ("settings", "methods"):
                here[part] = there[part] | here[part]
        write(self.config, json.dumps(here, indent=2, ensure_ascii=False) + "\n")

    def frame(self) -> pd.DataFrame:
        """One row for each finished run."""
        return pd.read_csv(self.table) if self.table.exists() else pd.DataFrame(columns=KEY)

    def finished(self) -> set[tuple[str, str, int]]:
        """The (setting, method, seed) that need no run any more."""
        return {(row.setting, row.method, row.seed) for row in self.frame().itertuples()}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep a finished run."""
        both = pd.concat([self.frame(), pd.DataFrame(list(rows))], ignore_index=True)
        write(self.table, both.to_csv(index=False, float_format="%.6g"))


def described(settings: Iterable[Setting], methods: Iterable[Method]) -> dict[str, Any]:
    """Settings and methods as ``config.json`` holds them, by name."""
    return {
        "settings": {setting.name: asdict(setting) for setting in settings},
        "methods": {method.name: asdict(method) for method in methods},
    }

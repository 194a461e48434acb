"""Runs on disk: a row of ``results.csv`` each, and beside it what they were made with, by which command and where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from benchmarks.methods import Method
from benchmarks.problems import Setting

KEY = ["setting", "method", "seed"]


def write(path: Path, content: str | bytes) -> None:
    """Replace a file at once: a reader finds the old content or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


class Store:
    """A folder with ``results.csv`` and ``config.json``. Every file is replaced at once, so a stop loses one run.

    It may grow by settings, methods and seeds; what it holds already must have been run in the same way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = folder / "results.csv"
        self.config = folder / "config.json"

    def start(self, settings: Iterable[Setting], methods: Iterable[Method], provenance: Mapping[str, Any]) -> None:
        """Make the folder ready for runs.

        Args:
            provenance: the command, versions and machine; each that added runs is kept.

        Raises:
            typer.BadParameter: if the folder holds runs with another setting or method of the same name.
        """
        here = _plain(
            {
                "settings": {setting.name: asdict(setting) for setting in settings},
                "methods": {method.name: asdict(method) for method in methods},
                "made_by": [provenance],
            }
        )
        there = self.described()
        defaults = {"settings": _plain(asdict(Setting(""))), "methods": _plain(asdict(Method("")))}
        for part, blank in defaults.items():
            for name, value in there[part].items():
                # An attribute that came later had its default before.
                if name in here[part] and {**blank, **value} != here[part][name]:
                    raise typer.BadParameter(
                        f"{self.folder} holds runs with another {part[:-1]} {name!r}; delete it or give another",
                        param_hint="--out",
                    )
            here[part] = there[part] | here[part]
        here["made_by"] = there["made_by"] + [made for made in here["made_by"] if made not in there["made_by"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.config, json.dumps(here, indent=1, ensure_ascii=False) + "\n")

    def described(self) -> dict[str, Any]:
        """Settings and methods by name, and who made the runs."""
        if not self.config.exists():
            return {"settings": {}, "methods": {}, "made_by": []}
        found: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
        return found

    def frame(self) -> pd.DataFrame:
        """One row for each finished run."""
        if not self.table.exists():
            return pd.DataFrame(columns=KEY)
        return pd.read_csv(self.table)

    def finished(self) -> dict[tuple[str, str, int], tuple[float, float]]:
        """Rate and weight decay of each finished (setting, method, seed)."""
        rows = self.frame().reindex(columns=[*KEY, "lr", "weight_decay"]).itertuples(index=False)
        return {(row[0], row[1], row[2]): (row[3], row[4]) for row in rows}

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a finished run, in the place of an earlier one."""
        both = pd.concat([self.frame(), pd.DataFrame([row])], ignore_index=True).drop_duplicates(KEY, keep="last")
        write(self.table, both.to_csv(index=False, float_format="%.5g"))


def _plain(tree: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(tree))

"""The README's figures are those of the stored files."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import render
from benchmarks.results import interval

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_what_the_stored_files_say():
    assert render.rendered(README, ROOT / render.STORED) == README


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (ROOT / render.STORED).glob("*/results.csv")))
def test_a_table_by_hand(folder):
    frame = pd.read_csv(ROOT / render.STORED / folder / "results.csv")
    for method, part in frame.groupby("method"):
        found = interval(part["accuracy"])
        (row,) = [
            line
            for line in render.comparisons(ROOT / render.STORED)
            .split("### ")[1 + list(render.COMPARISONS).index(folder)]
            .splitlines()
            if line.startswith(f"| {method} |")
        ]
        assert f"| {100 * part['accuracy'].mean():.2f} ± " in row
        assert len(part) == 1 or f" ± {100 * found.half:.2f} |" in row


def test_a_figure_changed_by_hand_is_noticed():
    changed = README.replace("| ERM | 10 | 97", "| ERM | 10 | 98")
    assert changed != README
    assert render.rendered(changed, ROOT / render.STORED) == README

"""The README's figures are those of the stored files."""

from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from benchmarks import render

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = render.PAGES["README.md"]


@pytest.mark.parametrize("page", render.PAGES)
def test_each_page_is_what_the_stored_files_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render.rendered(text, render.PAGES[page], ROOT / render.STORED) == text


def test_a_table_by_hand():
    frame = pd.read_csv(ROOT / render.STORED / "compare-digits-mlp" / "results.csv")
    for method, part in frame.groupby("method"):
        mean = 100 * part["accuracy"].mean()
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {method} | {len(part)} |")]
        half = 100 * stats.t.ppf(0.975, len(part) - 1) * part["accuracy"].std() / len(part) ** 0.5
        assert f"| {mean:.2f} ± {half:.2f} |" in row


def test_too_few_seeds_are_not_reported():
    assert "CIFAR-10, small conv net](" in README
    assert "### CIFAR-10" not in README


def test_a_figure_changed_by_hand_is_noticed():
    changed = README.replace("| ERM | 10 | 97", "| ERM | 10 | 98")
    assert changed != README
    assert render.rendered(changed, SECTIONS, ROOT / render.STORED) == README

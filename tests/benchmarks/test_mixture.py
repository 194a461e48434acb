"""The experiment with a mixture of data."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks import mixture
from benchmarks.__main__ import app


def test_it_runs_and_its_table_is_what_was_stored(tmp_path):
    done = CliRunner().invoke(
        app, ["mixture", "--seeds", "2", "--sequences", "96", "--epochs", "1", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "results.csv")
    assert len(frame) == 2 * len(mixture.METHODS)
    known = frame[frame["method"] == "the target's source alone"]
    assert known[mixture.SOURCES[1]].tolist() == pytest.approx([3.0, 3.0], rel=1e-3)
    losses = frame.pivot(index="seed", columns="method", values="target_loss")
    gain = (losses["uniform"] - losses["learned"]).mean()
    text = mixture.section(tmp_path)
    assert f"| learned | {losses['learned'].mean():.4f} | {gain:.4f} ± " in text
    assert mixture.section(tmp_path / "nowhere") == ""

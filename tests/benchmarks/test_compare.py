"""The command line: a whole small comparison, stopping and resuming it, and its complaints."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import training
from benchmarks.compare import app

TINY = ["--subset", "120", "--epochs", "2", "--seeds", "2", "--batch-size", "32"]
METHODS = ["ERM", "LRW-Easy", "LRW-Random", "LRW-Hard", "MOLERE"]
FILES = {"config.json", "results.csv", "summary.csv", "table.md", "compare.png", "margins"}


def command(*arguments):
    """Run it and return (exit code, output without boxes and line breaks)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The command sets the process's threads; other tests are to find them as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "whole"
    code, output = command(*TINY, "--out", folder)
    assert code == 0, output
    return folder, output


def test_a_comparison_leaves_its_files(finished):
    folder, output = finished
    assert {path.name for path in folder.iterdir()} == FILES
    frame = pd.read_csv(folder / "results.csv")
    assert list(zip(frame["method"], frame["seed"], strict=True)) == [(m, s) for s in (0, 1) for m in METHODS]
    for method in METHODS:
        assert f"{method}, seed 1: accuracy" in output
    with Image.open(folder / "compare.png") as image:
        assert image.width > 1500
    for row in frame.itertuples():
        margins = np.load(folder / "margins" / f"{row.method}-{row.seed}.npz")["test"]
        assert (margins > 0).mean() == row.accuracy
        assert margins.astype(float).mean() == pytest.approx(row.test_margin, abs=1e-7)


def test_the_table_follows_from_the_runs(finished):
    folder, _ = finished
    frame = pd.read_csv(folder / "results.csv").pivot(index="seed", columns="method")
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in (folder / "table.md").read_text().splitlines()[2:]
    ]
    assert [row[0] for row in rows] == METHODS

    def shown(values, form):
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        return f"{values.mean():{form}} ± {half:{form.removeprefix('+')}}"

    for method, seeds, accuracy, difference, margin, cost in rows:
        assert seeds == "2"
        assert accuracy == shown(100 * frame["accuracy"][method], ".2f")
        if method != "ERM":
            assert difference == shown(100 * (frame["accuracy"][method] - frame["accuracy"]["ERM"]), "+.2f")
        assert margin == shown(frame["test_margin"][method], ".3f")
        ratio = frame["seconds_per_step"][method] / frame["seconds_per_step"]["ERM"]
        assert cost == f"{ratio.mean():.2f}×"  # of two values, mean and median are one
    summary = pd.read_csv(folder / "summary.csv").set_index("method")
    assert summary.loc["MOLERE", "accuracy"] == pytest.approx(frame["accuracy"]["MOLERE"].mean(), rel=1e-12)


def test_the_configuration_is_complete_and_names_no_machine(finished):
    folder, _ = finished
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    assert config["configuration"]["train_rows"] == 120
    assert config["configuration"]["recipe"]["epochs"] == 2
    assert config["configuration"]["methods"] == METHODS
    assert set(config["versions"]) == {"python", "torch", "torchvision", "torch_molere"}
    assert config["command"].startswith("python -m benchmarks.compare --subset 120 --epochs 2")
    assert str(folder) not in text
    assert str(folder.parent) not in text
    assert "processor" in config["machine"]


@pytest.mark.parametrize("evaluations", [0, 4, 9])
def test_a_stopped_comparison_resumes_to_the_same_end(finished, tmp_path, monkeypatch, evaluations):
    """Stopped within the run after ``evaluations`` calls of ``evaluate``, of which each run makes two."""
    out = tmp_path / "stopped"
    evaluate, calls = training.evaluate, []

    def stopping(model, data):
        if len(calls) == evaluations:
            raise KeyboardInterrupt
        calls.append(1)
        return evaluate(model, data)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", stopping)
        code, output = command(*TINY, "--out", out)
    assert code == 130
    assert f"--out {out} --resume" in output
    runs = evaluations // 2
    if runs:
        assert len(pd.read_csv(out / "results.csv")) == runs
        assert {path.name for path in out.iterdir()} == FILES
        assert len((out / "table.md").read_text().splitlines()) == runs + 2
    else:
        assert "No run has finished yet" in output

    code, output = command(*TINY, "--out", out, "--resume")
    assert code == 0, output
    assert output.count(": accuracy") == 10 - runs
    timing = ["seconds", "seconds_per_step"]
    whole, resumed = (pd.read_csv(folder / "results.csv").drop(columns=timing) for folder in (finished[0], out))
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    for path in (finished[0] / "margins").iterdir():
        one, other = np.load(path), np.load(out / "margins" / path.name)
        assert set(one) == set(other)
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_resuming_a_finished_comparison_runs_nothing(finished):
    folder, _ = finished
    before = (folder / "results.csv").read_bytes()
    code, output = command(*TINY, "--out", folder, "--resume")
    assert code == 0
    assert ": accuracy" not in output
    assert (folder / "results.csv").read_bytes() == before


def test_a_folder_in_use_is_left_alone(finished):
    folder, _ = finished
    code, output = command(*TINY, "--out", folder)
    assert code == 2
    assert "--resume" in output and "--overwrite" in output
    code, output = command(*TINY, "--lr", "0.2", "--out", folder, "--resume")
    assert code == 2
    assert "recipe.lr was 0.05 and is 0.2" in output
    code, output = command(*TINY, "--resume", "--overwrite", "--out", folder)
    assert code == 2


def test_one_seed_of_some_methods(tmp_path):
    arguments = ["--subset", "100", "--epochs", "1", "--seeds", "1", "--methods", "molere", "--out", tmp_path / "one"]
    code, output = command(*arguments)
    assert code == 0, output
    table = (tmp_path / "one" / "table.md").read_text()
    assert "nan" not in table and "nan" not in output
    assert re.search(r"\| MOLERE \| 1 \| \d+\.\d\d ± – \| [+-]\d+\.\d\d ± – \| -?\d\.\d{3} ± – \| \d+\.\d\d× \|", table)
    code, output = command(*arguments, "--overwrite")
    assert code == 0, output


def test_divergence_is_told_and_what_finished_is_kept(tmp_path):
    out = tmp_path / "diverged"
    code, output = command("--subset", "100", "--epochs", "1", "--seeds", "1", "--lr", "1e30", "--out", out)
    assert code == 1
    assert "ERM with seed 0 diverged" in output and "Lower --lr" in output


@pytest.mark.parametrize(
    ("arguments", "option", "said"),
    [
        (["--data", "mnist"], "--data", "'mnist' is unknown"),
        (["--data", "parquet:nowhere"], "--data", "needs train.parquet"),
        (["--data", "imagefolder:nowhere"], "--data", "train/<class>/<image>"),
        (["--data", "cifar10", "--root", "nowhere"], "--root", "--download"),
        (["--label-column", "label_worst"], "--label-column", "only --data parquet"),
        (["--subset", "1000000"], "--subset", "898"),
        (["--label-noise", "symmetric:1.4"], "--label-noise", "between 0 and 1"),
        (["--imbalance", "0.1"], "--imbalance", "0.1"),
        (["--methods", "ERM,MOLE"], "--methods", "'MOLE' given; take some of ERM, LRW-Easy"),
        (["--methods", ","], "--methods", "nothing given"),
        (["--model", "resnet-9000"], "--model", "'resnet-9000' is unknown"),
        (["--model", "resnet18"], "--model", "does not take 1×8×8 images"),
        (["--lr", "-1"], "--lr", "-1"),
        (["--weighting-lr", "0"], "--weighting-lr", "positive"),
        (["--val-fraction", "1"], "--val-fraction", "between 0 and 1"),
        (["--device", "abacus"], "--device", "'abacus' is not here"),
        (["--weighting", "dice"], "--weighting", "'dice'"),
        (["--seeds", "0"], "--seeds", "1"),
    ],
)
def test_bad_options_are_named(tmp_path, arguments, option, said):
    code, output = command(*arguments, "--out", tmp_path / "none")
    assert code == 2
    assert option in output and said in output
    assert not (tmp_path / "none").exists()

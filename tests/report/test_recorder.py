"""Snapshots of a run on disk."""

import pandas as pd
import pytest
import torch
from torch import nn

from torch_molere import MetaReweighter
from torch_molere.report import Recorder, Run


def made():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    validation = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return MetaReweighter(model, optimizer, validation=validation, every=1, warmup_steps=0)


def train(reweighter, steps):
    for step in range(steps):
        reweighter.step((torch.randn(6, 4), torch.randint(3, (6,)), torch.arange(6) + 6 * (step % 3)))


def test_a_run_is_read_as_it_was(tmp_path):
    reweighter = made()
    recorder = Recorder(reweighter, tmp_path / "run", every=2)
    for _ in range(5):
        train(reweighter, 1)
        recorder.step(loss=1.5)
    run = Run(tmp_path / "run")
    assert run.steps == [2, 4] and run.numbers["step"].tolist() == [2, 4]
    assert run.numbers["loss"].tolist() == [1.5, 1.5]
    assert run.numbers["meta_updates"].tolist() == [2.0, 4.0]
    recorder.record()
    kept, own = Run(tmp_path / "run").rows(), reweighter.history.to_pandas()
    assert kept.index.tolist() == own.index.tolist()
    pd.testing.assert_frame_equal(kept, own, check_dtype=False)


def test_old_files_are_thinned_and_the_last_stays(tmp_path):
    reweighter = made()
    recorder = Recorder(reweighter, tmp_path, keep=4)
    for _ in range(30):
        train(reweighter, 1)
        recorder.record()
        assert len(Run(tmp_path).steps) <= 4 and Run(tmp_path).steps[-1] == reweighter.steps
    assert len(Run(tmp_path).numbers) == 30
    assert Run(tmp_path).steps[0] == 1 or len(Run(tmp_path).steps) >= 2


def test_a_run_that_was_killed_is_read(tmp_path):
    reweighter = made()
    train(reweighter, 2)
    Recorder(reweighter, tmp_path).record(accuracy=0.5)
    (tmp_path / "rows-0000000009.partial").write_bytes(b"PAR1")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "accur')
    run = Run(tmp_path)
    assert run.steps == [2] and run.numbers["accuracy"].tolist() == [0.5]


def test_a_resumed_run_tells_a_step_once(tmp_path):
    reweighter = made()
    train(reweighter, 1)
    recorder = Recorder(reweighter, tmp_path)
    recorder.record(accuracy=0.1)
    recorder.record(accuracy=0.2)
    assert Run(tmp_path).numbers["accuracy"].tolist() == [0.2]


def test_the_end_is_recorded(tmp_path):
    reweighter = made()
    with Recorder(reweighter, tmp_path):
        train(reweighter, 3)
    assert Run(tmp_path).steps == [3]


def test_what_is_refused(tmp_path):
    reweighter = made()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run(tmp_path)
    with pytest.raises(TypeError, match="record\\(\\) takes numbers"):
        Recorder(reweighter, tmp_path).record(name="first")
    with pytest.raises(ValueError, match="every must be"):
        Recorder(reweighter, tmp_path, every=0)
    with pytest.raises(ValueError, match="keep must be"):
        Recorder(reweighter, tmp_path, keep=1)

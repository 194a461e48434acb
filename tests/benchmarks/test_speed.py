"""The speed benchmark measures what it says, and every contender does the same work."""

import json
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import speed
from benchmarks.contenders import CONTENDERS, DoubleBackward, HigherByHand, Task, explicit
from benchmarks.profiling import PARTS, WHOLE
from benchmarks.speed_figures import draw_growth, draw_steps
from torch_molere import MetaReweighter, StepResult


def small(optimizer="sgd"):
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6, dtype=torch.double), torch.randint(3, (8,))) for _ in range(2)]
    return Task(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), optimizer, *batches)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_contenders_run_or_say_why_not(optimizer):
    torch.set_default_dtype(torch.double)
    try:
        steps, errors = speed.made(CONTENDERS, small(optimizer))
    finally:
        torch.set_default_dtype(torch.float32)
    assert "gradient: ours, forward" in steps
    # Peers that are not installed, or do not know AdamW; ours always run, but for higher's engine on AdamW.
    ours = {name for name in errors if "MOLERE" in name or "LRW" in name or "ours" in name}
    assert ours == ({"LRW, every 1, unrolled", "gradient: ours, unrolled"} if optimizer == "adamw" else set())
    assert all(errors.values())


def test_peers_compute_the_same_meta_gradient():
    """``higher`` by hand and the double backward, through the weighting; ours, before it."""
    torch.set_default_dtype(torch.double)
    try:
        task = small()
        torch.manual_seed(1)
        higher = HigherByHand(task, 1)
        double = DoubleBackward(task, 1)
        double.phi.load_state_dict(higher.phi.state_dict())
        for a, b in zip(higher.meta_gradient(), double.meta_gradient(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
        forward, unrolled = (explicit(task, engine)() for engine in ("forward", "unrolled"))
        torch.testing.assert_close(forward, unrolled, rtol=1e-10, atol=1e-14)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ratios_are_taken_within_a_round():
    frame = pd.DataFrame(
        [("m", "ERM", 0, 1.0), ("m", "ours", 0, 2.0), ("m", "ERM", 1, 10.0), ("m", "ours", 1, 30.0)],
        columns=["model", "contender", "round", "seconds"],
    )
    assert speed.relative(frame, ["model"]).ratio.tolist() == [1, 2, 1, 3]
    ours = speed.summary(frame, ["model"]).set_index("contender").loc["ours"]
    assert (ours.low, ours["median"], ours.high) == (2.25, 2.5, 2.75)


def test_every_contender_is_timed_once_a_round():
    called = {"a": 0, "b": 0}
    steps = {name: lambda name=name: called.__setitem__(name, called[name] + 1) for name in called}
    rows = list(speed.rounds(steps, 3, "cpu"))
    assert sorted((number, name) for number, name, _ in rows) == [(i, n) for i in range(3) for n in "ab"]
    assert called == {"a": 4 * speed.PERIOD, "b": 4 * speed.PERIOD}


def test_contenders_are_made_anew_every_few_rounds():
    made = {"a": 0, "b": 0}

    def factory(name, task):
        made[name] += 1
        return lambda: None

    rows = list(speed.rounds_anew({name: partial(factory, name) for name in made}, small(), 7, "cpu"))
    assert sorted((number, name) for number, name, _ in rows) == [(i, n) for i in range(7) for n in "ab"]
    assert made == {"a": 3, "b": 3}


def test_some_contenders_alone(tmp_path):
    arguments = ["steps", "--models", "mlp", "--optimizers", "sgd", "--rounds", "1", "--batch", "4"]
    done = CliRunner().invoke(
        speed.app, [*arguments, "--only", "as shipped", "--only", "higher", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.csv")
    expected = {"ERM", *(name for name in CONTENDERS if "as shipped" in name or "higher" in name)}
    assert len(expected) > 3 and set(pd.read_csv(path).contender) == expected


def test_in_bf16_every_contender_runs_under_autocast(tmp_path):
    arguments = ["steps", "--models", "mlp", "--optimizers", "sgd", "--rounds", "1", "--batch", "4"]
    done = CliRunner().invoke(
        speed.app, [*arguments, "--precision", "bf16", "--only", "MOLERE", "--only", "higher", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "speed-steps-mlp-sgd-bf16-cpu.json").read_text())
    assert stored["precision"] == "bf16" and not stored["errors"]

    dtypes = []
    task = speed.task_of("mlp", "sgd", "cpu", batch=4)
    speed._autocast(lambda task: lambda: dtypes.append(task.model(task.batch[0]).dtype), task)()
    assert dtypes == [torch.bfloat16]


def test_memory_is_measured_by_two_ways_to_allocate(tmp_path):
    arguments = ["memory", "--models", "mlp", "--batch", "512", "--only", "ERM", "--out", str(tmp_path)]
    done = CliRunner().invoke(speed.app, arguments)
    assert done.exit_code == 0, done.output
    stored = pd.read_csv(tmp_path / "speed-memory-mlp-sgd-cpu.csv").set_index("allocator")
    assert list(stored.index) == list(speed.ALLOCATORS)
    assert (stored.added >= 0).all() and (stored.added < stored.whole).all()


@pytest.mark.parametrize("command", ["steps", "error"])
def test_commands_store_their_results(command, tmp_path):
    options = {"steps": ["--rounds", "1", "--batch", "4"], "error": ["--training-steps", "4", "--seeds", "1"]}[command]
    arguments = [command, "--models", "mlp", "--optimizers", "sgd", "--out", str(tmp_path), *options]
    done = CliRunner().invoke(speed.app, arguments)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob(f"speed-{command}*-cpu.csv")
    stored = pd.read_csv(path)
    assert len(stored) > 0
    if command == "error":
        assert stored[stored.engine == "forward"].relative_error.max() < 1e-2
        assert stored.cosine.min() > 0.99
    assert path.with_suffix(".json").exists()


def test_the_parts_of_a_step_are_those_of_the_whole(tmp_path):
    arguments = ["profile", "--models", "conv", "--batch", "16", "--rounds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(speed.app, arguments)
    assert done.exit_code == 0, done.output
    seconds = pd.read_csv(tmp_path / "speed-profile-conv-sgd-cpu.csv").set_index("contender").seconds
    assert (seconds > 0).all() and set(seconds.index) == {"ERM", WHOLE, *PARTS}
    assert seconds[list(PARTS)].sum() < seconds[WHOLE]
    assert isinstance(speed.molere(small(), 5)(), StepResult)  # and nothing is left of the labels
    assert not hasattr(MetaReweighter._learn, "__wrapped__")


def test_a_model_in_channels_last_order_itself():
    task = speed.task_of("conv-channels-last", "sgd", "cpu", batch=4)
    assert task.batch[0].is_contiguous(memory_format=torch.channels_last)
    assert task.model[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    usual = speed.task_of("conv", "sgd", "cpu", batch=4)
    torch.testing.assert_close(task.batch[0], usual.batch[0], rtol=0, atol=0)


def test_peak_memory_counts_what_a_contender_adds(capsys):
    speed.peak("mlp", "sgd", "ERM", batch=8)
    added, whole = map(int, capsys.readouterr().out.split()[-2:])
    assert 0 <= added < whole


def test_growth_is_drawn(tmp_path):
    rows = [(v, x, c, r, s) for v in "abcde" for x in (1, 2) for c, s in (("ERM", 1), ("MOLERE", 1.2)) for r in (0, 1)]
    buffer = [("buffer capacity", x, name, 0, 1e-5) for x in (1000, 10_000) for name in ("insert", "draw", "release")]
    frame = pd.DataFrame(rows + buffer, columns=["varied", "value", "contender", "round", "seconds"])
    ratios = speed.summary(frame[frame.varied != "buffer capacity"], ["varied", "value"])
    draw_growth(frame, ratios, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_drawn(tmp_path):
    rows = [(c, 1.1, 1.2, 1.3) for c in ("MOLERE, every 5 (as shipped)", "MOLERE, every 1", "higher, every 1")]
    ratios = pd.DataFrame(rows, columns=["contender", "low", "median", "high"])
    draw_steps({"one": ratios, "other": ratios[:1]}, ["MOLERE", "higher"], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_buffer_operations_are_measured():
    found = list(speed._buffer_operations(1000, 2))
    assert [name for name, _ in found] == ["insert"] * 2 + ["draw"] * 2 + ["release"] * 2
    assert all(seconds > 0 for _, seconds in found)

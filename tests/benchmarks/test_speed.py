"""The speed benchmark measures what it says."""

import json
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import costs, report_cost, speed
from benchmarks.contenders import SETTLED, Task, molere
from benchmarks.profiling import PARTS, WHOLE, seconds_by_part
from benchmarks.speed_figures import draw_growth
from torch_molere import StepResult

pytestmark = pytest.mark.usefixtures("one_thread")


def small(optimizer="sgd"):
    torch.manual_seed(0)
    batches = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(2)]
    return Task(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), optimizer, *batches)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_contenders_run_or_say_why_not(optimizer):
    steps, errors = speed.made(speed.CONTENDERS, small(optimizer))
    assert {"ERM", "MOLERE, every 5", "MOLERE, every 1", "MOLERE, never"} <= set(steps)
    assert ("higher, every 1" in steps) == (optimizer == "sgd")  # it does not know AdamW
    assert set(errors) <= {name for name in speed.CONTENDERS if "MOLERE" not in name}


def test_ours_is_settled_and_updates_as_often_as_it_says():
    for every, expected in ((1, 5), (5, 1), (10**9, 0)):
        results = [step() for step in [molere(small(), every)] * 5]
        assert all(isinstance(result, StepResult) for result in results)
        assert sum(result.val_loss is not None for result in results) == expected
    assert SETTLED == 10


def test_ratios_are_taken_within_a_round():
    rows = [("m", "ERM", 0, 1.0), ("m", "ours", 0, 2.0), ("m", "ERM", 1, 10.0), ("m", "ours", 1, 30.0)]
    frame = pd.DataFrame(rows, columns=["model", "contender", "round", "seconds"])
    ours = speed.summary(frame, ["model"]).set_index("contender").loc["ours"]
    assert (ours.low, ours["median"], ours.high) == (2.25, 2.5, 2.75)


def test_every_contender_is_timed_once_a_round_and_made_anew_every_few():
    made, called = {"a": 0, "b": 0}, {"a": 0, "b": 0}

    def factory(name, task):
        made[name] += 1
        return lambda: called.__setitem__(name, called[name] + 1)

    rows = list(speed.rounds_anew({name: partial(factory, name) for name in made}, small(), 4, "cpu"))
    assert sorted((number, name) for number, name, _ in rows) == [(i, n) for i in range(4) for n in "ab"]
    assert made == {"a": 2, "b": 2} and called == dict.fromkeys("ab", 6 * speed.PERIOD + 2)


def test_steps_are_stored_and_drawn(tmp_path):
    speed.steps("features-mlp", "sgd", 1, 32, "fp32", ["every 5"], "cpu", tmp_path)
    stored = pd.read_csv(tmp_path / "speed-steps-features-mlp-sgd-cpu.csv")
    assert {"ERM", "MOLERE, every 5"} <= set(stored.contender)
    speed.draw("cpu", tmp_path)
    assert (tmp_path / "speed-steps-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_every_cost_that_is_stored(tmp_path):
    assert costs.section(tmp_path) == ""
    config = speed.provenance("benchmarks.speed", [], torch.device("cpu")) | {"model": "m", "parameters": 9, "batch": 8}
    for name in ("speed-steps-m-sgd-cpu", "speed-memory-m-sgd-cpu", "ranks-cpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    steps = pd.DataFrame({"contender": ["ERM", "MOLERE, every 5"], "seconds": [2.0, 3.0]})
    steps.assign(model="m", optimizer="sgd", round=0).to_csv(tmp_path / "speed-steps-m-sgd-cpu.csv")
    peaks = steps.assign(model="m", optimizer="sgd", allocator="glibc", round=0, added=[4, 5], whole=[8, 9])
    peaks.to_csv(tmp_path / "speed-memory-m-sgd-cpu.csv")
    told = {"seconds, ERM": 1.0, "seconds, MOLERE": 1.5, "peak, ERM": 1.0, "peak, MOLERE": 1.0}
    told |= {"messages, plain": 2, "bytes, plain": 1_000, "messages, a step": 1, "bytes, a step": 330}
    told |= {"messages, a step with a meta-update": 4, "bytes, a step with a meta-update": 4_321}
    rows = [("ddp", 2, quantity, 0, value) for quantity, value in told.items()]
    columns = ["wrap", "ranks", "quantity", "round", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "ranks-cpu.csv")
    (tmp_path / "report-cpu.json").write_text(json.dumps(config))
    measured = {"rows": 5000, "record_seconds": 0.25, "file_mb": 1.5, "write_seconds": 2, "page_mb": 3}
    pd.DataFrame([measured | {"drawn_seconds": 0.75}]).to_csv(tmp_path / "report-cpu.csv")
    page = costs.section(tmp_path)
    assert "| 5,000 | 0.25 | 1.5 | 2.0 | 3.0 | 0.75 |" in page
    assert "| m-sgd | 1.00 | 1.50 |" in page
    assert "| m | sgd | glibc | MOLERE, every 5 | 1.25 | 1.12 |" in page
    assert "| DDP | 2 | 1 | 330 | 4 | 4,321 | 2 | 1,000 |" in page


def test_the_cost_of_a_report_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report_cost, "opened", lambda page, repeats: float(page.exists()))
    report_cost.cost([1000], 1, tmp_path)
    (found,) = pd.read_csv(tmp_path / report_cost.FILE).to_dict("records")
    assert found.pop("rows") == 1000 and found.pop("drawn_seconds") == 1.0 and min(found.values()) > 0


def test_parts_of_a_step():
    seconds = seconds_by_part(molere(small(), 1), 2)
    assert set(seconds) == {WHOLE, *PARTS}
    assert min(seconds["plan"], seconds["meta_update"], seconds["commit"]) > 0
    assert sum(seconds[part] for part in PARTS) < seconds[WHOLE]


def test_growth_is_drawn(tmp_path):
    rows = [(v, x, c, 1.0, 1.1, 1.2) for v in "abc" for x in (1, 2) for c in ("ERM", "MOLERE")]
    draw_growth(
        pd.DataFrame(rows, columns=["varied", "value", "contender", "low", "median", "high"]), tmp_path / "g.png"
    )
    assert (tmp_path / "g.png").exists()

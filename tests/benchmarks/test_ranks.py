"""The benchmark of several processes."""

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from ranks import in_processes

from benchmarks import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")


def counted(rank):
    """Collective operations of known sizes."""
    with ranks.Messages() as messages:
        dist.all_reduce(torch.zeros(10))
        dist.all_gather([torch.empty(3, dtype=torch.double) for _ in range(2)], torch.empty(3, dtype=torch.double))
        torch.zeros(5) + 1
    return messages.count, messages.nbytes


def test_messages_and_their_bytes():
    assert in_processes(2, counted) == [(2, 10 * 4 + 3 * 8)] * 2


def told(rank):
    return ranks.told("ddp", "mlp", 4)


def test_a_meta_update_tells_a_gradient_of_the_model():
    """Without one a step tells only a few numbers for each instance."""
    (rows, _) = in_processes(2, told)
    frame = pd.DataFrame(rows, columns=["quantity", "round", "value"]).groupby("quantity").value.median()
    parameters = sum(p.numel() for p in ranks.build("mlp", (3, 32, 32), 10).parameters())
    assert 0 < frame["bytes, a step"] < 100 * 4
    assert 4 * parameters < frame["bytes, a step with a meta-update"] < 4 * parameters + 10_000
    assert frame["messages, a step"] < frame["messages, a step with a meta-update"] < 40


def test_summary():
    rows = []
    for number in range(3):
        rows += [("seconds, ERM", number, 2.0 * (number + 1)), ("seconds, MOLERE", number, 3.0 * (number + 1))]
    for kind, value in (("a step", 5), ("a step with a meta-update", 50)):
        rows += [(f"messages, {kind}", 0, value), (f"bytes, {kind}", 0, 10 * value)]
    rows += [("peak, ERM", 0, 100.0), ("peak, MOLERE", 0, 110.0)]
    frame = pd.DataFrame([("ddp", 2, *row) for row in rows], columns=["wrap", "ranks", "quantity", "round", "value"])
    (summary,) = ranks.summarised(frame).to_dict("records")
    assert summary["time"] == summary["time_low"] == 1.5
    assert (summary["step_messages"], summary["meta_bytes"]) == (5, 500)
    assert summary["memory"] == pytest.approx(1.1)

"""Checkpoints of torch.distributed.checkpoint: written by some ranks, read by as many or by another number."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from same import assert_same
from test_ddp import batch
from test_fsdp import classifier, sharded, values

from torch_molere import DistributedState, LearnedSplitter, MetaReweighter, ValidationBuffer
from torch_molere.distributed.state import dealt

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")

ROWS = 96


def objects(rank):
    model = classifier()
    if rank is not None:
        sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    buffer = ValidationBuffer(splitter=LearnedSplitter(), fraction=0.2, lr=0.05)
    return model, optimizer, MetaReweighter(model, optimizer, validation=buffer, warmup_steps=2, every=2)


def train(rank, number, model, reweighter, steps):
    inputs, targets = batch(0, ROWS)
    for step in steps:
        rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:24][rank or 0 :: number]
        reweighter.step((inputs[rows], targets[rows], rows))


def entries(model, optimizer, reweighter):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    parameters, state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": state, "reweighter": DistributedState(reweighter)}


def save(rank, folder):
    import torch.distributed.checkpoint as dcp

    model, optimizer, reweighter = objects(rank)
    train(rank, dist.get_world_size(), model, reweighter, range(9))
    dcp.save(entries(model, optimizer, reweighter), checkpoint_id=folder)
    state = copy.deepcopy(reweighter.state_dict())
    saved = values(model)
    train(rank, dist.get_world_size(), model, reweighter, range(9, 16))
    return saved, state, values(model), reweighter.state_dict()


def load(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer, reweighter = objects(rank)
    held = entries(model, optimizer, reweighter)
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    state = copy.deepcopy(reweighter.state_dict())
    loaded = values(model)
    train(rank, 1 if rank is None else dist.get_world_size(), model, reweighter, range(9, 16))
    return loaded, state, values(model), reweighter.state_dict()


def test_as_many_ranks_go_on_bit_for_bit(tmp_path):
    saved = in_ranks(2, save, tmp_path / "checkpoint")
    loaded = in_ranks(2, load, tmp_path / "checkpoint")
    assert_same(loaded, saved)
    stores = [part[1]["validation"]["store"] for part in saved]
    assert stores[0]["rows"] != stores[1]["rows"]
    assert saved[0][3]["steps"] == 16
    assert_same(saved[0][3]["history"], saved[1][3]["history"])


def instances(states):
    """Each row held, with its inputs and its class, over all ranks."""
    held = {}
    for state in states:
        store = state["validation"]["store"]
        inputs, targets = store["columns"] if store["columns"] else ((), ())
        for place, row in enumerate(store["rows"]):
            assert row not in held
            assert store["classes"][place] == targets[place]
            held[row] = inputs[place].tolist()
    return held


def seen(states):
    total = {}
    for state in states:
        for label, count in state["validation"]["seen"].items():
            total[label] = total.get(label, 0) + count
    return total


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_ranks_loses_nothing(tmp_path, number):
    saved = in_ranks(2, save, tmp_path / "checkpoint")
    if number == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DCP, that there is only one process
            loaded = [load(None, tmp_path / "checkpoint")]
    else:
        loaded = in_ranks(number, load, tmp_path / "checkpoint")
    before, after = [part[1] for part in saved], [part[1] for part in loaded]
    for rank, part in enumerate(loaded):
        assert_same(part[0], saved[0][0])
        assert part[1]["rank"] == [rank, number]
        for name in ("weighting", "weighting_optimizer", "steps", "seed", "engines", "history", "configuration"):
            assert_same(part[1][name], before[0][name])
        for name in ("splitter", "optimizer", "commits", "seed"):
            assert_same(part[1]["validation"][name], before[0]["validation"][name])
        assert part[3]["steps"] == 16  # they go on
        assert not all(torch.equal(value, part[0][name]) for name, value in part[2].items())
        for name in ("weighting", "history"):
            assert_same(part[3][name], loaded[0][3][name])
        assert_same(part[2], loaded[0][2])
    inputs, _ = batch(0, ROWS)
    held = instances(before)
    assert len(held) > 4
    assert instances(after) == held == {row: inputs[row].tolist() for row in held}
    sizes = [len(state["validation"]["store"]["rows"]) for state in after]
    assert max(sizes) - min(sizes) <= 1
    assert seen(after) == seen(before)
    assert sum(seen(before).values()) == 9 * 24


def part_of(rows, low=0.0):
    return {
        "store": {
            "columns": [torch.tensor(rows, dtype=torch.float)[:, None], [f"text {row}" for row in rows]]
            if rows
            else [],
            "rows": [row if row < 100 else None for row in rows],
            "classes": [row % 3 for row in rows],
            "times": [row + 1 for row in rows],
        },
        "quota": [low, 1.0],
        "seen": {0: 5, 1: 2} if rows else {},
    }


def test_dealing():
    """Rows that two ranks hold are dealt once, those without a row always; no more than the bounds allow."""
    parts = [part_of([3, 101, 5]), part_of([]), part_of([5, 7, 102], low=3.0)]
    assert dealt(parts, 1, 3, lambda _: 10) == parts[1]
    first, second = (dealt(parts, rank, 2, lambda _: 10) for rank in range(2))
    assert first["store"]["rows"] == [3, None]
    assert second["store"]["rows"] == [5, 7, None]
    assert second["store"]["columns"][1] == ["text 5", "text 7", "text 102"]
    assert_same(second["store"]["columns"][0], torch.tensor([[5.0], [7.0], [102.0]]))
    assert second["store"]["classes"] == [2, 1, 0]
    assert second["store"]["times"] == [6, 8, 103]
    assert first["quota"] == [1.0, 1.0]
    assert [first["seen"][0] + second["seen"][0], first["seen"][1] + second["seen"][1]] == [10, 4]
    assert len(dealt(parts, 0, 1, lambda _: 4)["store"]["rows"]) == 4
    nothing = dealt([part_of([])] * 2, 0, 1, lambda _: 4)
    assert nothing["store"]["rows"] == []


def small():
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return MetaReweighter(model, optimizer, validation=ValidationBuffer(fraction=0.3, capacity=7), warmup_steps=9)


def crowded(rank):
    reweighter = small()
    for step in range(6):
        inputs, targets = batch(10 * step + rank, 10)
        reweighter.step((inputs, targets, torch.arange(10) + 100 * step + 10 * rank))
    return DistributedState(reweighter).state_dict(), len(reweighter.validation)


def test_fewer_ranks_keep_what_their_bounds_allow():
    """Two ranks hold four rows each at capacity 7; one takes seven of them, and goes on."""
    (packed, held), (_, also_held) = in_ranks(2, crowded)
    assert held == also_held == 4
    reweighter = small()
    DistributedState(reweighter).load_state_dict(packed)
    assert len(reweighter.validation) == 7
    inputs, targets = batch(99, 10)
    reweighter.step((inputs, targets, torch.arange(10) + 1000))
    assert len(reweighter.validation) == 7


def test_a_fixed_validation_set():
    """One rank, no buffer: there is nothing to deal out."""

    def made():
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, MetaReweighter(
            model, optimizer, validation=[batch(1), batch(2), batch(3)], warmup_steps=1, every=1
        )

    model, reweighter = made()
    train(None, 1, model, reweighter, range(6))
    packed = DistributedState(reweighter).state_dict()
    _, other = made()
    DistributedState(other).load_state_dict(packed)
    assert_same(other.state_dict(), reweighter.state_dict())
    assert other.state_dict()["validation"] == {"pass": 1, "position": 2, "seed": 0}


def test_a_state_of_another_configuration_is_refused():
    model, _, reweighter = objects(None)
    packed = DistributedState(reweighter).state_dict()
    other = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), every=7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"another configuration: .*every=2 \(here 7\)"):
        DistributedState(other).load_state_dict(packed)
    assert_same(other.state_dict(), before)

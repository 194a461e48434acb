"""Checkpoints of torch.distributed.checkpoint: written by some processes, read by as many or by another number."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes
from same import assert_same
from test_distributed import batch
from test_sharded import classifier, sharded, values
from torch import nn

from torch_molere import DistributedState, MetaReweighter

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")

ROWS = 96


def objects(rank, **options):
    model = classifier(nn.LayerNorm)
    if rank is not None:
        sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = {"warmup_steps": 2, "every": 2, "val_fraction": 0.2, "splitter_lr": 0.05} | options
    return model, optimizer, MetaReweighter(model, optimizer, **settings)


def train(rank, number, model, reweighter, steps):
    inputs, targets = batch(0, ROWS)
    for step in steps:
        rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:24][rank or 0 :: number]
        reweighter.step((inputs[rows], targets[rows], rows))


def entries(model, optimizer, reweighter):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    parameters, state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": state, "reweighter": DistributedState(reweighter)}


def save(rank, folder, **options):
    import torch.distributed.checkpoint as dcp

    model, optimizer, reweighter = objects(rank, **options)
    train(rank, dist.get_world_size(), model, reweighter, range(9))
    dcp.save(entries(model, optimizer, reweighter), checkpoint_id=folder)
    state = copy.deepcopy(reweighter.state_dict())
    saved = values(model)
    train(rank, dist.get_world_size(), model, reweighter, range(9, 16))
    return saved, state, values(model), reweighter.state_dict()


def load(rank, folder, **options):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer, reweighter = objects(rank, **options)
    held = entries(model, optimizer, reweighter)
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    state = copy.deepcopy(reweighter.state_dict())
    loaded = values(model)
    train(rank, 1 if rank is None else dist.get_world_size(), model, reweighter, range(9, 16))
    return loaded, state, values(model), reweighter.state_dict()


def test_as_many_processes_go_on_bit_for_bit(tmp_path):
    saved = in_processes(2, save, tmp_path / "checkpoint")
    loaded = in_processes(2, load, tmp_path / "checkpoint")
    assert_same(loaded, saved)
    assert saved[0][1]["holdout"]["buffer"]["rows"] != saved[1][1]["holdout"]["buffer"]["rows"]
    assert saved[0][3]["steps"] == 16


def instances(states):
    """Each row held, with its inputs and its class, over all processes."""
    held = {}
    for state in states:
        buffer = state["holdout"]["buffer"]
        if buffer["held"] is None:
            continue
        ((inputs,), _), targets = buffer["held"]
        for place, row in enumerate(buffer["rows"]):
            assert row not in held
            assert buffer["classes"][place] == targets[place]
            assert place in buffer["slots_of_class"][int(targets[place])]
            held[row] = inputs[place].tolist()
    return held


def total(states, name, of=lambda state: state["holdout"]["buffer"]):
    summed = {}
    for state in states:
        for key, count in of(state)[name].items():
            summed[key] = summed.get(key, 0) + count
    return summed


@pytest.mark.parametrize("number", [1, 4])
def test_another_number_of_processes_loses_nothing(tmp_path, number):
    saved = in_processes(2, save, tmp_path / "checkpoint")
    if number == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of DCP, that there is only one process
            loaded = [load(None, tmp_path / "checkpoint")]
    else:
        loaded = in_processes(number, load, tmp_path / "checkpoint")
    before, after = [part[1] for part in saved], [part[1] for part in loaded]
    assert len(loaded) == number
    for part in loaded:
        assert_same(part[0], saved[0][0])
        for name in ("weighting", "weighting_optimizer", "steps", "draws", "seed", "engine"):
            assert_same(part[1][name], before[0][name])
        for name in ("splitter", "optimizer"):
            assert_same(part[1]["holdout"][name], before[0]["holdout"][name])
        assert part[3]["steps"] == 16  # they go on
        assert not all(torch.equal(value, part[0][name]) for name, value in part[2].items())
        assert_same(part[2], loaded[0][2])
    inputs, _ = batch(0, ROWS)
    held = instances(before)
    assert len(held) > 4
    assert instances(after) == held == {row: inputs[row].tolist() for row in held}
    sizes = [len(state["holdout"]["buffer"]["rows"]) for state in after]
    assert max(sizes) - min(sizes) <= 1
    assert total(after, "seen") == total(before, "seen")
    assert sum(total(before, "seen").values()) == 9 * 24
    sums = [sum(state["history"]["sums"].sum(dim=0) for state in states) for states in (before, after)]
    assert_same(sums[0], sums[1], rtol=1e-6, atol=0)
    assert sum(state["holdout"]["buffer"]["capacity"] for state in after) == 2048
    streams = {str(state["holdout"]["buffer"]["random"]) for state in after}
    assert len(streams) == number


def test_a_fixed_validation_set(tmp_path):
    """One process, no buffer: there is nothing to deal out."""
    validation = [batch(1), batch(2)]
    model, _, reweighter = objects(None, validation=validation, val_fraction=0.1)
    train(None, 1, model, reweighter, range(5))
    packed = DistributedState(reweighter).state_dict()
    _, _, other = objects(None, validation=validation, val_fraction=0.1)
    DistributedState(other).load_state_dict(packed)
    assert_same(other.state_dict(), reweighter.state_dict())


def test_another_configuration_is_refused():
    _, _, reweighter = objects(None)
    _, _, other = objects(None, every=3)
    with pytest.raises(ValueError, match="every=2 \\(here 3\\)"):
        DistributedState(other).load_state_dict(DistributedState(reweighter).state_dict())

"""The recipe of docs/checkpoints.md: a file that is whole at any moment, from which training goes on bit-equal."""

import hashlib
import io
import os
import pickle
import random
import re
import signal
import time
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from same import assert_same
from torch import nn
from torch.utils import _pytree as pytree

from torch_molere import LearnedSplitter, MetaReweighter, SignalWeighting, ValidationBuffer

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
RECIPE, LOOP = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
recipe = {}
exec(compile(RECIPE, str(PAGE), "exec"), recipe)
save_checkpoint, load_checkpoint = recipe["save_checkpoint"], recipe["load_checkpoint"]

pytestmark = pytest.mark.usefixtures("one_thread")
SAVE_EVERY, LONGEST = 2, 40
PLACES = ("in save", "before fsync", "after fsync", "before replace", "after replace")
COMPLETE = PLACES[PLACES.index("after replace") :]
"""Killed here, a process leaves the new checkpoint; at the places before, the earlier one."""


def start():
    """Model, optimizer, scheduler and reweighter, and the random streams of a fresh run."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    buffer = ValidationBuffer(splitter=LearnedSplitter(("loss", "margin"), hidden=8), capacity=20, hold_out=True)
    reweighter = MetaReweighter(
        model, optimizer, weighting=SignalWeighting(hidden=8), validation=buffer, warmup_steps=3, every=2
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "reweighter": reweighter}


def train(objects):
    """One step on a batch that the three random streams choose."""
    rows = torch.randperm(40)[:10]
    x = torch.sin(rows[:, None] * torch.arange(1.0, 6.0)) + 0.1 * np.random.randn() + 0.1 * random.gauss(0, 1)
    objects["reweighter"].step((x, rows % 3, rows))
    objects["scheduler"].step()


def digest(objects):
    """Of everything that a run consists of, random streams too."""
    states = {name: thing.state_dict() for name, thing in objects.items()}
    leaves, spec = pytree.tree_flatten([states, torch.get_rng_state(), np.random.get_state(), random.getstate()])
    found = [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
    return hashlib.sha256(pickle.dumps([found, repr(spec)])).hexdigest()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place):
    """This process dies at a place inside the next write."""
    when, name = place.split()
    module = torch if name == "save" else os
    original = getattr(module, name)

    def lethal(*arguments):
        if when == "in":
            content, file = arguments
            whole = io.BytesIO()
            original(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            kill()
        if when == "before":
            kill()
        original(*arguments)
        kill()

    setattr(module, name, lethal)


def run(path, place, told):
    """Go on from the checkpoint, if there is one, saving at times and telling the digest of every step."""
    objects = start()
    step = load_checkpoint(path, **objects) if path.exists() else 0
    told.send((step, digest(objects)))
    while step < LONGEST:
        train(objects)
        step += 1
        told.send((step, digest(objects)))
        if step % SAVE_EVERY == 0 and path.parent.exists():
            if place is not None:
                kill_at(place)
            save_checkpoint(path, step, **objects)
    told.send(None)


def begun(path, place=None):
    """A fresh process that trains, and what it tells."""
    hears, told = fresh.context.Pipe(duplex=False)
    process = fresh.process(run, path, place, told)
    told.close()
    return process, hears


def heard(hears, most=LONGEST + 1):
    """What a process has told, until it ends or so many steps are told."""
    found = []
    try:
        while len(found) < most and (message := hears.recv()) is not None:
            found.append(message)
    except EOFError:
        pass
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The digests of a run that nobody kills and that saves nothing, by step."""
    process, hears = begun(tmp_path_factory.mktemp("gone") / "nowhere" / "run.pt")
    found = heard(hears)
    process.join()
    assert [step for step, _ in found] == list(range(LONGEST + 1))
    return [each for _, each in found]


def assert_bit_equal(told, uninterrupted):
    assert told
    for step, found in told:
        assert found == uninterrupted[step], step


def test_killed_inside_a_write_one_of_two_checkpoints_is_there(uninterrupted, tmp_path):
    """One run that dies at one place after another, each time in its second step, and goes on in a fresh process."""
    path, saved = tmp_path / "run.pt", 0
    for place in (PLACES[-1], *PLACES):
        process, hears = begun(path, place)
        told = heard(hears)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert [step for step, _ in told] == list(range(saved, saved + SAVE_EVERY + 1))
        assert_bit_equal(told, uninterrupted)
        saved += SAVE_EVERY * (place in COMPLETE)
        assert path.exists()
        assert [each.name for each in tmp_path.iterdir() if each != path] == ["run.pt.unfinished"] * (
            place not in COMPLETE
        )


def test_killed_at_any_moment_training_goes_on_bit_equal(uninterrupted, tmp_path):
    path, saved, delays = tmp_path / "run.pt", 0, random.Random(0)
    for _ in range(6):
        process, hears = begun(path)
        told = heard(hears, most=delays.randrange(1, 8))
        time.sleep(delays.uniform(0.0, 0.02))
        process.kill()
        told += heard(hears)
        process.join()
        assert_bit_equal(told, uninterrupted)
        assert told[0][0] >= saved
        saved = told[0][0]
    assert saved > 4  # it has got somewhere between its deaths


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error, place):
    objects, path = {"layer": nn.Linear(2, 2)}, tmp_path / "run.pt"
    save_checkpoint(path, 1, **objects)
    whole = path.read_bytes()

    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(place, fail)
        with pytest.raises(type(error)):
            save_checkpoint(path, 2, **objects)
    assert path.read_bytes() == whole
    assert load_checkpoint(path, **objects) == 1
    save_checkpoint(path, 3, **objects)
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(tmp_path):
    objects, path = start(), tmp_path / "run.pt"
    for _ in range(5):
        train(objects)
    save_checkpoint(path, 5, **objects)
    whole = path.read_bytes()
    other = start()
    before = digest(other)
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises((EOFError, OSError, RuntimeError, pickle.UnpicklingError)):
            load_checkpoint(path, **other)
        assert digest(other) == before
    path.write_bytes(whole)
    assert load_checkpoint(path, **other) == 5
    assert digest(other) == digest(objects)


def page(folder, epochs):
    """All that is on the page, run from top to bottom."""
    os.chdir(folder)
    script = RECIPE + LOOP.replace("range(done, EPOCHS)", f"range(done, {epochs})")
    assert str(epochs) in script
    exec(compile(script, str(PAGE), "exec"), {})


def test_the_page_goes_on_where_it_was_interrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    fresh.in_fresh_processes(page, [(whole, 4), (parts, 2)])
    assert torch.load(parts / "run.pt", weights_only=True)["epoch"] == 2
    fresh.in_fresh_processes(page, [(parts, 4)])
    found, expected = (torch.load(folder / "run.pt", weights_only=True) for folder in (parts, whole))
    assert found["states"]["reweighter"]["engines"]["updates"] > 2
    for name in ("epoch", "states", "torch"):  # nothing there draws from the streams that it does not seed
        assert_same(found[name], expected[name])

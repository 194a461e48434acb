"""A training run that draws from every global random stream, and a nursery of processes of it to be killed.

As a script it forks one process for every line that it reads, a folder and a place, and answers with its number. The
process takes up the newest checkpoint in the folder and trains, saving as it goes and telling each step, until it is
killed: by the reader of its number, or by itself at a place inside the next write.
"""

import hashlib
import io
import os
import pickle
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_molere import LearnedSplitter, MetaReweighter, SignalWeighting, load_checkpoint, save_checkpoint

SAVE_EVERY = 2
PLACES = (
    "before save",
    "in save",
    "after save",
    "before fsync 1",
    "after fsync 1",
    "before replace",
    "after replace",
    "before fsync 2",
    "after fsync 2",
)
COMPLETE = PLACES[PLACES.index("after replace") :]
"""Killed here, a process leaves the new checkpoint; at the places before, the earlier one."""


def start(seed=0):
    """Model, optimizer, scheduler and reweighter, and the random streams of a fresh process."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = MetaReweighter(
        model,
        optimizer,
        weighting=SignalWeighting(("loss", "margin"), hidden=8),
        splitter=LearnedSplitter(("loss", "margin"), hidden=8),
        weighting_lr=0.01,
        warmup_steps=3,
        every=2,
        buffer_size=20,
        hypergradient="finite",
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "reweighter": reweighter}


def train(objects):
    """One step on a batch that the three random streams choose."""
    rows = torch.randperm(40)[:10]
    x = torch.sin(rows[:, None] * torch.arange(1.0, 6.0)) + 0.1 * np.random.randn() + 0.1 * random.random()
    objects["reweighter"].step((x, rows % 3, rows))
    objects["scheduler"].step()


def digest(objects):
    """Of everything that a run consists of, random streams too."""
    states = {name: thing.state_dict() for name, thing in objects.items()}
    streams = [torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tobytes(), random.getstate()]
    leaves, spec = pytree.tree_flatten([states, streams, np.random.get_state(legacy=False)["state"]["pos"]])
    found = [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
    return hashlib.sha256(pickle.dumps([found, repr(spec)])).hexdigest()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(place):
    """This process dies at a place inside the next ``save_checkpoint``."""
    when, name, *number = place.split()
    count = int(number[0]) if number else 1
    module = torch if name == "save" else os
    original = getattr(module, name)
    calls = []

    def lethal(*arguments, **options):
        calls.extend([1] * (not isinstance(arguments[-1], io.BytesIO)))  # what goes to memory is no write
        if len(calls) < count:
            return original(*arguments, **options)
        if when == "in":
            content, file = arguments
            whole = io.BytesIO()
            original(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            kill()
        if when == "before":
            kill()
        original(*arguments, **options)
        kill()

    setattr(module, name, lethal)


def run(folder, place):
    objects = start()
    path, step = Path(folder) / "checkpoint.pt", 0
    if path.exists():
        step = load_checkpoint(path, **objects)["step"]
    while True:
        train(objects)
        step += 1
        if step % SAVE_EVERY == 0:
            if place != "anywhere" and path.exists():
                kill_at(place)
            save_checkpoint(path, step=step, **objects)
        os.write(1, b"step\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm = start()
    for _ in range(6):  # what is imported late is imported once, before the forks
        train(warm)
    save_checkpoint(sys.argv[1], **warm)
    load_checkpoint(sys.argv[1], **warm)
    for line in sys.stdin:
        folder, place = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            run(folder, place)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)

"""What each method costs: time and memory of a whole training beside plain training's."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.baselines import CHOSEN
from benchmarks.study.methods import ERM, LRW, MOLERE, Method
from benchmarks.study.problems import Corpus, Problem, Setting
from benchmarks.study.studies import FITTED, HELD_OUT, ON_IMAGES, Study
from benchmarks.study.training import train

STUDY = Study(
    "overhead",
    "What does each method cost? Time of a whole training divided by plain training's, and the memory that training "
    "adds to a process at its peak; other models that a method trains first are in it. Each run is a process of its "
    "own on an otherwise idle machine, the methods in a new random order for every seed. On features a step takes "
    "about a millisecond, so that whatever a method does besides shows; `benchmarks.speed` has larger models.",
    (
        replace(FITTED, name="MLP on features"),
        replace(ON_IMAGES, name="conv on images", model="conv", lr=0.02),
    ),
    (ERM, LRW["Random"], MOLERE, HELD_OUT, *CHOSEN),
    finding="Focal loss and RGD cost next to nothing. Where a step is so short, MOLERE's own work shows, more on "
    "features than on small images; methods with a meta-update at every step (Learning to Reweight, "
    "Meta-Weight-Net) and RHO-Loss, which trains two more models, cost more still.",
)


def costs(corpus: Corpus, seed: int) -> Iterator[dict[str, Any]]:
    """Seconds and bytes of every method in every setting."""
    for setting in STUDY.settings:
        problem = replace(corpus.problem(setting, seed, on_test=True), evaluations={})
        for method in random.Random(seed).sample(STUDY.methods, len(STUDY.methods)):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                run = alone.submit(cost, setting, method, problem, corpus.classes, seed, torch.get_num_threads())
                seconds, added = run.result()
            yield {"setting": setting.name, "method": method.name, "seed": seed, "seconds": seconds, "added": added}


def cost(
    setting: Setting, method: Method, problem: Problem, classes: int, seed: int, threads: int
) -> tuple[float, int]:
    """Seconds of one training in this process, and the bytes that it adds to the process's peak."""
    torch.set_num_threads(threads)
    problem.inputs.sum()  # brings shared memory in
    few = replace(problem, inputs=problem.inputs[:2], labels=problem.labels[:2], clean=problem.clean[:2])
    train(replace(setting, epochs=1), ERM, few, classes, seed)  # pays for lazy initialisation
    before = _peak()
    trained = train(setting, method, problem, classes, seed)
    return trained.seconds, _peak() - before


def _peak() -> int:
    """Bytes of memory that this process has held at most; ``getrusage`` would count its parent's in."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None, "the peak of a process is read from Linux's /proc"
    return 1024 * int(found[1])

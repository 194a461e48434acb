"""Runs jobs in parallel processes, one thread each, and stores what they find as they finish."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from sklearn.model_selection import StratifiedKFold

from benchmarks.data import Corpus, Values, read
from benchmarks.measures import found, measure, ranked
from benchmarks.methods import PLAIN, Method
from benchmarks.peers import logits
from benchmarks.problems import Drawing, Problem, Setting
from benchmarks.training import plain_epochs, train
from torch_molere import probabilistic_margin

ANNOTATORS = ("label_random1", "label_random2", "label_random3")
FOLDS = 4


@dataclass(frozen=True)
class Job:
    """A run to be made.

    Attributes:
        setting, method, seed: which.
        thirds: whether instances are parted by the margins of a reference model.
        find: whether it is asked how well the rows' scores find wrong labels.
    """

    setting: Setting
    method: Method
    seed: int
    thirds: bool = False
    find: bool = False


@dataclass(frozen=True)
class Place:
    """Where the data lies, and where what is made of it is kept."""

    root: Path
    cache: Path


def execute(job: Job, place: Place) -> dict[str, Any]:
    """Train and measure once: a row of the table."""
    logging.getLogger("torch_molere").setLevel(logging.ERROR)  # what it advises would come with each of many runs
    setting = replace(job.setting, **job.method.training)
    drawing = _drawing(replace(job.setting, name="", lr=0, weight_decay=0, epochs=0), place)
    problem = drawing.problem(job.seed)
    row: dict[str, Any] = {"setting": job.setting.name, "method": job.method.name, "seed": job.seed}
    missed = _missed(drawing.corpus, problem) if job.find else None
    if job.method.kind == "cleanlab":
        return row | _cleanlab(setting, problem, missed, job.seed)
    run = train(setting, job.method, problem, job.seed)
    if job.find:
        row |= found(run, problem, missed)
    row |= measure(run, problem, _reference(setting, drawing, place) if job.thirds else None)
    return row | {"lr": setting.lr, "weight_decay": setting.weight_decay}


@lru_cache(maxsize=2)
def _corpus(name: str, place: Place) -> Corpus:
    return read(name, place.root, place.cache)


@lru_cache(maxsize=4)
def _drawing(setting: Setting, place: Place) -> Drawing:
    return Drawing(setting, _corpus(setting.data, place))


def _reference(setting: Setting, drawing: Drawing, place: Place) -> torch.Tensor:
    """``(M,)`` test margins of plain training with rows and an initialisation of its own, kept on disk."""
    key = hashlib.blake2b(repr(replace(setting, name="")).encode(), digest_size=12).hexdigest()
    path = place.cache / f"reference-{key}.npy"
    if not path.exists():
        problem = drawing.problem(1_000)
        run = train(setting, PLAIN, problem, 1_000, judge=False)
        margins = probabilistic_margin(logits(run.model, problem.test.inputs), problem.test.labels)
        place.cache.mkdir(parents=True, exist_ok=True)
        np.save(path, margins.numpy())
    return torch.from_numpy(np.load(path))


def _missed(corpus: Corpus, problem: Problem) -> Values | None:
    """``(N,)`` how many annotators missed the true class."""
    columns = corpus.train.labels
    if not set(ANNOTATORS) <= set(columns):
        return None
    return sum((columns[name][problem.source] != problem.clean.numpy()).astype(int) for name in ANNOTATORS)


def _cleanlab(setting: Setting, problem: Problem, missed: Values | None, seed: int) -> dict[str, float]:
    """Scores of rows by classifiers that were not trained on them."""
    probabilities = np.zeros((len(problem.labels), problem.classes))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (own, others) in enumerate(folds.split(np.zeros(len(problem.labels)), problem.labels.numpy())):
        *_, model = plain_epochs(setting, problem, torch.from_numpy(own), seed + number)
        probabilities[others] = logits(model, problem.inputs[others]).softmax(dim=1).numpy()
    scores = {
        name: -get_label_quality_scores(problem.labels.numpy(), probabilities, method=name.replace(" ", "_"))
        for name in ("self confidence", "normalized margin")
    }
    return ranked(scores, problem, missed)


def run_all(jobs: Sequence[Job], place: Place, processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with its row, as they finish.

    Args:
        processes: at 1 they run in this process.
    """
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, execute(job, place)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as executor:
        futures = {executor.submit(execute, job, place): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise

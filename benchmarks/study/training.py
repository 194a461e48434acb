"""One run: a problem, a method, a seed; the same budget, initialisation and order of data for every method."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import write
from benchmarks.study import baselines
from benchmarks.study.budget import batches_in, classifier, optimisation
from benchmarks.study.gap import Curve
from benchmarks.study.measures import Reference, logits, measure
from benchmarks.study.methods import Method, reweighter
from benchmarks.study.problems import SHIFTS, Corpus, Problem, Rows, Setting
from torch_molere import MetaReweighter, probabilistic_margin

WARMUP = 0.25
"""Of the steps, as in the paper."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    model: nn.Module
    reweighter: MetaReweighter | None
    rows: Rows
    mean_losses: Tensor  # (N,), of each row over its encounters in training; NaN where there were none
    seconds: float


def train(
    setting: Setting,
    method: Method,
    problem: Problem,
    classes: int,
    seed: int,
    erm_margins: Tensor | None = None,
    after_epoch: Callable[[nn.Module], None] | None = None,
) -> Trained:
    """Train once.

    Args:
        erm_margins: ``(N,)``, of plain training with the same seed; needed where easy or hard rows are set apart.
        after_epoch: called with the model after each, its time not counted.
    """
    apart = method.rows_apart(problem, seed, erm_margins)
    everything = np.arange(len(problem.labels))
    rows = np.setdiff1d(everything, apart) if method.held_out else everything
    torch.manual_seed(seed)
    model = classifier(setting, problem.inputs, classes)
    each = batches_in(len(rows), setting.batch_size)
    steps = setting.epochs * each
    optimizer, scheduler = optimisation(model, setting, steps)
    weighing: MetaReweighter | None = None
    if method.weighs in ("fixed", "molere"):
        weighing = reweighter(
            method, problem, apart, model, optimizer, classes, setting.batch_size, round(WARMUP * steps), seed
        )
    sums, counts = torch.zeros(len(everything)), torch.zeros(len(everything))
    start = time.perf_counter()
    objective = baselines.objective(method, setting, problem, apart, model, classes, seed)
    stream = baselines.batches(method, setting, problem, rows, model, classes, seed)
    for number, batch in enumerate(stream, start=1):
        inputs, labels = problem.inputs[batch], problem.labels[batch]
        if weighing is None:
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            optimizer.zero_grad()
            objective(losses, batch).backward()
            optimizer.step()
            sums[batch] += losses.detach()
            counts[batch] += 1
        else:
            weighing.step((inputs, labels, batch))
        scheduler.step()
        if after_epoch is not None and number % each == 0:
            paused = time.perf_counter()
            after_epoch(model)
            start += time.perf_counter() - paused
    seconds = time.perf_counter() - start
    if weighing is not None:
        weighing.close()
    return Trained(model, weighing, rows, sums / counts, seconds)


class Laboratory:
    """Runs on one corpus; keeps what several of them need: the reference, and plain training's margins.

    Args:
        corpus: the data.
        on_test: report on the test set, or choose on the selection set.
        reference: how the reference is trained, on clean labels and with a seed of its own.
    """

    REFERENCE = Setting("reference", rows=None, epochs=8, lr=0.03)
    REFERENCE_SEED = 1_000

    def __init__(self, corpus: Corpus, on_test: bool, reference: Setting = REFERENCE) -> None:
        self.corpus = corpus
        self.on_test = on_test
        self.reference_setting = reference
        self._reference: Reference | None = None
        self._margins: dict[tuple[str, int], Tensor] = {}
        self._problem: tuple[tuple[Setting, int], Problem] | None = None

    def run(self, setting: Setting, method: Method, seed: int) -> dict[str, Any]:
        """Train and measure once: a row of the study's table."""
        problem = self._problem_of(setting, seed)
        margins = self._erm_margins(setting, seed) if method.apart in ("easy", "hard") else None
        curve = Curve(problem) if setting.validated else None
        after_epoch = None if curve is None else curve.observe
        trained = train(setting, method, problem, self.corpus.classes, seed, margins, after_epoch)
        if method.name == "ERM":
            self._keep_margins(setting, seed, trained.model, problem)
        numbers: dict[str, Any] = {"setting": setting.name, "method": method.name, "seed": seed}
        for name, (inputs, targets) in problem.evaluations.items():
            outputs = logits(trained.model, inputs)
            if name == "clean":
                numbers |= measure(outputs, targets, self.reference)
            else:
                numbers[f"accuracy_{name}"] = (outputs.argmax(dim=1) == targets).double().mean().item()
        if curve is not None:
            numbers |= curve.numbers()
        if setting.trusted_shifts:
            numbers |= _seen_and_unseen(numbers, setting.trusted_shifts)
        fitted = logits(trained.model, problem.inputs[trained.rows])
        labels = problem.labels[trained.rows]
        numbers |= {
            "train_accuracy": (fitted.argmax(dim=1) == labels).double().mean().item(),
            "train_loss": F.cross_entropy(fitted, labels).item(),
            "train_rows": len(trained.rows),
            "label_errors": (problem.labels != problem.clean).double().mean().item(),
            "seconds": round(trained.seconds, 2),
        }
        if not math.isfinite(numbers["nll"]):
            raise FloatingPointError(f"{method.name} diverged in {setting.name}, seed {seed}")
        return numbers

    @property
    def reference(self) -> Reference:
        """Hardness of the clean evaluation instances to a model trained on the whole pool's features."""
        if self._reference is None:
            inputs, targets = self.corpus.judged(self.on_test)
            outputs = logits(self._reference_model(), inputs)
            losses = F.cross_entropy(outputs, targets, reduction="none")
            self._reference = Reference(probabilistic_margin(outputs, targets), losses)
        return self._reference

    def _reference_model(self) -> nn.Module:
        """Trained once and kept beside the features."""
        setting, features = self.reference_setting, self.corpus.features
        key = hashlib.blake2b(f"{setting} {features.source} {len(self.corpus.pool)}".encode(), digest_size=12)
        path = features.folder / f"reference-{key.hexdigest()}.pt"
        model = classifier(setting, self.corpus.inputs, self.corpus.classes)
        if not path.exists():
            problem = self.corpus.problem(setting, self.REFERENCE_SEED, self.on_test)
            trained = train(setting, Method("ERM"), problem, self.corpus.classes, self.REFERENCE_SEED)
            packed = io.BytesIO()
            torch.save(trained.model.state_dict(), packed)
            write(path, packed.getvalue())
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def _problem_of(self, setting: Setting, seed: int) -> Problem:
        if self._problem is None or self._problem[0] != (setting, seed):
            self._problem = (setting, seed), self.corpus.problem(setting, seed, self.on_test)
        return self._problem[1]

    def _erm_margins(self, setting: Setting, seed: int) -> Tensor:
        if (setting.name, seed) not in self._margins:  # a resumed study has not trained it in this process
            problem = self._problem_of(setting, seed)
            trained = train(setting, Method("ERM"), problem, self.corpus.classes, seed)
            self._keep_margins(setting, seed, trained.model, problem)
        return self._margins[setting.name, seed]

    def _keep_margins(self, setting: Setting, seed: int, model: nn.Module, problem: Problem) -> None:
        self._margins[setting.name, seed] = probabilistic_margin(logits(model, problem.inputs), problem.labels)


def _seen_and_unseen(numbers: Mapping[str, Any], seen: Collection[str]) -> dict[str, float]:
    """Mean accuracy, over strengths, on the kinds of shift among the trusted rows and on the others."""
    found: dict[str, list[float]] = {"accuracy_seen": [], "accuracy_unseen": []}
    for kind, strengths in SHIFTS.items():
        part = found["accuracy_seen" if kind in seen else "accuracy_unseen"]
        part += [numbers[f"accuracy_{kind}_{strength + 1}"] for strength in range(len(strengths))]
    return {name: float(np.mean(values)) for name, values in found.items()}

"""One training run of each method: plain training, learned reweighting on a fixed split, and MOLERE."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.batches import Batches, LabelledImages
from benchmarks.datasets import Task
from torch_molere import InputWeighting, MetaReweighter, SignalWeighting, probabilistic_margin, split_by_margin

METHODS = ("ERM", "LRW-Easy", "LRW-Random", "LRW-Hard", "MOLERE")

WEIGHTINGS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "loss": lambda model, classes: SignalWeighting(),
    "signals": lambda model, classes: SignalWeighting(
        ("loss", "margin", "probabilities", "label"), num_classes=classes
    ),
    "inputs": lambda model, classes: InputWeighting.from_classifier(model, classes),
}
"""φ by what it sees, made for a classifier and its number of classes."""

Report = Callable[[int, int, float, float], None]
"""``report(step, steps, loss, accuracy)`` of the latest batch."""

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``criterion(outputs, targets, indices)``: the scalar to go down."""


@dataclass(frozen=True)
class Recipe:
    """How every method trains: one budget, one optimizer (SGD, momentum 0.9, cosine schedule by step), one data order.

    Attributes:
        epochs: passes over the rows that are trained on.
        batch_size: of training and validation batches.
        lr, weight_decay: of SGD.
        augment: random crops and flips, of validation batches too, as they are in MOLERE's buffer.
        weighting: what φ sees, one of :data:`WEIGHTINGS`.
        weighting_lr: its learning rate.
        every: a meta-update at every so many steps.
        val_fraction: the share of the training rows that is validation.
        warmup: the share of the steps that is plain training.
        amp: ``"bf16"`` for autocast around the forward, or ``"off"``.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    augment: bool
    weighting: str = "loss"
    weighting_lr: float = 1e-4
    every: int = 5
    val_fraction: float = 0.1
    warmup: float = 0.25
    amp: str = "off"


@dataclass(frozen=True)
class Evaluation:
    """A classifier on a dataset, in order.

    Attributes:
        margins: ``(N,)`` probabilistic margins, on the CPU.
        predictions, targets: ``(N,)`` class indices, on the CPU.
        loss: mean cross-entropy.
    """

    margins: Tensor
    predictions: Tensor
    targets: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        return float(accuracy_score(self.targets, self.predictions))

    @property
    def balanced_accuracy(self) -> float:
        """The mean over the classes of the share that is right."""
        return float(balanced_accuracy_score(self.targets, self.predictions))


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: numbers by name, and the margins ``(N,)`` of its final classifier."""

    numbers: dict[str, Any]
    test_margins: Tensor
    train_margins: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, data: LabelledImages) -> Evaluation:
    """Evaluate a classifier in evaluation mode, in full precision."""
    model.eval()
    margins, predictions, losses = [], [], []
    for inputs, targets, _ in data.in_order():
        logits = model(inputs)
        margins.append(probabilistic_margin(logits, targets).cpu())
        predictions.append(logits.argmax(dim=1).cpu())
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
    model.train()
    return Evaluation(
        torch.cat(margins), torch.cat(predictions), data.labels.cpu(), torch.cat(losses).double().mean().item()
    )


def split(
    method: str, data: LabelledImages, fraction: float, seed: int, erm_margins: Tensor | None
) -> tuple[Sequence[int], Sequence[int]]:
    """The rows that a method trains on and its fixed validation rows (none where there is no fixed set).

    LRW-Hard and LRW-Easy train twice: the margins of plain training with the same seed say what is hard.

    Args:
        method: one of :data:`METHODS`.
        data: the N training rows.
        fraction: the share of them that becomes validation.
        seed: of LRW-Random's split.
        erm_margins: ``(N,)``, needed by LRW-Hard and LRW-Easy.
    """
    if method in ("LRW-Hard", "LRW-Easy"):
        assert erm_margins is not None
        train, validation = split_by_margin(
            data, erm_margins, side="hard" if method == "LRW-Hard" else "easy", fraction=fraction
        )
        return train.indices, validation.indices
    if method == "LRW-Random":
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, round(fraction * len(data)))
        return sorted(rows[count:]), sorted(rows[:count])
    return range(len(data)), []


def train(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Criterion,
    batches: Batches,
    recipe: Recipe,
    report: Report,
) -> float:
    """The loop that every method shares; returns the seconds it took."""
    device = next(model.parameters()).device
    steps = recipe.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    _wait(device)
    start = time.perf_counter()
    step = 0
    for _ in range(recipe.epochs):
        for inputs, targets, indices in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp == "bf16"):
                outputs = model(inputs)
                loss = criterion(outputs, targets, indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            # Reading a loss waits for the accelerator, so it is not done at every step.
            if step % max(1, steps // 200) == 0 or step == steps:
                report(step, steps, loss.item(), (outputs.argmax(dim=1) == targets).float().mean().item())
    _wait(device)
    return time.perf_counter() - start


def run(
    method: str,
    seed: int,
    task: Task,
    build: Callable[[], nn.Module],
    recipe: Recipe,
    device: torch.device,
    erm_margins: Tensor | None,
    report: Report,
) -> Outcome:
    """Train one classifier by one method and evaluate it.

    Args:
        method: one of :data:`METHODS`.
        seed: of the initialisation, the data order and everything else random, the same for every method.
        task: on ``device``.
        build: makes the classifier.
        recipe: how to train.
        device: where to train.
        erm_margins: ``(N,)`` training margins of the ERM run with this seed.
        report: called now and then during training.
    """
    torch.manual_seed(seed)
    model = build().to(device)
    rows, validation_rows = split(method, task.train, recipe.val_fraction, seed, erm_margins)
    batches = task.train.batches(rows, recipe.batch_size, seed, recipe.augment)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    reweighter: MetaReweighter | None = None
    if method != "ERM":
        fixed = (
            task.train.batches(validation_rows, recipe.batch_size, seed, recipe.augment) if validation_rows else None
        )
        reweighter = MetaReweighter(
            model,
            optimizer,
            weighting=WEIGHTINGS[recipe.weighting](model, len(task.classes)),
            validation=fixed,
            val_fraction=recipe.val_fraction,
            every=recipe.every,
            warmup_steps=round(recipe.warmup * recipe.epochs * len(batches)),
            weighting_lr=recipe.weighting_lr,
            seed=seed,
        )
    criterion = _mean_loss if reweighter is None else reweighter.loss
    # φ's initialisation has drawn from the global stream; dropout is to start alike for every method.
    torch.manual_seed(seed)
    seconds = train(model, optimizer, criterion, batches, recipe, report)
    engine = "none" if reweighter is None else reweighter.engine
    if reweighter is not None:
        reweighter.close()
    test, fitted = evaluate(model, task.test), evaluate(model, task.train)
    if not math.isfinite(test.loss):
        raise FloatingPointError("the test loss is not finite")
    steps = recipe.epochs * len(batches)
    numbers = {
        "method": method,
        "seed": seed,
        "accuracy": test.accuracy,
        "balanced_accuracy": test.balanced_accuracy,
        "test_margin": test.margins.double().mean().item(),
        "test_loss": test.loss,
        "train_accuracy": fitted.accuracy,
        "train_rows": len(rows),
        "validation_rows": len(validation_rows),
        "steps": steps,
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        "engine": engine,
    }
    return Outcome(numbers, test.margins, fitted.margins)


def _mean_loss(outputs: Tensor, targets: Tensor, indices: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def _wait(device: torch.device) -> None:
    """Wait for the accelerator, so that the clock counts its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

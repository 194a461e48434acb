"""One run: a problem, a method, a seed; the same budget, initialisation and order of data for every method."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks import models, peers
from benchmarks.methods import Method, reweighter
from benchmarks.peers import logits, passes
from benchmarks.problems import Problem, Setting
from torch_molere import MetaReweighter


@dataclass
class Trained:
    """A finished run.

    Attributes:
        model: after the last epoch.
        best: its parameters and buffers after the epoch that was best on the selection rows.
        best_epoch: that one, from 1.
        seconds: of the training alone.
        steps: that were taken.
        losses: ``(N,)`` mean of each row over plain training.
        numbers: further columns of the run's row.
        reweighter: closed.
    """

    model: nn.Module
    best: Mapping[str, Tensor]
    best_epoch: int
    seconds: float
    steps: int
    losses: Tensor
    reweighter: MetaReweighter | None
    numbers: dict[str, float] = field(default_factory=dict)


def augmented(inputs: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Each image cropped at random out of itself with a zero border, an eighth of its height (4 pixels at 32×32), and
    with ``crops and flips`` flipped left to right half of the time.

    Args:
        inputs: ``(B, C, H, W)``.
        kind: of augmentation; "" for none.
        generator: on the CPU.
    """
    if not kind:
        return inputs
    size, _, height, width = inputs.shape
    border = height // 8
    top, left = torch.randint(2 * border + 1, (2, size, 1), generator=generator)
    flipped = torch.rand(size, 1, generator=generator) < (0.5 if kind == "crops and flips" else 0.0)
    rows = top + torch.arange(height)
    across = torch.arange(width)
    columns = left + torch.where(flipped, across.flip(0), across)
    padded = F.pad(inputs, (border, border, border, border)).permute(0, 2, 3, 1)
    each = torch.arange(size).view(-1, 1, 1)
    return padded[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


class TrustedBatches:
    """Endless validation batches ``(inputs, targets)`` of the trusted rows, in random orders, augmented as training is.

    Iterating again starts a new pass; each has an order of its own.
    """

    def __init__(self, problem: Problem, setting: Setting, seed: int) -> None:
        self.problem, self.setting = problem, setting
        size = setting.batch_of_trusted or max(2, setting.batch_size // 2)
        self.batches = passes(problem.trusted, min(size, len(problem.trusted)), seed + 1)
        self.length = -(-len(problem.trusted) // size)
        self.generator = torch.Generator().manual_seed(seed + 2)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in itertools.islice(self.batches, self.length):
            yield augmented(self.problem.inputs[rows], self.setting.augment, self.generator), self.problem.labels[rows]


def network(setting: Setting, problem: Problem) -> nn.Module:
    """A new classifier; of images with its weights in the order of channels-last, which convolutions are faster in."""
    model = models.build(setting.model, tuple(problem.inputs.shape[1:]), problem.classes)
    return model.to(memory_format=torch.channels_last) if problem.inputs.ndim == 4 else model


def train(setting: Setting, method: Method, problem: Problem, seed: int, judge: bool = True) -> Trained:
    """Train once.

    Args:
        judge: whether the classifier is judged by the selection rows after each epoch.
    """
    setting = replace(setting, **method.training)
    torch.manual_seed(seed)
    model = network(setting, problem)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay
    )
    everything = torch.arange(len(problem.labels))
    each = -(-len(everything) // setting.batch_size)
    steps = setting.epochs * each
    scheduler = CosineAnnealingLR(optimizer, steps) if setting.schedule == "cosine" else None
    run = Trained(model, {}, 0, 0.0, steps, torch.zeros(len(everything)), None)

    def first(rows: Tensor) -> Iterator[nn.Module]:
        return plain_epochs(setting, problem, rows, seed + 100)

    if method.kind == "reweighted":
        validation = TrustedBatches(problem, setting, seed) if len(problem.trusted) else None
        run.reweighter = reweighter(method, problem, validation, model, optimizer, steps, seed)
    objective = peers.objective(method.kind, method.strength, problem, first)
    stream = iter(passes(everything, setting.batch_size, seed))
    if method.kind == "rho":
        stream = iter(peers.reducible_batches(problem, setting, model, first, method.strength, seed))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # what has been made until here has moved the stream differently for each method
    spread, best = 0.0, -1.0
    start = time.perf_counter()
    for step in range(1, steps + 1):
        rows = next(stream)
        inputs, labels = augmented(problem.inputs[rows], setting.augment, generator), problem.labels[rows]
        if run.reweighter is None:
            outputs = model(inputs)
            optimizer.zero_grad()
            objective(outputs, labels, rows).backward()
            optimizer.step()
            run.losses[rows] += F.cross_entropy(outputs.detach(), labels, reduction="none") / setting.epochs
        else:
            spread += run.reweighter.step((inputs, labels, rows)).weights.std().item() / steps
        if scheduler is not None:
            scheduler.step()
        if judge and step % each == 0:
            paused = time.perf_counter()
            right = logits(model, problem.selection.inputs[:1000]).argmax(dim=1) == problem.selection.labels[:1000]
            if (accuracy := right.double().mean().item()) > best:
                best, run.best, run.best_epoch = accuracy, copy.deepcopy(model.state_dict()), step // each
            start += time.perf_counter() - paused
    run.seconds = time.perf_counter() - start
    run.numbers = {"weight_sd": spread}
    return run


def plain_epochs(setting: Setting, problem: Problem, rows: Tensor, seed: int) -> Iterator[nn.Module]:
    """Plain training on some rows: the model after each epoch."""
    torch.manual_seed(seed)
    model = network(setting, problem)
    each = -(-len(rows) // setting.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), setting.lr, setting.momentum, weight_decay=setting.weight_decay)
    scheduler = CosineAnnealingLR(optimizer, setting.epochs * each)
    stream, generator = passes(rows, setting.batch_size, seed), torch.Generator().manual_seed(seed)
    for _ in range(setting.epochs):
        for batch in itertools.islice(stream, each):
            inputs = augmented(problem.inputs[batch], setting.augment, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), problem.labels[batch]).backward()
            optimizer.step()
            scheduler.step()
        yield model

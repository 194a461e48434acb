"""What every method shares: the classifier, how it is optimised, and the order of its batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks import models
from benchmarks.study.problems import Problem, Rows, Setting


def classifier(setting: Setting, inputs: Tensor, classes: int) -> nn.Module:
    """The setting's model of such inputs: the MLP on features, or another on images."""
    if setting.model != "mlp":
        channels, height, width = inputs.shape[1:]
        return models.build(setting.model, (channels, height, width), classes)
    hidden = setting.hidden
    return nn.Sequential(nn.Linear(inputs.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))


def optimisation(model: nn.Module, setting: Setting, steps: int) -> tuple[torch.optim.SGD, CosineAnnealingLR]:
    """The optimizer and its schedule over so many steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    return optimizer, CosineAnnealingLR(optimizer, steps)


def batches_in(rows: int, batch_size: int) -> int:
    """Batches in one pass."""
    return -(-rows // batch_size)


def passes(rows: Rows, epochs: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of positions, for so many epochs in random orders; their sizes differ by at most one."""
    generator = torch.Generator().manual_seed(seed)
    ordered = torch.from_numpy(rows)
    for _ in range(epochs):
        shuffled = ordered[torch.randperm(len(ordered), generator=generator)]
        yield from shuffled.tensor_split(batches_in(len(rows), batch_size))


def plain_training(
    setting: Setting, problem: Problem, rows: Rows, classes: int, seed: int, epochs: int
) -> Iterator[nn.Module]:
    """The one model after each epoch of plain training on ``rows``, which some methods do first."""
    torch.manual_seed(seed)
    model = classifier(setting, problem.inputs, classes)
    each = batches_in(len(rows), setting.batch_size)
    optimizer, scheduler = optimisation(model, setting, epochs * each)
    for number, batch in enumerate(passes(rows, epochs, setting.batch_size, seed), start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(problem.inputs[batch]), problem.labels[batch]).backward()
        optimizer.step()
        scheduler.step()
        if number % each == 0:
            yield model

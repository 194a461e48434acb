"""Every way to take one training step that the speed benchmark times: plain, ours, and the peers' Meta-Weight-Net.

A contender is made from a :class:`Task` and returns a callable that takes one step. All of them train the same model
from the same parameters on the same batch, and learn weights against validation batches of the same size. The peers'
weighting has one hidden layer of 100 on the loss and learns by Adam at 1e-4.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_molere import MetaReweighter, StepResult, ValidationBuffer

Step = Callable[[], object]
SETTLED = 10
"""Meta-updates before anything is timed: the engine is checked at the 1st and the 10th, and then rarely."""

BATCHES = 50
"""Batches in what stands for an epoch: by their indices rows are met again."""


@dataclass(frozen=True)
class Task:
    """What is trained: a model at its initial parameters, its optimizer, a training and the peers' validation batch."""

    model: nn.Module
    optimizer: str
    batch: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the model and a fresh optimizer of it, slow enough not to fit one batch while it is timed."""
        model = copy.deepcopy(self.model)
        if self.optimizer == "adamw":
            return model, torch.optim.AdamW(model.parameters(), lr=1e-5)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def erm(task: Task) -> Step:
    """Plain training."""
    model, optimizer = task.start()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(task.batch[0]), task.batch[1]).backward()
        optimizer.step()

    return step


def molere(task: Task, every: int, *, held: int | None = None, **options: Any) -> Callable[[], StepResult]:
    """Ours as it comes, with indices; by now settled.

    Args:
        every: Q.
        held: instances in the buffer, which then neither grows nor shrinks; None for a buffer at its defaults.
        **options: further arguments of :class:`MetaReweighter`.
    """
    model, optimizer = task.start()
    size = len(task.batch[1])
    filling = 5 if held is None else max(5, 10 * -(-held // size) + 5)
    validation = ValidationBuffer() if held is None else ValidationBuffer(capacity=held, max_bytes=2**34)
    reweighter = MetaReweighter(
        model, optimizer, every=1, warmup_steps=filling, **{"validation": validation, **options}
    )
    batches = BATCHES if held is None else 10**6
    rows = (torch.arange(size) + number % batches * size for number in itertools.count())

    def step() -> StepResult:
        return reweighter.step((*task.batch, next(rows)))

    while reweighter.meta_updates < SETTLED:
        step()
    reweighter.every = every
    return step


# The peers, each doing Meta-Weight-Net's update: look ahead, update the weighting, then take the real step.


class MetaWeightNet(nn.Module):
    """Meta-Weight-Net's weighting: ``(B, 1)`` losses to ``(B, 1)`` weights (Shu et al., NeurIPS 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.layers(losses)
        return weights


def per_sample(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """``(B,)`` cross-entropies."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def weighted(losses: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of the losses with normalised weights."""
    weights = phi(losses.detach().unsqueeze(1)).squeeze(1)
    return (weights * losses).sum() / weights.sum()


def higher_by_hand(task: Task) -> Step:
    """``higher`` unrolls the optimizer at every step."""
    import higher

    model, optimizer = task.start()
    phi = MetaWeightNet().to(task.batch[0].device)
    phi_optimizer = torch.optim.Adam(phi.parameters(), lr=1e-4)

    def step() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with higher.innerloop_ctx(model, optimizer) as (functional, inner):
                inner.step(weighted(per_sample(functional, task.batch), phi))
                loss = per_sample(functional, task.validation).mean()
                gradients = torch.autograd.grad(loss, list(phi.parameters()))
        for parameter, gradient in zip(phi.parameters(), gradients, strict=True):
            parameter.grad = gradient
        phi_optimizer.step()
        optimizer.zero_grad()
        weighted(per_sample(model, task.batch), torch.no_grad()(phi)).backward()
        optimizer.step()

    return step


def betty(task: Task, every: int) -> Step:
    """Betty's multilevel engine with ``darts``: the classifier below, the weighting above."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    model, optimizer = task.start()
    phi = MetaWeightNet()

    class Classifier(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return weighted(per_sample(self, batch), self.weighting)

    class Weighting(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return per_sample(self.classifier, batch).mean()

    def problem(kind: Any, name: str, module: nn.Module, optimizer: Any, batch: Any, **config: Any) -> Any:
        settings = {"module": module, "optimizer": optimizer, "train_data_loader": [batch]}
        return kind(name, Config(type="darts", **config), device=task.batch[0].device, **settings)

    logging.disable(logging.INFO)
    lower = problem(Classifier, "classifier", model, optimizer, task.batch, unroll_steps=every)
    phi_optimizer = torch.optim.Adam(phi.parameters(), lr=1e-4)
    upper = problem(Weighting, "weighting", phi, phi_optimizer, task.validation)
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    engine = Engine(problems=[lower, upper], config=EngineConfig(), dependencies=dependencies)
    logging.disable(logging.NOTSET)
    engine.train()

    def step() -> None:
        engine.global_step += 1
        engine.train_step()

    return step


CONTENDERS: dict[str, Callable[[Task], Step]] = {
    "ERM": erm,
    "MOLERE, every 5": partial(molere, every=5),
    "MOLERE, every 1": partial(molere, every=1),
    "MOLERE, never": partial(molere, every=10**9),
    "Betty darts, every 5": partial(betty, every=5),
    "Betty darts, every 1": partial(betty, every=1),
    "higher, every 1": higher_by_hand,
}
"""All of them, in the order that tables list them. "never" is what steps without a meta-update cost."""

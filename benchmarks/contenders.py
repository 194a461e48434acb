"""Every way to take one training step that the speed benchmark times: plain, ours, and the peers' Meta-Weight-Net.

A contender is made from a :class:`Task` and returns a callable that takes one step. All of them train the same model
from the same parameters on the same batch; those that learn weights do so against the same validation batch with the
same weighting (one hidden layer of 100 on the loss) and Adam at 1e-4.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_molere import MetaReweighter, hypergradient
from torch_molere.hypergradients import Engine

Step = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What is trained: a model at its initial parameters, its optimizer, a training and a validation batch."""

    model: nn.Module
    optimizer: str
    batch: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    def start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the model and a fresh optimizer of it."""
        model = copy.deepcopy(self.model)
        return model, self.optimizer_of(model.parameters())

    def optimizer_of(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=1e-3)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


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


def weighted(losses: Tensor, phi: nn.Module) -> Tensor:
    """The mean of the losses with normalised weights."""
    weights = phi(losses.detach().unsqueeze(1)).squeeze(1)
    return (weights * losses).sum() / weights.sum()


# Plain training and ours.


def erm(task: Task) -> Step:
    """Plain training."""
    model, optimizer = task.start()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(task.batch[0]), task.batch[1]).backward()
        optimizer.step()

    return step


def molere(task: Task, every: int, **options: Any) -> Step:
    """Everything on: splitter, buffer, weighting. The buffer holds the validation batch's worth from the start."""
    model, optimizer = task.start()
    size = len(task.validation[1])
    reweighter = MetaReweighter(
        model, optimizer, every=every, warmup_steps=0, val_batch_size=size, buffer_size=4 * size, **options
    )
    assert reweighter.buffer is not None
    labels = task.validation[1].tolist()
    reweighter.buffer.observe(labels)
    reweighter.buffer.insert((((task.validation[0],), {}), task.validation[1]), range(size), labels, None)
    return partial(reweighter.step, task.batch)


def lrw(task: Task, every: int, **options: Any) -> Step:
    """A fixed validation batch, no splitter."""
    model, optimizer = task.start()
    reweighter = MetaReweighter(model, optimizer, every=every, warmup_steps=0, validation=[task.validation], **options)
    return partial(reweighter.step, task.batch)


# The peers, each doing Meta-Weight-Net's update: look ahead, update the weighting, then take the real step.


class Peer:
    """One step of a peer: at every ``every``-th, ``meta_gradient`` and an Adam step of the weighting come first."""

    def __init__(self, task: Task, every: int) -> None:
        self.task = task
        self.every = every
        self.model, self.optimizer = task.start()
        self.phi = MetaWeightNet().to(task.batch[0].device)
        self.phi_optimizer = torch.optim.Adam(self.phi.parameters(), lr=1e-4)
        self.count = 0

    def __call__(self) -> None:
        if self.count % self.every == 0:
            for parameter, gradient in zip(self.phi.parameters(), self.meta_gradient(), strict=True):
                parameter.grad = gradient
            self.phi_optimizer.step()
        self.count += 1
        losses = per_sample(self.model, self.task.batch)
        with torch.no_grad():
            weights = self.phi(losses.unsqueeze(1)).squeeze(1)
        self.optimizer.zero_grad()
        ((weights * losses).sum() / weights.sum()).backward()
        self.optimizer.step()

    def meta_gradient(self) -> tuple[Tensor, ...]:
        """∂ L_val(θ⁺(φ)) / ∂φ, one for each parameter of the weighting."""
        raise NotImplementedError


class HigherByHand(Peer):
    """``higher`` unrolls the optimizer."""

    def meta_gradient(self) -> tuple[Tensor, ...]:
        import higher

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with higher.innerloop_ctx(self.model, self.optimizer) as (functional, inner):
                inner.step(weighted(per_sample(functional, self.task.batch), self.phi))
                loss = per_sample(functional, self.task.validation).mean()
                return torch.autograd.grad(loss, list(self.phi.parameters()))


class DoubleBackward(Peer):
    """The formulation that Meta-Weight-Net's authors published: an SGD step with ``create_graph``, written afresh."""

    def meta_gradient(self) -> tuple[Tensor, ...]:
        if not isinstance(self.optimizer, torch.optim.SGD):
            raise NotImplementedError("the published formulation has SGD only")
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        loss = weighted(per_sample(self.model, self.task.batch), self.phi)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        (group,) = self.optimizer.param_groups
        after = {}
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            direction = gradient + group["weight_decay"] * parameter
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                direction = direction + group["momentum"] * momentum
            after[name] = parameter - group["lr"] * direction
        ahead = partial(torch.func.functional_call, self.model, after)
        return torch.autograd.grad(per_sample(ahead, self.task.validation).mean(), list(self.phi.parameters()))


class TorchOpt(Peer):
    """TorchOpt's differentiable optimizers."""

    def __init__(self, task: Task, every: int) -> None:
        import torchopt

        super().__init__(task, every)
        if task.optimizer == "adamw":
            self.meta = torchopt.MetaAdamW(self.model, lr=1e-3)
        else:
            self.meta = torchopt.MetaSGD(self.model, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def meta_gradient(self) -> tuple[Tensor, ...]:
        import torchopt

        before = torchopt.extract_state_dict(self.model, by="reference", detach_buffers=True)
        state = torchopt.extract_state_dict(self.meta, by="reference")
        self.meta.step(weighted(per_sample(self.model, self.task.batch), self.phi))
        loss = per_sample(self.model, self.task.validation).mean()
        gradients = torch.autograd.grad(loss, list(self.phi.parameters()))
        torchopt.recover_state_dict(self.model, before)
        torchopt.recover_state_dict(self.meta, state)
        return gradients


def betty(task: Task, every: int, hypergradient: str, learns: bool = True) -> Step:
    """Betty's multilevel engine: the classifier below, the weighting above (its gradient alone unless it learns)."""
    import logging

    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.hypergradient import jvp_fn_mapping
    from betty.problems import ImplicitProblem

    if hypergradient not in jvp_fn_mapping:
        raise NotImplementedError(f"this release has no {hypergradient!r}, only {', '.join(jvp_fn_mapping)}")
    model, optimizer = task.start()
    phi = MetaWeightNet()

    class Classifier(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            losses = per_sample(self, batch)
            weights = self.weighting(losses.detach().unsqueeze(1)).squeeze(1)
            return (weights * losses).sum() / weights.sum()

    class Weighting(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return per_sample(self.classifier, batch).mean()

    if not learns:
        Weighting.custom_optimizer_step = lambda self: None  # type: ignore[attr-defined]
    logging.disable(logging.INFO)
    lower = Classifier(
        "classifier",
        Config(type=hypergradient, unroll_steps=every),
        module=model,
        optimizer=optimizer,
        train_data_loader=[task.batch],
        device=task.batch[0].device,
    )
    upper = Weighting(
        "weighting",
        Config(type=hypergradient),
        module=phi,
        optimizer=torch.optim.Adam(phi.parameters(), lr=1e-4),
        train_data_loader=[task.validation],
        device=task.batch[0].device,
    )
    engine = Engine(
        problems=[lower, upper],
        config=EngineConfig(),
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    logging.disable(logging.NOTSET)
    engine.train()

    def step() -> None:
        engine.global_step += 1
        engine.train_step()

    return step


# One meta-gradient at equal values, without any training step around it (Betty's includes one: its look-ahead is real).


def explicit(task: Task, engine: Engine) -> Step:
    """Our :func:`torch_molere.hypergradient`."""
    model, optimizer = task.start()
    weights = torch.ones(len(task.batch[1]), device=task.batch[0].device)
    return partial(hypergradient, model, optimizer, task.batch, task.validation, weights, engine=engine)


def peer_gradient(task: Task, peer: type[Peer]) -> Step:
    """A peer's meta-gradient."""
    return peer(task, 1).meta_gradient


STEPS: dict[str, Callable[[Task], Step]] = {
    "ERM": erm,
    "MOLERE, every 5 (as shipped)": partial(molere, every=5),
    "MOLERE, every 1": partial(molere, every=1),
    "MOLERE, never (bookkeeping)": partial(molere, every=10**9),
    "LRW, every 5": partial(lrw, every=5),
    "LRW, every 1": partial(lrw, every=1),
    "LRW, every 1, finite": partial(lrw, every=1, hypergradient="finite"),
    "LRW, every 1, forward": partial(lrw, every=1, hypergradient="forward"),
    "LRW, every 1, unrolled": partial(lrw, every=1, hypergradient="unrolled"),
    "LRW, every 5, order before": partial(lrw, every=5, order="before"),
    "LRW, every 1, order before": partial(lrw, every=1, order="before"),
    "Betty darts, every 5": partial(betty, every=5, hypergradient="darts"),
    "Betty darts, every 1": partial(betty, every=1, hypergradient="darts"),
    "Betty sama, every 1": partial(betty, every=1, hypergradient="sama"),
    "TorchOpt, every 5": partial(TorchOpt, every=5),
    "TorchOpt, every 1": partial(TorchOpt, every=1),
    "higher, every 5": partial(HigherByHand, every=5),
    "higher, every 1": partial(HigherByHand, every=1),
    "double backward, every 5": partial(DoubleBackward, every=5),
    "double backward, every 1": partial(DoubleBackward, every=1),
}

GRADIENTS: dict[str, Callable[[Task], Step]] = {
    "gradient: ours, finite": partial(explicit, engine="finite"),
    "gradient: ours, forward": partial(explicit, engine="forward"),
    "gradient: ours, unrolled": partial(explicit, engine="unrolled"),
    "gradient: higher": partial(peer_gradient, peer=HigherByHand),
    "gradient: double backward": partial(peer_gradient, peer=DoubleBackward),
    "gradient: TorchOpt": partial(peer_gradient, peer=TorchOpt),
    "gradient: Betty darts": partial(betty, every=1, hypergradient="darts", learns=False),
    "gradient: Betty neumann": partial(betty, every=1, hypergradient="neumann", learns=False),
    "gradient: Betty cg": partial(betty, every=1, hypergradient="cg", learns=False),
}

CONTENDERS = STEPS | GRADIENTS
"""All of them, in the order that tables list them."""

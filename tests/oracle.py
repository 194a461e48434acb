"""The oracle of the core: the meta-gradient against a central difference through the user's own loop (float64).

A :class:`World` is all that a user's loop has. A loop is a function ``loop(world, criterion)`` that takes one real step
of it, with ``criterion(outputs, targets) -> scalar`` where the user has theirs. It runs once with the reweighter's loss
and, from copies of the world as it was before and the same random streams, twice for each weight.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_molere import MetaReweighter
from torch_molere.hypergradients.functional import RandomState, preserved_randomness

CPU = torch.device("cpu")
SIZE = 6


class Constants(dict):
    """Numbers of a step that do not depend on the weights (a clipping factor): found in the first run, then kept."""

    def __deepcopy__(self, memo):
        return self

    def keep(self, name, compute):
        if name not in self:
            self[name] = compute()
        return self[name]


@dataclass
class World:
    model: nn.Module
    optimizers: list
    batch: tuple
    validation: tuple
    loss_fn: Any = None
    val_loss_fn: Any = None
    extra: dict = field(default_factory=dict)
    constants: Constants = field(default_factory=Constants)

    def copy(self):
        """What pre-hooks compute (pruning, spectral norm) has a graph, with which PyTorch does not copy."""
        for module in self.model.modules():
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    vars(module)[name] = value.detach()
        return copy.deepcopy(self)

    def losses(self, outputs, targets):
        loss_fn = self.loss_fn or (lambda a, b: F.cross_entropy(a, b, reduction="none"))
        return loss_fn(outputs, targets)

    def validation_loss(self):
        outputs, targets = self.model(*_as_tuple(self.validation[0])), self.validation[1]
        return (self.val_loss_fn or self.losses)(outputs, targets).mean()

    def parameters(self):
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]


class Given(nn.Module):
    """A weighting that gives unequal weights of mean one, and has nothing to learn."""

    def forward(self, samples):
        size = len(samples.losses)
        return torch.linspace(0.4, 1.6, size, dtype=samples.losses.dtype)


def data(seed=0, size=SIZE, width=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator).double(), torch.randint(classes, (size,), generator=generator)


class NoForwardRule(torch.autograd.Function):
    """x itself, without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def net(*layers, seed=0, width=5, classes=3, hidden=7):
    """A smooth small classifier with ``layers`` in its middle."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, hidden), *layers, nn.Tanh(), nn.Linear(hidden, classes)).double()


def world_of(model, *optimizers, **options):
    """A world with two steps of momentum behind it."""
    optimizers = list(optimizers) or [torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)]
    world = World(model, optimizers, options.pop("batch", data(1)), options.pop("validation", data(2)), **options)
    return world


def plain_loop(world, criterion):
    """The loop that everybody has."""
    for optimizer in world.optimizers:
        optimizer.zero_grad()
    criterion(world.model(*_as_tuple(world.batch[0])), world.batch[1]).backward()
    for optimizer in world.optimizers:
        optimizer.step()


def reweighter_of(world, **options):
    settings = {
        "loss_fn": world.loss_fn,
        "val_loss_fn": world.val_loss_fn,
        "weighting": Given(),
        "validation": [world.validation],
        "every": 1,
        "warmup_steps": 0,
    }
    return MetaReweighter(world.model, world.optimizers, **{**settings, **options})


def deviation(world, loop=plain_loop, reweighter=None, *, as_backward=False, h=1e-5, **options):
    """How far the meta-gradient of the step that ``loop`` takes is from a central difference, relative.

    Args:
        world: whose step it is; it is moved on.
        loop: the user's.
        reweighter: of this world; None makes one.
        as_backward: differentiate L_val at θ⁺ by the user's own backward, for losses whose backward is not their
            derivative.
        h: of the difference.
        options: for the reweighter.
    """
    owner = reweighter or reweighter_of(world, **options)
    world.constants.clear()
    start, random = world.copy(), RandomState.now(CPU)
    seed = owner.seed_of(1000)
    loop(world, owner.loss)
    found, weights = owner.result.meta_gradient, owner.result.weights
    assert found is not None, "there was no meta-update"

    def after(w):
        moved, rest = start.copy(), list(w.split(SIZE))
        with preserved_randomness(CPU, random):
            loop(moved, lambda outputs, targets: (rest.pop(0) * moved.losses(outputs, targets)).mean())
        return moved

    def at(moved):
        with preserved_randomness(CPU, seed):
            return moved.validation_loss()

    if as_backward:
        moved = after(weights)
        v = torch.autograd.grad(at(moved), moved.parameters(), allow_unused=True)

    def value(w):
        moved = after(w)
        if not as_backward:
            return float(at(moved).detach())
        return float(sum((p.detach() * g).sum() for p, g in zip(moved.parameters(), v, strict=True) if g is not None))

    expected = []
    for i in range(len(weights)):
        shift = torch.zeros_like(weights)
        shift[i] = h
        expected.append((value(weights + shift) - value(weights - shift)) / (2 * h))
    return relative(found, torch.tensor(expected, dtype=found.dtype))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _as_tuple(inputs):
    return inputs if isinstance(inputs, tuple) else (inputs,)

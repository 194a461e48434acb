"""The methods that are compared, as data, and how a reweighter is made of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.problems import Problem
from torch_molere import (
    FreeWeighting,
    InputWeighting,
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    OnlineWeighting,
    RandomSplitter,
    RandomWeighting,
    SignalWeighting,
    ValidationBuffer,
    expected_error,
)
from torch_molere.samples import Samples


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: as it stands in tables.
        kind: ``plain``, ``reweighted``, or a peer of :mod:`benchmarks.peers`.
        strength: the peer's parameter.
        training: replaces attributes of the setting, such as ``{"lr": 0.02}``.
        arguments: of :func:`reweighter`; empty for the library's defaults.
        trusted: only where there are trusted rows, which are then the validation set.
        untrusted: only where there are none.
        tuned: at the rate and weight decay that served plain training best on the selection rows.
        family: of several methods of one family the one that is best on the selection rows stands in tables.
    """

    name: str
    kind: str = "reweighted"
    strength: float = 0.0
    training: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trusted: bool = False
    untrusted: bool = False
    tuned: bool = False
    family: str = ""

    def but(self, name: str, **arguments: Any) -> Method:
        """The same with other arguments."""
        return replace(self, name=name, arguments={**self.arguments, **arguments})


PLAIN = Method("plain", "plain")
DEFAULT = Method("default")
TRUSTED = Method("default, trusted", trusted=True)
RANDOM = Method("random weights", arguments={"weighting": "random"})


def shuffled(method: Method) -> Method:
    """The control: the weights that the method learns, each batch's dealt out to its instances at random."""
    return method.but(f"{method.name}, shuffled", shuffle=True)


class Shuffled(nn.Module):
    """A weighting whose weights reach other instances of the batch, while it learns from its own.

    Args:
        weighting: what gives the weights.
    """

    def __init__(self, weighting: nn.Module) -> None:
        super().__init__()
        self.weighting = weighting

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("weighting"), name)

    def forward(self, samples: Samples) -> Tensor:
        weights: Tensor = self.weighting(samples)
        dealt = weights.detach()[torch.randperm(len(weights), device=weights.device)]
        return weights + (dealt - weights.detach())


SPLITTERS = {"easy": -math.inf, "random": 0.0, "soft": 1.0, "hard": math.inf}
"""Sharpness of the margin splitter by name."""


def reweighter(
    method: Method,
    problem: Problem,
    validation: Iterable[Any] | None,
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    seed: int,
) -> MetaReweighter:
    """The reweighter of a method. Its arguments are those of :class:`torch_molere.MetaReweighter`, and

    - ``weighting``: ``signals`` (with ``signals=``), ``online`` (``offset=``, ``decay=``), ``free``, ``inputs``,
      ``random``; ``shuffle=True`` for the control.
    - ``splitter``: ``easy``, ``random``, ``soft``, ``hard``, ``learned`` or ``by row`` (a fixed random part), or a
      sharpness; ``fraction``, ``hold_out``, ``trim``.
    - ``warmup``: a share of the steps; ``val_loss``: ``expected error``, or ``balanced`` for cross-entropy that weighs
      each class by one over its number of training rows; ``as_in_paper=True``.

    Args:
        validation: batches of the trusted rows, or None without any; used if ``method.trusted``.
        steps: of the whole training.
    """
    given = dict(method.arguments)
    if given.pop("as_in_paper", False):
        return MetaReweighter.as_in_paper(
            model,
            optimizer,
            num_outputs=problem.classes,
            warmup_steps=round(given.pop("warmup", 0.25) * steps),
            **given,
        )
    weighting = _weighting(given, problem, model)
    if given.pop("shuffle", False):
        weighting = Shuffled(SignalWeighting() if weighting is None else weighting)
    source: Iterable[Any] | ValidationBuffer | None = validation if method.trusted else _buffer(given, problem)
    if method.trusted and validation is None:
        raise ValueError(f"{method.name} needs a setting with trusted rows")
    if "warmup" in given:
        given["warmup_steps"] = round(given.pop("warmup") * steps)
    if (val_loss := given.pop("val_loss", None)) is not None:
        counts = torch.bincount(problem.labels, minlength=problem.classes)
        balanced = nn.CrossEntropyLoss(weight=1.0 / counts.clamp(min=1).float())
        given["val_loss_fn"] = {"expected error": expected_error, "balanced": balanced}[val_loss]
    return MetaReweighter(model, optimizer, weighting=weighting, validation=source, seed=seed, **given)


def _weighting(given: dict[str, Any], problem: Problem, model: nn.Module) -> nn.Module | None:
    kind = given.pop("weighting", None)
    if kind == "signals":
        return SignalWeighting(tuple(given.pop("signals")), num_classes=problem.classes)
    if kind == "online":
        return OnlineWeighting(**{name: given.pop(name) for name in ("offset", "decay") if name in given})
    if kind == "free":
        return FreeWeighting(len(problem.labels))
    if kind == "inputs":
        return InputWeighting.from_classifier(model, problem.classes)
    return RandomWeighting() if kind == "random" else None


def _buffer(given: dict[str, Any], problem: Problem) -> ValidationBuffer | None:
    kind = given.pop("splitter", None)
    options = {name: given.pop(name) for name in ("fraction", "hold_out", "capacity") if name in given}
    trim = {"trim": given.pop("trim")} if "trim" in given else {}
    if kind is None and not options and not trim:
        return None
    if kind == "learned":
        return ValidationBuffer(splitter=LearnedSplitter(num_classes=problem.classes), **options)
    if kind == "by row":
        return ValidationBuffer(splitter=RandomSplitter(), **options)
    sharpness = SPLITTERS[kind or "soft"] if kind is None or isinstance(kind, str) else kind
    return ValidationBuffer(splitter=MarginSplitter(sharpness=sharpness, **trim), **options)

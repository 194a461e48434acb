"""The studies: which settings, which methods, how many seeds, and what they are to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from benchmarks.methods import PLAIN, RANDOM, Method, shuffled
from benchmarks.problems import Setting
from benchmarks.report import winner
from benchmarks.runs import Job
from benchmarks.sweeps import Sweep


@dataclass(frozen=True)
class Claim:
    """That a method is above another by so much.

    Attributes:
        text: in words.
        settings: in which; () for all of the study's.
        method, other: names; the other may be ``plain, tuned``.
        least: by so much, in the measure's own unit (0.03 of accuracy are 3 points); negative for "not below by more".
        measure: a column.
        minus: the other's column, where that is another one.
    """

    text: str
    settings: tuple[str, ...]
    method: str
    other: str
    least: float = 0.0
    measure: str = "accuracy"
    minus: str = ""


@dataclass(frozen=True)
class Study:
    """A list of runs with one question.

    Attributes:
        name: on the command line.
        question: what it asks.
        settings, methods: every one with every other, but as :class:`Method` says where there are trusted rows or not.
        seeds: 0 to seeds − 1.
        measures: columns of the tables; the first is drawn.
        claims: what is to be shown.
        grid: whether plain training is tuned, but in settings that are ``untuned``: those of a problem whose rate or
            decay is varied on purpose, which would be tuned to the same, or costly ones.
        thirds, find: see :class:`benchmarks.runs.Job`.
        costly: settings with fewer seeds, and how many.
        sweeps: where the settings are those of sweeps, which are shown together.
        finding: what came out, in words.
    """

    name: str
    question: str
    settings: Sequence[Setting]
    methods: Sequence[Method]
    seeds: int = 5
    measures: Sequence[str] = ("accuracy", "best_accuracy", "worst_class", "nll", "ece", "train_accuracy", "weight_sd")
    claims: Sequence[Claim] = ()
    grid: bool = True
    untuned: Sequence[str] = ()
    thirds: bool = False
    find: bool = False
    costly: int = 3
    sweeps: Sequence[Sweep] = ()
    finding: str = ""

    @property
    def tried(self) -> list[Method]:
        """Plain training at each rate and weight decay that is tried."""
        return list(
            {name: method for setting in self.settings for name, method in self._grid(setting).items()}.values()
        )

    @property
    def families(self) -> dict[str, str]:
        """Family by method."""
        return {method.name: method.family for method in (*self.tried, *self.methods) if method.family}

    @property
    def rows(self) -> list[str]:
        """The names of methods as tables have them."""
        names = [PLAIN.name, *(["plain, tuned"] if self.grid else [])]
        names += [f"{method.family}, tuned" if method.family else method.name for method in self.methods]
        return list(dict.fromkeys(names))

    def seeds_of(self, setting: Setting, seeds: int | None) -> int:
        """How many runs each method has in a setting."""
        return seeds or (self.costly if setting.model != "mlp" else self.seeds)

    def first(self, seeds: int | None) -> Iterator[Job]:
        """All runs but those at the tuned rate and decay; seed by seed, so that a stop leaves paired runs."""
        for setting, method, seed in self._each((PLAIN, *self.tried, *self.methods), seeds):
            if not method.tuned and (method.family != "plain" or method.name in self._grid(setting)):
                yield self._job(setting, method, seed)

    def second(self, seeds: int | None, frame: pd.DataFrame) -> Iterator[Job]:
        """Those at the rate and decay that are best on the selection rows, once they are known."""
        by_name = {method.name: method for method in self.tried}
        for setting, method, seed in self._each(self.methods, seeds):
            own = frame[(frame["setting"] == setting.name) & frame["method"].isin(by_name)]
            if method.tuned and len(own):
                training = {**by_name[winner(own)].training, **method.training}
                yield self._job(setting, replace(method, training=training), seed)

    def _job(self, setting: Setting, method: Method, seed: int) -> Job:
        return Job(setting, method, seed, self.thirds, self.find)

    def _grid(self, setting: Setting) -> dict[str, Method]:
        if not self.grid or setting.name in self.untuned:
            return {}
        return {method.name: method for method in (tried(lr, decay) for lr, decay in grid_of(setting))}

    def _each(self, methods: Sequence[Method], seeds: int | None) -> Iterator[tuple[Setting, Method, int]]:
        for seed in range(max(self.seeds_of(setting, seeds) for setting in self.settings)):
            for setting in self.settings:
                if seed < self.seeds_of(setting, seeds):
                    for method in methods:
                        if not (method.untrusted if setting.trusted else method.trusted):
                            yield setting, method, seed


def tried(lr: float, decay: float) -> Method:
    """Plain training at a rate and weight decay."""
    training = {"lr": lr, "weight_decay": decay}
    return Method(f"plain, rate {lr:g}, decay {decay:g}", "plain", training=training, family="plain")


def grid_of(setting: Setting) -> list[tuple[float, float]]:
    """Rates and weight decays that plain training is tuned by."""
    rates: tuple[float, ...] = (0.02, 0.05, 0.2)
    decays: tuple[float, ...] = (1e-4, 1e-3, 5e-3)
    if setting.model != "mlp":
        rates, decays = (0.05, 0.2), (1e-4, 5e-4, 2e-3)
    if setting.data.startswith("features"):
        rates, decays = (0.002, 0.01, 0.05), (1e-4, 1e-3, 1e-2)
    return [(lr, decay) for lr in rates for decay in decays]


def above(method: Method, *settings: str, measure: str = "accuracy", **points: float) -> tuple[Claim, ...]:
    """Claims that a method is so many points above others: ``plain``, ``tuned``, ``best`` (plain at its best epoch),
    ``random`` or ``shuffled``; below by no more, if the number is negative."""
    others = {"random": RANDOM.name, "shuffled": shuffled(method).name, "tuned": "plain, tuned", "best": PLAIN.name}
    of_what = " in the worst class" if measure == "worst_class" else ""
    claims = []
    for name, least in points.items():
        other = others.get(name, name)
        said = "not below {} by more than {:g}" if least < 0 else "above {} by {:g} or more" if least else "above {}"
        text = said.format(f"{other} at its best epoch" if name == "best" else other, abs(least))
        minus = "best_accuracy" if name == "best" else ""
        claims.append(
            Claim(f"{method.name}{of_what}: {text}", settings, method.name, other, least / 100, measure, minus)
        )
    return tuple(claims)

"""The problems that are studied: which training rows, which labels, which trusted rows; drawn anew with each seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from benchmarks.data import Corpus, Part, Rows, Values


@dataclass(frozen=True)
class Setting:
    """One problem and how everyone trains on it.

    Attributes:
        name: as it stands in tables.
        data: of :func:`benchmarks.data.read`.
        side: images are averaged down to so many pixels by side.
        standardised: inputs by channel or feature; else pixels from 0 to 1.
        rows: so many training rows, drawn with the run's seed; of the long tail, before it is cut.
        classes: only rows of these classes, which become 0, 1, …
        labels: a label column; ``random:RATE`` gives that share of the rows another class, ``next:RATE`` the next one.
        imbalance: the first class keeps so many times the rows of the last.
        counts: so many rows of each class, in place of ``imbalance``.
        cue: in this share of the training rows a mark goes with the label, elsewhere and in the test it is at random.
        shift: all but the trusted rows carry this corruption, the test images none; further test sets carry others.
        trusted: so many further rows with clean labels, no cue and no shift, evenly by class; every method trains on
            them too.
        batch_of_trusted: how many of them make a validation batch; None for half a training batch.
        model: of :mod:`benchmarks.models`.
        epochs, batch_size, lr, weight_decay, momentum: of SGD.
        schedule: ``cosine``, or ``constant``.
        augment: ``crops`` at random, or ``crops and flips``.
    """

    name: str
    data: str = "fashion-mnist"
    side: int | None = None
    standardised: bool = True
    rows: int = 5_000
    classes: tuple[int, ...] = ()
    labels: str = "label"
    imbalance: float = 1.0
    counts: tuple[int, ...] = ()
    cue: float = 0.0
    shift: str = ""
    trusted: int = 0
    batch_of_trusted: int | None = None
    model: str = "mlp"
    epochs: int = 30
    batch_size: int = 100
    lr: float = 0.05
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: str = "cosine"
    augment: str = ""


@dataclass(frozen=True)
class Judged:
    """Rows that a classifier is judged by.

    Attributes:
        inputs, labels: ``(M, …)`` and ``(M,)`` true classes.
        groups: ``(M,)`` whether the cue points elsewhere; None without one.
    """

    inputs: Tensor
    labels: Tensor
    groups: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """What one run trains on and is judged by.

    Attributes:
        inputs, labels: ``(N, …)`` and ``(N,)``, to train on.
        clean: ``(N,)`` true classes, which no method sees.
        source: ``(N,)`` the rows' numbers in the training file.
        trusted: positions among the N, the last ones.
        classes: C.
        test, selection: of the test file, and of training rows set apart for choices; both balanced and clean.
        others: further test sets by name.
    """

    inputs: Tensor
    labels: Tensor
    clean: Tensor
    source: Rows
    trusted: Tensor
    classes: int
    test: Judged
    selection: Judged
    others: Mapping[str, Judged] = field(default_factory=dict)


def long_tail(labels: Rows, imbalance: float) -> Rows:
    """Class c keeps its first ``round(n · imbalance^(−c / (C − 1)))`` rows, n being those of the largest class.

    The profile of Cui et al. (CVPR 2019): the last class has ``imbalance`` times fewer rows than the first.
    """
    counts = np.bincount(labels)
    position = np.arange(len(counts)) / max(len(counts) - 1, 1)
    return first_of_each(labels, np.maximum(1, np.round(counts.max() * imbalance**-position)))


def first_of_each(labels: Rows, counts: Values) -> Rows:
    """Row numbers, ascending, of the first ``counts[c]`` rows of each class c."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(len(counts)))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return np.flatnonzero(rank < counts[labels])


def mislabelled(labels: Rows, kind: str, rate: float, classes: int, random: np.random.Generator) -> Rows:
    """Exactly ``round(rate · N)`` labels replaced, by one of the other classes or (``next``) by the class after."""
    wrong = random.permutation(len(labels))[: round(rate * len(labels))]
    steps = 1 if kind == "next" else random.integers(1, classes, size=len(wrong))
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + steps) % classes
    return noisy


def marked(inputs: Tensor, marks: Rows, high: Tensor) -> Tensor:
    """A 2×2 patch of full brightness, its place in the upper or lower edge saying a number from 0 to 9; in place."""
    height, width = inputs.shape[2:]
    down = torch.from_numpy(np.where(marks < 5, 0, height - 2))
    across = torch.from_numpy(marks % 5 * (width - 2) // 4)
    rows = torch.arange(len(inputs))
    for y in (0, 1):
        for x in (0, 1):
            inputs[rows, :, down + y, across + x] = high
    return inputs


SHIFTS: Mapping[str, float] = {"noise": 60.0, "blur": 1.5, "contrast": 0.2, "pixelate": 0.35}
"""Corruptions after Hendrycks and Dietterich (ICLR 2019): standard deviation in units of uint8 pixels, in pixels, and
what is left of contrast and resolution."""


def shifted(pixels: Tensor, kind: str, seed: int) -> Tensor:
    """``(N, C, H, W)`` float images from 0 to 255, corrupted."""
    amount = SHIFTS[kind]
    height, width = pixels.shape[2:]
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        return (pixels + amount * noise).clamp(0.0, 255.0)
    if kind == "blur":
        return transforms.gaussian_blur(pixels, [7, 7], [amount, amount])
    if kind == "contrast":
        return (pixels - 127.5) * amount + 127.5
    small = transforms.resize(pixels, [round(height * amount), round(width * amount)], antialias=True)
    return transforms.resize(small, [height, width], InterpolationMode.NEAREST)


class Drawing:
    """Draws the problems of a setting from a corpus; what all seeds share is made once."""

    def __init__(self, setting: Setting, corpus: Corpus) -> None:
        self.setting = setting
        self.corpus = corpus
        self.classes = len(setting.classes) or corpus.classes
        some = torch.from_numpy(np.ascontiguousarray(corpus.train.values[corpus.pool[:2_000]])).float()
        axes = (0, *range(2, some.ndim))
        self.mean, self.std = some.mean(dim=axes), some.std(dim=axes).clamp_min(1e-6 if some.ndim > 2 else 0.1)
        if not setting.standardised:
            self.mean, self.std = torch.zeros_like(self.mean), some.amax().expand_as(self.std)
        self.high = (some.amax() - self.mean) / self.std
        self.test = self._judged(corpus.test, np.arange(len(corpus.test)), 1)
        self.selection = self._judged(corpus.train, corpus.selection, 2)
        kinds = SHIFTS if setting.shift else ()
        self.others = {k: self._judged(corpus.test, np.arange(len(corpus.test)), 1, k) for k in kinds}

    def problem(self, seed: int) -> Problem:
        """The rows of one run: every seed draws its own from the pool, so that intervals cover the choice of data."""
        setting = self.setting
        random = np.random.default_rng(seed)
        clean = self.corpus.train.labels["label"]
        source = random.permutation(self._kept(self.corpus.train, self.corpus.pool))
        trusted = first_of_each(self._targets(clean[source]), np.full(self.classes, setting.trusted // self.classes))
        apart = source[trusted]
        source = np.delete(source, trusted)[: setting.rows]
        if setting.counts:
            source = source[first_of_each(self._targets(clean[source]), np.array(setting.counts))]
        elif setting.imbalance != 1.0:
            source = source[long_tail(self._targets(clean[source]), setting.imbalance)]
        labels = self._labels(source, random)
        inputs = self._inputs(self.corpus.train, source, setting.shift, seed + 10)
        trusted_inputs = self._inputs(self.corpus.train, apart)
        if setting.cue:
            away = random.random(len(source)) >= setting.cue
            marked(inputs, np.where(away, random.integers(self.classes, size=len(source)), labels), self.high)
            marked(trusted_inputs, random.integers(self.classes, size=len(apart)), self.high)
        true = np.concatenate([self._targets(clean[source]), self._targets(clean[apart])])
        return Problem(
            torch.cat([inputs, trusted_inputs]),
            torch.from_numpy(np.concatenate([labels, self._targets(clean[apart])])),
            torch.from_numpy(true),
            np.concatenate([source, apart]),
            torch.arange(len(source), len(source) + len(apart)),
            self.classes,
            self.test,
            self.selection,
            self.others,
        )

    def _kept(self, part: Part, rows: Rows) -> Rows:
        return rows[np.isin(part.labels["label"][rows], self.setting.classes)] if self.setting.classes else rows

    def _targets(self, labels: Rows) -> Rows:
        if not self.setting.classes:
            return labels
        return np.argmax(labels[:, None] == np.array(self.setting.classes), axis=1)

    def _labels(self, source: Rows, random: np.random.Generator) -> Rows:
        columns = self.corpus.train.labels
        kind, _, rate = self.setting.labels.partition(":")
        if rate:
            return mislabelled(self._targets(columns["label"][source]), kind, float(rate), self.classes, random)
        if kind not in columns:
            raise typer.BadParameter(
                f"{self.setting.data} has no label column {kind!r}; it has {', '.join(columns)}", param_hint="--root"
            )
        return self._targets(columns[kind][source])

    def _inputs(self, part: Part, rows: Rows, shift: str = "", seed: int = 0) -> Tensor:
        """Rows as the classifier takes them: small, corrupted, standardised."""
        values = torch.from_numpy(np.ascontiguousarray(part.values[rows])).float()
        if self.setting.side is not None:
            values = F.adaptive_avg_pool2d(values, self.setting.side)
        if shift:
            values = shifted(values, shift, seed)
        shape = (-1, *[1] * (values.ndim - 2))
        return values.sub_(self.mean.view(shape)).div_(self.std.view(shape))

    def _judged(self, part: Part, rows: Rows, seed: int, shift: str = "") -> Judged:
        rows = self._kept(part, rows)
        inputs, labels = self._inputs(part, rows, shift), self._targets(part.labels["label"][rows])
        if not self.setting.cue:
            return Judged(inputs, torch.from_numpy(labels))
        marks = np.random.default_rng(seed).integers(self.classes, size=len(rows))
        groups = torch.from_numpy(marks != labels)
        return Judged(marked(inputs, marks, self.high), torch.from_numpy(labels), groups)

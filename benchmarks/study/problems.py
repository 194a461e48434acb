"""The problems that are studied: which training rows, which labels, which trusted rows; drawn anew with each seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from benchmarks import datasets, sampling
from benchmarks.batches import Normalisation, TensorImages
from benchmarks.datasets import DataOptions
from benchmarks.features import FeatureCache, PatchOptions

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Setting:
    """One problem and how everyone trains on it.

    Attributes:
        name: as it stands in tables.
        rows: so many training rows, drawn with the run's seed; None for all there are.
        labels: the column to train on, or ``symmetric:RATE``.
        imbalance: the first class keeps so many times the rows of the last.
        trusted: so many of the rows, chosen by the seed, carry their clean label for every method.
        trusted_by_class: as many of each class.
        trusted_shifts: the trusted images carry one of these kinds of corruption each, at one of its strengths, for
            every method.
        validated: so many further rows, with labels of the same kind, that nobody trains on: the gap between training
            and validation loss is followed over the epochs.
        model: ``mlp`` is on the features, any other of :mod:`benchmarks.models` on the images themselves.
        side: such images are averaged down to so many pixels by side; None leaves them as they are.
        hidden: units of the MLP; epochs, batch_size, lr, weight_decay: of SGD with momentum 0.9 and a cosine schedule.
    """

    name: str
    rows: int | None = 5_000
    labels: str = "label"
    imbalance: float = 1.0
    trusted: int = 0
    trusted_by_class: bool = False
    trusted_shifts: tuple[str, ...] = ()
    validated: int = 0
    model: str = "mlp"
    side: int | None = None
    hidden: int = 256
    epochs: int = 15
    batch_size: int = 64
    lr: float = 0.006
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Problem:
    """What one run trains on and is judged by.

    Attributes:
        inputs, labels: ``(N, D)`` features or ``(N, C, H, W)`` images, and ``(N,)``, to train on.
        clean: ``(N,)`` true classes, which no method sees.
        source: ``(N,)`` the rows' numbers in the training file.
        trusted: positions among the N.
        evaluations: ``M`` inputs and true classes ``(M,)`` by name; the first is the main one.
        validation: inputs and labels, of the same kind as those to train on, of rows that nobody trains on.
    """

    inputs: Tensor
    labels: Tensor
    clean: Tensor
    source: Rows
    trusted: Rows
    evaluations: dict[str, tuple[Tensor, Tensor]]
    validation: tuple[Tensor, Tensor] | None = None


SHIFTS: Mapping[str, tuple[float, ...]] = {
    "noise": (12.5, 25.0, 50.0),  # standard deviation, in units of the uint8 pixels
    "blur": (0.5, 1.0, 1.5),  # standard deviation, in pixels
    "contrast": (0.3, 0.15, 0.05),  # what is left of it
    "pixelate": (0.75, 0.5, 0.25),  # what is left of the resolution, by side
}
"""Kinds of corruption after Hendrycks and Dietterich (ICLR 2019), each with its strengths, the strongest last."""


def shifted(pixels: Tensor, kind: str, strength: int, seed: int = 0) -> Tensor:
    """``(N, C, H, W)`` uint8 images made harder to see.

    Args:
        pixels: the images.
        kind: one of :data:`SHIFTS`.
        strength: from 1.
        seed: of the noise.
    """
    amount = SHIFTS[kind][strength - 1]
    height, width = pixels.shape[2:]
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        return (pixels + amount * noise).clamp(0.0, 255.0).round().to(torch.uint8)
    if kind == "blur":
        return transforms.gaussian_blur(pixels, [7, 7], [amount, amount])
    if kind == "contrast":
        return transforms.adjust_contrast(pixels, amount)
    small = transforms.resize(pixels, [round(height * amount), round(width * amount)], antialias=True)
    return transforms.resize(small, [height, width], InterpolationMode.NEAREST)


class Corpus:
    """A data set as features, with every label column, its training rows parted once (by seed 0) into a pool to train
    on and a selection set. Choices between variants go by the selection set; the test set is for the final report.

    Args:
        options: the data; subsets and noise are the settings' matter.
        cache: folder of the features.
        patches: the features.
        selection: rows of the selection set.
    """

    def __init__(self, options: DataOptions, cache: Path, patches: PatchOptions, selection: int = 10_000) -> None:
        task = datasets.load(options)
        assert isinstance(task.train.images, TensorImages) and isinstance(task.test.images, TensorImages)
        self.pixels, self.test_pixels = task.train.images.pixels, task.test.images.pixels
        self.classes = len(task.classes)
        self.features = FeatureCache(cache, self.pixels, patches)
        self.inputs = self.features.features(self.pixels)
        self.labels = {"label": task.train.labels.numpy()} | _label_columns(options)
        self.test = self.features.features(self.test_pixels), task.test.labels
        shuffled = np.random.default_rng(0).permutation(len(self.inputs))
        self.selection_rows, self.pool = np.sort(shuffled[:selection]), np.sort(shuffled[selection:])
        self._normalisation = Normalisation.of(self.pixels)
        self._evaluations: dict[tuple[bool, str, int | None, bool], dict[str, tuple[Tensor, Tensor]]] = {}

    def judged(self, on_test: bool) -> tuple[Tensor, Tensor]:
        """Features and true classes of the test set or the selection set."""
        clean = torch.from_numpy(self.labels["label"])
        return self.test if on_test else (self.inputs[self.selection_rows], clean[self.selection_rows])

    def encoded(self, setting: Setting, pixels: Tensor) -> Tensor:
        """Uint8 images as the setting's classifier takes them."""
        if setting.model == "mlp":
            return self.features.features(pixels)
        images = self._normalisation(pixels)
        return images if setting.side is None else F.adaptive_avg_pool2d(images, setting.side)

    def evaluations(self, setting: Setting, on_test: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """The test set or the selection set, and, for a setting with shifts, shifted copies: ``noise_1`` and so on."""
        key = on_test, setting.model, setting.side, bool(setting.trusted_shifts)
        if key not in self._evaluations:
            features, targets = self.judged(on_test)
            pixels = self.test_pixels if on_test else self.pixels[self.selection_rows]
            inputs = features if setting.model == "mlp" else self.encoded(setting, pixels)
            self._evaluations[key] = {"clean": (inputs, targets)} | {
                f"{kind}_{strength}": (self.encoded(setting, shifted(pixels, kind, strength)), targets)
                for kind, strength in _strengths(SHIFTS if setting.trusted_shifts else ())
            }
        return self._evaluations[key]

    def problem(self, setting: Setting, seed: int, on_test: bool) -> Problem:
        """The rows of one run: every seed draws its own from the pool, so that intervals cover the choice of data."""
        random = np.random.default_rng(seed)
        source = random.permutation(self.pool)
        if setting.imbalance != 1.0:
            source = source[sampling.long_tail(self.labels["label"][source], setting.imbalance)]
        if setting.rows is not None and setting.rows < len(source):
            source = random.permutation(source)[: setting.rows + setting.validated]
        labels = self._labels(setting.labels, source, seed)
        validation = None
        if setting.validated:
            others = source[-setting.validated :]
            validation = self._inputs(setting, others), torch.from_numpy(labels[-setting.validated :])
            source, labels = source[: -setting.validated], labels[: -setting.validated]
        clean = self.labels["label"][source]
        trusted = random.permutation(len(source))
        if setting.trusted_by_class:
            trusted = trusted[sampling.balanced_subset(clean[trusted], setting.trusted)]
        trusted = np.sort(trusted[: setting.trusted])
        labels[trusted] = clean[trusted]
        inputs = self._inputs(setting, source)
        kinds = list(_strengths(setting.trusted_shifts))
        for (kind, strength), rows in zip(kinds, np.array_split(trusted, max(len(kinds), 1)), strict=False):
            # Another seed than the evaluation images' 0, for other noise.
            inputs[rows] = self.encoded(setting, shifted(self.pixels[source[rows]], kind, strength, seed + 1))
        return Problem(
            inputs,
            torch.from_numpy(labels),
            torch.from_numpy(clean),
            source,
            trusted,
            self.evaluations(setting, on_test),
            validation,
        )

    def _inputs(self, setting: Setting, source: Rows) -> Tensor:
        return self.inputs[source] if setting.model == "mlp" else self.encoded(setting, self.pixels[source])

    def _labels(self, name: str, source: Rows, seed: int) -> Rows:
        if name.startswith("symmetric:"):
            clean = self.labels["label"][source]
            return sampling.symmetric_noise(clean, sampling.noise_rate(name), self.classes, seed)
        if name not in self.labels:
            raise typer.BadParameter(
                f"this study needs the label column {name!r}; there {'is' if len(self.labels) == 1 else 'are'}: "
                f"{', '.join(self.labels)}",
                param_hint="--data",
            )
        return self.labels[name][source]


def _strengths(kinds: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each kind of corruption at each of its strengths."""
    return ((kind, strength + 1) for kind in kinds for strength in range(len(SHIFTS[kind])))


def _label_columns(options: DataOptions) -> dict[str, Rows]:
    """All other integer columns of the training file."""
    if options.kind != "parquet":
        return {}
    table = pq.read_table(options.folder / "train.parquet")
    names = [field.name for field in table.schema if pa.types.is_integer(field.type) and field.name != "label"]
    return {name: table.column(name).to_numpy().astype(np.int64) for name in names}

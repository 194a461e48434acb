"""The image sets of the comparisons: read, cut down and relabelled as the options say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn.datasets
import sklearn.model_selection
import torch
import torchvision
import typer
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from benchmarks.batches import FileImages, Images, LabelledImages, Normalisation, TensorImages
from benchmarks.sampling import Rows, balanced_subset, long_tail, noise_rate, symmetric_noise

IMAGENET = Normalisation(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""Channel statistics of ImageNet's training set, in units of uint8 pixels."""


@dataclass(frozen=True)
class DataOptions:
    """Which data, and what is done to its training rows; the command line's options of the same names."""

    data: str = "digits"
    root: Path = Path("data")
    download: bool = False
    image_size: int | None = None
    label_column: str | None = None
    subset: int | None = None
    imbalance: float = 1.0
    label_noise: str | None = None
    workers: int = 4

    @property
    def kind(self) -> str:
        """``digits``, ``cifar10``, ``cifar100``, ``imagefolder`` or ``parquet``."""
        return self.data.partition(":")[0]

    @property
    def folder(self) -> Path:
        """The DIR of ``imagefolder:DIR`` and ``parquet:DIR``."""
        return Path(self.data.partition(":")[2])


@dataclass(frozen=True)
class Task:
    """A classification problem, ready for training.

    Attributes:
        train: with the labels to train on, wrong ones among them if there are.
        test: with clean labels.
        classes: their C names.
    """

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.images.shape

    def to(self, device: torch.device) -> Task:
        return Task(self.train.to(device), self.test.to(device), self.classes)


@dataclass(frozen=True)
class _Source:
    """One part of a data set before its images are read.

    Attributes:
        clean: ``(N,)`` true class indices.
        labels: ``(N,)`` the ones to train on.
        images: reads the images of some rows.
    """

    clean: Rows
    labels: Rows
    images: Callable[[Rows], Images]


def load(options: DataOptions) -> Task:
    """Read the data set that the options name.

    Raises:
        typer.BadParameter: for anything missing, unknown or out of range; names the option.
    """
    readers = {
        "digits": _digits,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "imagefolder": _image_folder,
        "parquet": _parquet,
    }
    if options.kind not in readers or (options.kind in ("imagefolder", "parquet")) != (":" in options.data):
        raise typer.BadParameter(
            f"{options.data!r} is unknown; take digits, cifar10, cifar100, imagefolder:DIR or parquet:DIR",
            param_hint="--data",
        )
    if options.label_column is not None and options.kind != "parquet":
        raise typer.BadParameter("only --data parquet:DIR has label columns", param_hint="--label-column")
    if options.image_size is not None and options.kind not in ("imagefolder", "parquet"):
        raise typer.BadParameter(f"{options.kind} has images of one size; leave it out", param_hint="--image-size")
    rate = None if options.label_noise is None else noise_rate(options.label_noise)

    train, test, classes = readers[options.kind](options)
    rows = _kept(train.clean, options)
    labels = train.labels[rows]
    if rate is not None:
        labels = symmetric_noise(labels, rate, len(classes))
    images = train.images(rows)
    test_images = test.images(np.arange(len(test.clean)))
    if test_images.shape != images.shape:
        raise typer.BadParameter(
            f"training images are {images.shape}, test images {test_images.shape}; give --image-size",
            param_hint="--data",
        )
    normalisation = Normalisation.of(images.pixels) if isinstance(images, TensorImages) else IMAGENET
    return Task(
        LabelledImages(images, torch.from_numpy(labels), normalisation),
        LabelledImages(test_images, torch.from_numpy(test.clean), normalisation),
        tuple(classes),
    )


def _kept(clean: Rows, options: DataOptions) -> Rows:
    """The training rows left by ``--subset`` and then ``--imbalance``, which both go by the true class."""
    rows = np.arange(len(clean)) if options.subset is None else balanced_subset(clean, options.subset)
    return rows[long_tail(clean[rows], options.imbalance)] if options.imbalance != 1.0 else rows


def _held(pixels: np.ndarray[Any, Any], labels: Any) -> _Source:
    """Images in memory, ``(N, H, W, C)`` uint8."""
    classes = np.asarray(labels, dtype=np.int64)
    return _Source(
        classes,
        classes,
        lambda rows: TensorImages(torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).contiguous()),
    )


Parts = tuple[_Source, _Source, Sequence[str]]


def _digits(options: DataOptions) -> Parts:
    """scikit-learn's 1,797 digits of 8×8 grey values 0 to 16: half to train on and half to test, by class."""
    digits = sklearn.datasets.load_digits()
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(digits.target)), test_size=0.5, stratify=digits.target, random_state=0
    )
    pixels = digits.images.astype(np.uint8)[..., None]
    names = [str(name) for name in digits.target_names]
    return _held(pixels[train], digits.target[train]), _held(pixels[test], digits.target[test]), names


def _cifar(options: DataOptions) -> Parts:
    kind = torchvision.datasets.CIFAR10 if options.kind == "cifar10" else torchvision.datasets.CIFAR100
    try:
        train, test = (kind(options.root, train=part, download=options.download) for part in (True, False))
    except RuntimeError as error:
        raise typer.BadParameter(
            f"{options.kind} is not (or not complete) in {options.root}; give --download or another --root",
            param_hint="--root",
        ) from error
    return _held(train.data, train.targets), _held(test.data, test.targets), train.classes


class _Files(Dataset[tuple[Tensor, int]]):
    """Image files, resized and cropped to a square: ``(pixels (3, S, S) uint8, row)``."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths = paths
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return _tensor(_square(torchvision.datasets.folder.pil_loader(self.paths[row]), self.size)), row


def _image_folder(options: DataOptions) -> Parts:
    """ImageNet's layout: ``DIR/train/<class>/<image>`` and ``DIR/val/<class>/<image>``."""
    try:
        train, test = (torchvision.datasets.ImageFolder(str(options.folder / part)) for part in ("train", "val"))
    except FileNotFoundError as error:
        raise typer.BadParameter(
            f"{error}; DIR needs train/<class>/<image> and val/<class>/<image>", param_hint="--data imagefolder:DIR"
        ) from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise typer.BadParameter(
            f"train and val must have the same classes; in one of them only: {', '.join(odd)}",
            param_hint="--data imagefolder:DIR",
        )
    size = 224 if options.image_size is None else options.image_size

    def source(part: torchvision.datasets.ImageFolder) -> _Source:
        classes = np.array(part.targets)
        paths = [path for path, _ in part.samples]
        return _Source(
            classes,
            classes,
            lambda rows: FileImages(_Files([paths[row] for row in rows], size), (3, size, size), options.workers),
        )

    return source(train), source(test), train.classes


def _parquet(options: DataOptions) -> Parts:
    """The Hugging Face layout: ``train.parquet`` beside ``test.parquet`` or ``val.parquet``, an image struct with the
    encoded bytes, an integer ``label``, and perhaps class names in the schema's metadata."""
    folder = options.folder
    files = [path for name in ("test", "val") if (path := folder / f"{name}.parquet").is_file()]
    if not (folder / "train.parquet").is_file() or not files:
        raise typer.BadParameter(
            f"{folder} needs train.parquet and either test.parquet or val.parquet", param_hint="--data parquet:DIR"
        )
    train, test = pq.read_table(folder / "train.parquet"), pq.read_table(files[0])
    clean, test_clean = _label_column(train, "label", "--data"), _label_column(test, "label", "--data")
    labels = clean if options.label_column is None else _label_column(train, options.label_column, "--label-column")
    classes = _class_names(train, max(part.max() for part in (clean, labels, test_clean)) + 1)
    return (
        _Source(clean, labels, lambda rows: _decoded(train, rows, options)),
        _Source(test_clean, test_clean, lambda rows: _decoded(test, rows, options)),
        classes,
    )


def _label_column(table: pa.Table, name: str, option: str) -> Rows:
    integers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    if name not in integers:
        raise typer.BadParameter(
            f"there is no integer column {name!r}; there {'are' if integers else 'is none but'}: "
            f"{', '.join(integers or table.column_names)}",
            param_hint=option,
        )
    column = table.column(name)
    if column.null_count or not len(column) or column.to_numpy().min() < 0:
        raise typer.BadParameter(
            f"column {name!r} must hold a class index ≥ 0 in every row; it is empty or has missing or negative ones",
            param_hint=option,
        )
    return column.to_numpy().astype(np.int64)


def _class_names(table: pa.Table, found: int) -> Sequence[str]:
    """Those in the schema's metadata, or numbers where it has none."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get("label", {}).get("names")
    if names is None:
        return [str(label) for label in range(found)]
    if found > len(names):
        raise typer.BadParameter(
            f"label {found - 1} has no name among the {len(names)} classes of the metadata",
            param_hint="--data parquet:DIR",
        )
    return names


def _decoded(table: pa.Table, rows: Rows, options: DataOptions) -> TensorImages:
    """The images of some rows, grey ones as RGB; every one the same size, or made so by ``--image-size``."""
    if "image" not in table.column_names or not pa.types.is_struct(table.schema.field("image").type):
        raise typer.BadParameter(
            f"there is no struct column 'image'; there are: {', '.join(table.column_names)}",
            param_hint="--data parquet:DIR",
        )
    encoded = pa.compute.struct_field(table.column("image"), "bytes").take(pa.array(rows))

    def decode(row: int) -> Tensor:
        try:
            image = Image.open(io.BytesIO(encoded[row].as_py() or b"")).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise typer.BadParameter(
                f"row {rows[row]} holds no readable image", param_hint=f"--data {options.data}"
            ) from error
        return _tensor(image if options.image_size is None else _square(image, options.image_size))

    with ThreadPoolExecutor() as threads:
        images = list(threads.map(decode, range(len(rows))))
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise typer.BadParameter(
            f"the images have {len(shapes)} different sizes; give a size to bring them to", param_hint="--image-size"
        )
    return TensorImages(torch.stack(images))


def _square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size`` and the centre cropped out."""
    return transforms.center_crop(transforms.resize(image, [size]), [size, size])


def _tensor(image: Image.Image) -> Tensor:
    return transforms.pil_to_tensor(image)

"""Image sets as batches ``(inputs, targets, indices)``: in seeded orders, augmented and normalised on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor, Tensor]
RawBatch = tuple[Tensor, Tensor]  # uint8 pixels (B, C, H, W) and their rows (B,)


class Order:
    """The given rows in batches, as lists: in their own order, or in a new random order at each pass.

    The sizes of the batches differ by at most one, so that no batch is too small for batch norm.

    Args:
        rows: row numbers.
        batch_size: the largest size.
        seed: of the orders; None keeps the rows as they are.
    """

    def __init__(self, rows: Sequence[int], batch_size: int, seed: int | None) -> None:
        self.rows = torch.as_tensor(rows)
        self.batches = -(-len(rows) // batch_size)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.rows
        if self.generator is not None:
            rows = rows[torch.randperm(len(rows), generator=self.generator)]
        for part in rows.tensor_split(self.batches):
            yield part.tolist()


class Images(Protocol):
    """N images that can be read in the batches of an :class:`Order`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def __len__(self) -> int: ...

    def raw(self, order: Order) -> Iterable[RawBatch]:
        """Each pass over the result is a pass over ``order``."""

    def to(self, device: torch.device) -> Images:
        """The same images where the training runs, if they are held in memory."""


@dataclass(frozen=True)
class TensorImages:
    """Images held as one uint8 tensor ``(N, C, H, W)``, on the device that trains."""

    pixels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)

    def raw(self, order: Order) -> Iterable[RawBatch]:
        return _Gathered(self.pixels, order)

    def to(self, device: torch.device) -> TensorImages:
        return TensorImages(self.pixels.to(device))


@dataclass(frozen=True)
class _Gathered:
    pixels: Tensor
    order: Order

    def __iter__(self) -> Iterator[RawBatch]:
        for part in self.order:
            rows = torch.tensor(part, device=self.pixels.device)
            yield self.pixels[rows], rows


@dataclass(frozen=True)
class FileImages:
    """Images read from files by worker processes.

    Args:
        files: ``files[row]`` is ``(pixels, row)``, the pixels uint8 of one ``shape``.
        shape: (C, H, W).
        workers: processes for each loader; 0 reads in this one.
    """

    files: Dataset[tuple[Tensor, int]]
    shape: tuple[int, int, int]
    workers: int

    def __len__(self) -> int:
        assert isinstance(self.files, Sized)
        return len(self.files)

    def raw(self, order: Order) -> Iterable[RawBatch]:
        return DataLoader(
            self.files,
            batch_sampler=order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # it would move the global stream otherwise
        )

    def to(self, device: torch.device) -> FileImages:
        return self


@dataclass(frozen=True)
class Normalisation:
    """Pixels to inputs: ``(pixels − mean) / std`` by channel, in units of the uint8 pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, pixels: Tensor) -> Normalisation:
        """That of uint8 ``(N, C, H, W)`` pixels themselves, by way of their histograms."""
        values = torch.arange(256, dtype=torch.double)
        means, stds = [], []
        for channel in pixels.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = (share * values).sum()
            means.append(mean.item())
            stds.append((share * (values - mean) ** 2).sum().sqrt().clamp_min(1e-6).item())
        return cls(tuple(means), tuple(stds))

    def __call__(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8 to float32."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() - mean) / std


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image cropped at random out of itself with a zero border, an eighth of its height (4 pixels at 32×32), and
    flipped left to right half of the time.

    Args:
        pixels: ``(B, C, H, W)``.
        generator: on the CPU, so that every device sees the same images.
    """
    size, _, height, width = pixels.shape
    border = height // 8
    top, left = torch.randint(2 * border + 1, (2, size, 1), generator=generator).to(pixels.device)
    flipped = (torch.rand(size, 1, generator=generator) < 0.5).to(pixels.device)
    rows = top + torch.arange(height, device=pixels.device)
    across = torch.arange(width, device=pixels.device)
    columns = left + torch.where(flipped, across.flip(0), across)
    each = torch.arange(size, device=pixels.device).view(-1, 1, 1)
    padded = F.pad(pixels, (border, border, border, border))
    return padded.permute(0, 2, 3, 1)[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


class Batches:
    """Batches ``(inputs, targets, indices)`` on one device; iterating again is another pass, in another order.

    Args:
        images: what to read.
        labels: ``(N,)`` on the device.
        normalisation: of the pixels.
        order: which rows, and how they are batched.
        seed: of the augmentation; None for none.
    """

    def __init__(
        self, images: Images, labels: Tensor, normalisation: Normalisation, order: Order, seed: int | None
    ) -> None:
        self.raw = images.raw(order)
        self.labels = labels
        self.normalisation = normalisation
        self.length = len(order)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        device = self.labels.device
        for raw_pixels, raw_rows in self.raw:
            pixels, rows = raw_pixels.to(device, non_blocking=True), raw_rows.to(device)
            if self.generator is not None:
                pixels = augmented(pixels, self.generator)
            yield self.normalisation(pixels), self.labels[rows], rows


@dataclass(frozen=True)
class LabelledImages(Dataset[Any]):
    """A dataset of images with the labels to learn, read in batches.

    Attributes:
        images: the N images.
        labels: ``(N,)`` class indices, on the device that trains.
        normalisation: of the pixels.
    """

    images: Images
    labels: Tensor
    normalisation: Normalisation

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rows: Sequence[int], batch_size: int, seed: int, augment: bool) -> Batches:
        """Passes over ``rows`` in random orders, augmented or not."""
        order = Order(rows, batch_size, seed)
        return Batches(self.images, self.labels, self.normalisation, order, seed if augment else None)

    def in_order(self, batch_size: int = 512) -> Batches:
        """One pass over everything, in order, as it is."""
        order = Order(range(len(self)), batch_size, None)
        return Batches(self.images, self.labels, self.normalisation, order, None)

    def to(self, device: torch.device) -> LabelledImages:
        """The same dataset where the training runs."""
        return LabelledImages(self.images.to(device), self.labels.to(device), self.normalisation)

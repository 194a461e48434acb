"""Fixed image features after Coates, Lee and Ng (AISTATS 2011): distances to k-means patches, pooled over quadrants.

They let a small network on top stand in for a large one where there is no accelerator.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]


@dataclass(frozen=True)
class PatchOptions:
    """Everything that decides the features.

    Attributes:
        patches: K, how many patches the dictionary has; an image gets 4 K numbers.
        size: side of a patch, in pixels.
        samples: patches that k-means sees.
        iterations: of k-means.
        seed: of the patches drawn.
    """

    patches: int = 400
    size: int = 6
    samples: int = 100_000
    iterations: int = 15
    seed: int = 0


@dataclass(frozen=True)
class Dictionary:
    """What was learned from training images, without their labels.

    Attributes:
        size: side of a patch.
        centre: ``(D,)`` mean of the contrast-normalised patches, D = C · size².
        whitening: ``(D, D)`` ZCA.
        centroids: ``(K, D)``.
        mean, std: ``(4 K,)`` of the pooled features of training images.
    """

    size: int
    centre: Tensor
    whitening: Tensor
    centroids: Tensor
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def encode(self, pixels: Tensor, batch_size: int = 50) -> Tensor:
        """``(N, C, H, W)`` uint8 images to ``(N, 4 K)`` standardised features."""
        pooled = _pooled(pixels, self.size, self.centre, self.whitening, self.centroids, batch_size)
        return pooled.sub_(self.mean).div_(self.std)


@torch.no_grad()
def learn(pixels: Tensor, options: PatchOptions) -> Dictionary:
    """Whitening, k-means and standardisation from ``(N, C, H, W)`` uint8 training images."""
    generator = torch.Generator().manual_seed(options.seed)
    patches = _contrast_normalised(_sampled_patches(pixels, options, generator))
    centre = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh((patches - centre).T.cov())
    whitening = (vectors * (values + 0.1).rsqrt()) @ vectors.T
    centroids = _k_means((patches - centre) @ whitening, options.patches, options.iterations, generator)
    some = torch.randperm(len(pixels), generator=generator)[:2000]
    pooled = _pooled(pixels[some], options.size, centre, whitening, centroids, 50)
    return Dictionary(options.size, centre, whitening, centroids, pooled.mean(dim=0), (pooled.var(dim=0) + 0.01).sqrt())


def _sampled_patches(pixels: Tensor, options: PatchOptions, generator: torch.Generator) -> Tensor:
    """``(samples, D)`` patches from random places of random images."""
    count, _, height, width = pixels.shape
    image, top, left = (
        torch.randint(high, (options.samples,), generator=generator)
        for high in (count, height - options.size + 1, width - options.size + 1)
    )
    across = torch.arange(options.size)
    rows = (top[:, None] + across)[:, :, None]
    columns = (left[:, None] + across)[:, None, :]
    return pixels.permute(0, 2, 3, 1)[image[:, None, None], rows, columns].permute(0, 3, 1, 2).flatten(1).float()


def _contrast_normalised(patches: Tensor) -> Tensor:
    """Each patch ``(…, D)`` with mean 0 and variance about 1; 10 is the paper's guard against flat ones."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 10.0).sqrt()


def _k_means(points: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """``(count, D)`` centroids by Lloyd's algorithm; one that loses all its points takes a random one."""
    centroids = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(iterations):
        nearest = torch.cat(
            [((part @ centroids.T) - centroids.square().sum(1) / 2).argmax(dim=1) for part in points.split(10_000)]
        )
        sizes = torch.bincount(nearest, minlength=len(centroids))
        centroids = torch.zeros_like(centroids).index_add_(0, nearest, points) / sizes.clamp_min(1)[:, None]
        empty = sizes == 0
        centroids[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
    return centroids


def _pooled(pixels: Tensor, size: int, centre: Tensor, whitening: Tensor, centroids: Tensor, batch_size: int) -> Tensor:
    """``(N, 4 K)``: the activations ``max(0, mean distance − distance to patch k)``, summed over each quadrant."""
    height, width = (extent - size + 1 for extent in pixels.shape[2:])
    parts = []
    for batch in pixels.split(batch_size):
        patches = _contrast_normalised(F.unfold(batch.float(), size).transpose(1, 2))
        distances = torch.cdist((patches - centre) @ whitening, centroids)
        active = (distances.mean(dim=2, keepdim=True) - distances).clamp_min_(0.0)
        maps = active.transpose(1, 2).reshape(len(batch), len(centroids), height, width)
        parts.append(4.0 * F.adaptive_avg_pool2d(maps, 2).flatten(1))
    return torch.cat(parts)


class FeatureCache:
    """Features on disk, by what they are made from: the options and the pixels themselves.

    Args:
        folder: where; made if it is missing. Files are written at once, so that a stopped run leaves none in part.
        train: ``(N, C, H, W)`` uint8 images that the dictionary is learned from.
        options: of the features.
    """

    def __init__(self, folder: Path, train: Tensor, options: PatchOptions) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.train = train
        self.options = options
        self.source = _digest(json.dumps(asdict(options), sort_keys=True).encode(), train)
        self._dictionary: Dictionary | None = None

    def features(self, pixels: Tensor) -> Tensor:
        """``(N, 4 K)`` features of uint8 images, read from disk (shared by every process) once they have been made."""
        path = self.folder / f"{_digest(self.source.encode(), pixels)}.npy"
        if not path.exists():
            _write(path, lambda: self.dictionary.encode(pixels).numpy())
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    @property
    def dictionary(self) -> Dictionary:
        """Learned when first asked for."""
        if self._dictionary is None:
            self._dictionary = learn(self.train, self.options)
        return self._dictionary


def _digest(prefix: bytes, pixels: Tensor) -> str:
    shape = repr(tuple(pixels.shape)).encode()
    return hashlib.blake2b(prefix + shape + pixels.contiguous().numpy().tobytes(), digest_size=12).hexdigest()


def _write(path: Path, make: Callable[[], Array]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, make())
    os.replace(partial, path)

"""The images or texts of single rows, for thumbnails."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

SIDE = 72
"""Pixels of a thumbnail's longer side."""

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder takes."""


class Pictures:
    """Thumbnails by row.

    Args:
        source: a folder in torchvision's ``ImageFolder`` layout (rows in its order), a ``.npy`` file of images
            ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` (uint8, or floats from 0 to 1), or a Parquet file or
            folder of them in the Hugging Face layout (a column ``image`` of encoded bytes).

    Attributes:
        classes: names of the classes, as far as the source knows them.

    Raises:
        ImportError: without Pillow.
        ValueError: for a source of another kind.
    """

    def __init__(self, source: str | Path) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("--images needs Pillow: pip install 'torch-molere[report]'") from error
        self._open = Image
        path = Path(source)
        self.classes: list[str] = []
        self._image: Callable[[int], Any]
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if files and files[0].suffix == ".parquet":
            self._of_parquet(files)
        elif path.is_dir():
            self.classes = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
            paths = [
                file
                for name in self.classes
                for file in sorted((path / name).rglob("*"))
                if file.suffix.lower() in ENDINGS
            ]
            if not paths:
                raise ValueError(f"--images {path} holds no images in folders of their classes")
            self._image = lambda row: Image.open(paths[row])
        elif path.suffix == ".npy":
            values = np.load(path, mmap_mode="r")
            self._image = lambda row: self._of_array(values[row])
        else:
            raise ValueError(f"--images must be a folder, a .npy or a .parquet file, got {path}")

    def _of_parquet(self, files: list[Path]) -> None:
        table = pq.ParquetDataset([str(file) for file in files]).read(columns=["image"])
        schema = pq.read_schema(files[0])
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        self.classes = list(features.get("label", {}).get("names", []))
        column = table.column("image")
        self._image = lambda row: self._open.open(io.BytesIO(column[row].as_py()["bytes"]))

    def _of_array(self, values: np.ndarray) -> Any:
        array = np.asarray(values)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if array.dtype != np.uint8:
            array = (np.clip(array, 0.0, 1.0) * 255).round().astype(np.uint8)
        return self._open.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array)

    def __call__(self, row: int) -> str:
        """A data URI of the row's thumbnail, or "" where there is no such row."""
        try:
            image = self._image(row).convert("RGB")
        except (IndexError, FileNotFoundError):
            return ""
        scale = SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, self._open.Resampling.NEAREST if scale > 2 else self._open.Resampling.LANCZOS)
        packed = io.BytesIO()
        image.save(packed, "WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def texts_of(source: str) -> Callable[[int], str]:
    """What gives the text of a row.

    Args:
        source: ``FILE:COLUMN``, a CSV or Parquet file.

    Raises:
        ValueError: for another form or a column that the file does not have.
    """
    name, _, column = source.rpartition(":")
    if not name:
        raise ValueError(f"--texts must be FILE:COLUMN, got {source!r}")
    table = pd.read_parquet(name) if name.endswith(".parquet") else pd.read_csv(name)
    if column not in table:
        raise ValueError(f"--texts: {name} has no column {column!r}; it has {', '.join(map(str, table.columns))}")
    values = table[column].astype(str).tolist()
    return lambda row: values[row][:300] if 0 <= row < len(values) else ""

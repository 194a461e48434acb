"""A dataset whose items say which row they are."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset


class IndexedDataset(Dataset[Any]):
    """A map-style dataset with each item's index added; see :func:`with_indices`. All else is the dataset's own."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "dataset", dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = self._row(index)
        return _with_index(self.dataset[row], row)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """The items of a batch, by the dataset's own ``__getitems__`` where it has one."""
        rows = [self._row(index) for index in indices]
        together = getattr(self.dataset, "__getitems__", None)
        items = together(rows) if together else [self.dataset[row] for row in rows]
        return [_with_index(item, row) for item, row in zip(items, rows, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # not there yet while a copy is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "dataset" or not hasattr(self.dataset, name)
        object.__setattr__(self if own else self.dataset, name, value)

    def __repr__(self) -> str:
        return f"with_indices({self.dataset!r})"

    def _row(self, index: Any) -> int:
        row = operator.index(index)
        return row + len(self) if row < 0 else row


def with_indices(dataset: Any) -> IndexedDataset:
    """The same dataset with each item's index added, so that the reweighter can know its rows again.

    An item ``(inputs, targets)`` becomes ``(inputs, targets, index)``; a dict gets the key ``"index"``. The index is
    the one that the item is asked for by: of ``with_indices(Subset(dataset, rows))`` it counts within the subset, of
    ``Subset(with_indices(dataset), rows)`` within the whole dataset.

    Args:
        dataset: any map-style dataset (``ImageFolder``, ``TensorDataset``, ``Subset``, ``ConcatDataset``, a Hugging
            Face ``datasets.Dataset``, a list of items). One that has its indices already is returned as it is.

    Returns:
        A dataset of the same length. Other attributes (``classes``, ``targets``, ``transform``, …) are read from and
        written to the dataset itself. It can be given to worker processes if the dataset can.

    Raises:
        TypeError: for an ``IterableDataset`` or anything else without ``dataset[i]`` and ``len(dataset)``.
    """
    if isinstance(dataset, IndexedDataset):
        return dataset
    streams = isinstance(dataset, IterableDataset)
    if streams or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"dataset must be map-style, with dataset[i] and len(dataset), got {type(dataset).__name__}. A stream has "
            "no rows to ask for: let it yield (inputs, targets, index) itself, where index is an integer that is the "
            "same whenever the same row comes again, in every epoch and worker, e.g. its line in the file"
        )
    return IndexedDataset(dataset)


def _with_index(item: Any, row: int) -> Any:
    if isinstance(item, Mapping):
        if "index" in item:
            raise ValueError("the items have a key 'index' already; use it as it is, or rename it")
        return {**item, "index": row}
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return (*item, row)
    found = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
    raise ValueError(
        f"the dataset's items must be (inputs, targets) or a dict, got a {found}; put several inputs in one tuple or "
        "dict, or yield (inputs, targets, index) yourself"
    )

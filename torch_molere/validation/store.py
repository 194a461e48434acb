"""Bounded storage of single instances, taken out of batches and put together to batches again."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_molere.calls import Arguments, leaves_of, map_leaves, move, tensors_of

LEAST = 2
"""The fewest instances that make a validation batch: batch norm needs two."""

Padding = float | Mapping[str | int, float]
"""What fills up shorter instances: one number for all tensors, or one by the name or position of an input."""

_COLUMNS: tuple[type, ...] = (Tensor, np.ndarray, list, tuple)
_CONSTANT = (
    "has no value for each instance, so that it cannot be kept with them in the validation buffer, and is another than "
    "in earlier batches: give it by instance (a tensor with the batch first, or a list), or pass validation="
)


class _Padded:
    """In a layout the place of a tensor whose instances have one size in this batch and another in that.

    Args:
        value: fills up shorter instances.
        column: of the batch that decides.
    """

    def __init__(self, value: float, column: Tensor) -> None:
        self.value = value
        self.kind = column.ndim, column.dtype

    def batch(self, instances: Sequence[Tensor]) -> Tensor:
        """``(B, …)``: each filled up at the ends to the largest size that one of them has."""
        sizes = [max(found) for found in zip(*(instance.shape for instance in instances), strict=True)]
        filled = []
        for instance in instances:
            missing = [size - own for size, own in zip(sizes, instance.shape, strict=True)]
            ends = [number for each in reversed(missing) for number in (0, each)]
            filled.append(F.pad(instance, ends, value=self.value))
        return torch.stack(filled)


class _Instances:
    """Those of a column that are kept one by one."""

    def __init__(self, column: Tensor) -> None:
        self.column = column

    def __len__(self) -> int:
        return self.column.shape[0]

    def __getitem__(self, position: int) -> Tensor:
        return self.column[position]


class InstanceStore:
    """Up to ``capacity`` instances, each what one position of a batch ``(arguments, targets)`` holds.

    What a batch has for each of its B instances are its *columns*: tensors and NumPy arrays of numbers with first
    dimension B, and lists or tuples of B items (strings, images of different shapes, dictionaries of tensors). Such a
    list is one column unless every tensor in it has first dimension B: then it holds columns. All else (numbers, None,
    strings, tensors with another first dimension) is constant and must be the same in every batch. The first batch
    decides. Storage is allocated once and filled densely; instances are copied in and copied out.

    Args:
        capacity: the most instances, at least 2.
        max_bytes: the most memory that they may take; lowers the capacity where they are large. What lists hold is
            counted once it is there; two instances stay in any case.
        padding: where tensors of one input have other sizes in other batches, what fills shorter instances up in a
            batch put together; they are kept as lists are.
    """

    def __init__(self, capacity: int, max_bytes: int, padding: Padding | None = None) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.padding = padding
        self._layout: Any = None  # (arguments, targets) with the type of each column in its place
        self._candidate: Any = None  # that of the latest batch checked, while no batch has decided
        self._columns: list[Any] = []  # tensors and lists, by slot
        self._specs: list[Any] = []  # of the columns
        # Dense, by place; a release moves the last instance's numbers into the gap, and no tensor.
        self._slots: list[int] = []
        self._rows: list[int | None] = []
        self._classes = np.zeros(capacity, dtype=np.int64)
        self._sizes = np.zeros(capacity, dtype=np.int64)  # bytes in lists
        self._times = np.zeros(capacity, dtype=np.int64)  # when each came in, or was refreshed
        self._place_of_row: dict[int, int] = {}
        self._free: list[int] = []  # slots below the highest used that hold nothing

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._place_of_row

    @property
    def rows(self) -> list[int]:
        """The dataset rows held, in no particular order; instances without one are left out."""
        return list(self._place_of_row)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage allocated and of what lists hold."""
        return sum(c.nbytes for c in self._columns if isinstance(c, Tensor)) + int(self._sizes[: len(self)].sum())

    def class_counts(self) -> dict[int, int]:
        """How many instances of each class it holds."""
        labels, counts = np.unique(self._classes[: len(self)], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))

    def mean_age(self, now: int) -> float:
        """The mean time since the instances held came in or were refreshed; 0 where there are none."""
        return float(now - self._times[: len(self)].mean()) if len(self) else 0.0

    def check(self, arguments: Arguments, targets: Any, size: int, wait: bool = True) -> Tensor | None:
        """Refuse a batch of ``size`` instances that cannot be stored beside those held.

        Returns:
            None; or without ``wait``, where constant tensors on a device are still to be compared, a bool tensor:
            whether one is another than before.

        Raises:
            ValueError: for columns of other shapes, dtypes, devices or nesting than those held, constants that are
                others, instances larger than the byte cap, or inputs that have no column.
        """
        return self._read(arguments, targets, size, wait)[1]

    def insert(
        self,
        arguments: Arguments,
        targets: Any,
        size: int,
        positions: Sequence[int],
        rows: Sequence[int] | None = None,
        classes: Sequence[int] | None = None,
        seed: int = 0,
        shares: Mapping[int, float] | None = None,
        now: int = 0,
    ) -> None:
        """Put instances of a batch in. A row already held is refreshed in place.

        When full, each replaces a random one: one of its own class where ``shares`` are given and the class has its
        share already, any other where not.

        Args:
            arguments, targets, size: the batch and its number of instances.
            positions: which of them.
            rows, classes: of all instances of the batch.
            seed: of what is replaced.
            shares: of each class, in the stream.
            now: the time, for :meth:`mean_age`.

        Raises:
            ValueError: as :meth:`check`.
        """
        if not positions:
            return
        columns, _ = self._read(arguments, targets, size, wait=False)
        self._layout = self._layout or self._candidate
        if not self._columns:
            self._allocate(columns)
        generator = random.Random(seed) if len(self) + len(positions) > self.capacity else None
        taken: dict[int, int] = {}  # place -> position; of two for one place the later
        for position in positions:
            row = None if rows is None else rows[position]
            taken[self._place_for(row, 0 if classes is None else classes[position], generator, shares)] = position
        chosen, slots = list(taken.values()), [self._slots[place] for place in taken]
        self._times[list(taken)] = now
        to, of = torch.from_numpy(np.array(slots)), torch.from_numpy(np.array(chosen))
        for held, column in zip(self._columns, columns, strict=True):
            if isinstance(held, Tensor):
                to, of = (index.to(held.device, non_blocking=True) for index in (to, of))
                held.index_copy_(0, to, _picked(column, chosen, of))
                continue
            for place, slot, item in zip(taken, slots, _picked(column, chosen), strict=True):
                self._sizes[place] += _nbytes(item) - _nbytes(held[slot])
                held[slot] = item
        if any(spec is None for spec in self._specs):
            generator = random.Random(seed + 1)
            while self.nbytes > self.max_bytes and len(self) > LEAST:
                self.release([generator.randrange(len(self))], keep=LEAST)

    @property
    def drawable(self) -> int:
        """How many instances can be drawn: all, but none between loading and the next batch checked."""
        return len(self) if self._layout or self._candidate else 0

    def draw(self, places: Sequence[int]) -> tuple[Arguments, Any]:
        """Copies of the instances in these places, as a batch ``(arguments, targets)``."""
        slots = [self._slots[place] for place in places]
        return _batch(self._layout or self._candidate, [_picked(column, slots) for column in self._columns])

    def release(self, places: Iterable[int], keep: int) -> None:
        """Drop instances by place, but never below ``keep`` of them."""
        for place in sorted(set(places), reverse=True):  # from the back: the last one moves into the gap
            if len(self) <= keep:
                break
            self._forget(place)
            last, slot = len(self) - 1, self._slots[place]
            for held in self._columns:
                if isinstance(held, list):
                    held[slot] = None
            self._free.append(slot)
            row = self._rows[place] = self._rows[last]
            if row is not None and place != last:
                self._place_of_row[row] = place
            self._slots[place] = self._slots[last]
            for numbers in (self._classes, self._sizes, self._times):
                numbers[place], numbers[last] = numbers[last], 0
            del self._rows[last], self._slots[last]

    def held_among(self, rows: frozenset[int]) -> set[int]:
        """Those of these dataset rows that are held."""
        return self._place_of_row.keys() & rows

    def release_rows(self, rows: Iterable[int], keep: int) -> None:
        """Drop instances by dataset row, never below ``keep``; rows not held are passed over."""
        self.release([self._place_of_row[row] for row in rows if row in self._place_of_row], keep)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in types that ``torch.load(weights_only=True)`` reads if those in the lists are."""
        columns = [_picked(held, self._slots) for held in self._columns]
        classes, times = self._classes[: len(self)].tolist(), self._times[: len(self)].tolist()
        return {"columns": columns, "rows": list(self._rows), "classes": classes, "times": times}

    def loaded(self, state: dict[str, Any]) -> InstanceStore:
        """A store of the same bounds with what :meth:`state_dict` gave.

        Raises:
            ValueError: if its parts do not fit each other or the bounds.
        """
        columns, rows = state["columns"], list(state["rows"])
        classes, times = list(state["classes"]), list(state["times"])
        known = [row for row in rows if row is not None]
        lengths = {len(rows), len(classes), len(times), *(len(column) for column in columns)}
        if len(lengths) > 1 or (rows and not columns):
            raise ValueError(f"the buffer's columns, rows, … must have one length, got {sorted(lengths)}")
        if len(set(known)) < len(known) or any(type(number) is not int for number in (*known, *classes, *times)):
            raise ValueError("the buffer's classes and times must be integers, its rows different integers")
        store = InstanceStore(self.capacity, self.max_bytes, self.padding)
        if columns:
            store._allocate(columns)
        if len(rows) > store.capacity:
            raise ValueError(f"the buffer holds {len(rows)} instances, but its bounds allow {store.capacity}")
        for held, column in zip(store._columns, columns, strict=True):
            held[: len(rows)] = column if isinstance(column, Tensor) else _copied(column)
            if isinstance(column, list):
                store._sizes[: len(rows)] += [_nbytes(item) for item in column]
        store._rows, store._slots, store._classes[: len(rows)] = rows, list(range(len(rows))), classes
        store._times[: len(rows)] = times
        store._place_of_row = {row: place for place, row in enumerate(rows) if row is not None}
        return store

    def _place_for(
        self, row: int | None, label: int, generator: random.Random | None, shares: Mapping[int, float] | None
    ) -> int:
        place = None if row is None else self._place_of_row.get(row)
        if place is None and len(self) < self.capacity:
            place = len(self)
            self._rows.append(row)
            self._slots.append(self._free.pop() if self._free else place)
        elif place is None:
            assert generator is not None
            place = generator.randrange(len(self))
            if shares is not None:
                own = np.flatnonzero(self._classes[: len(self)] == label)
                if len(own) >= max(shares[label] * len(self), 1):
                    place = int(own[place % len(own)])
            self._forget(place)
            self._rows[place] = row
        if row is not None:
            self._place_of_row[row] = place
        self._classes[place] = label
        return place

    def _forget(self, place: int) -> None:
        row = self._rows[place]
        if row is not None:
            del self._place_of_row[row]

    def _allocate(self, columns: Sequence[Any]) -> None:
        self.capacity = self.capacity_for(columns)
        self._specs = [_spec(column) for column in columns]
        self._columns = [
            torch.empty((self.capacity, *spec[0]), dtype=spec[1], device=spec[2]) if spec else [None] * self.capacity
            for spec in self._specs
        ]

    def _read(self, arguments: Arguments, targets: Any, size: int, wait: bool) -> tuple[list[Any], Tensor | None]:
        if self._layout is None:
            self._candidate = _layout(arguments, targets, size, self.padding)
        columns: list[Any] = []
        differ: list[Tensor] = []
        _match(self._layout or self._candidate, (arguments, targets), size, columns, differ, ())
        found = [_spec(column) for column in columns]
        if not self._columns:
            self.capacity_for(columns)
        elif self._layout is None and len(found) == len(self._specs):  # loaded, perhaps onto another device
            self._columns = [_beside(held, column) for held, column in zip(self._columns, columns, strict=True)]
            self._specs = [_spec(held) for held in self._columns]
        if self._columns and found != self._specs:
            raise ValueError(
                "the instances of every batch must have the same shapes, dtypes and devices to share the validation "
                f"buffer: held {self._specs}, got {found}. Where lengths differ, give "
                "validation=ValidationBuffer(padding=...) the numbers that fill shorter ones up, or pad inputs to one "
                "length; or pass validation data"
            )
        different = torch.stack([flag.to(differ[0].device) for flag in differ]).any() if differ else None
        if wait and different is not None and bool(different):
            raise ValueError(f"a tensor of the batch {_CONSTANT}")
        return columns, different

    def capacity_for(self, columns: Sequence[Any]) -> int:
        """How many instances of such columns the bounds allow.

        Raises:
            ValueError: if these are fewer than two.
        """
        specs = [_spec(column) for column in columns]
        each = sum(math.prod(spec[0]) * spec[1].itemsize for spec in specs if spec)
        capacity = min(self.capacity, self.max_bytes // (2 if None in specs else 1) // max(each, 1))
        if capacity < LEAST:
            raise ValueError(
                f"max_bytes={self.max_bytes} is less than {LEAST} instances of {each} bytes take; raise it"
            )
        return capacity


def first_half(arguments: Arguments, targets: Any, size: int | None = None) -> tuple[Arguments, Any]:
    """The first half of a batch's instances (at least one), as an :class:`InstanceStore` would hold and return them.

    Args:
        arguments, targets: the batch.
        size: how many instances it has; by default what :func:`size_of` finds.

    Raises:
        ValueError: if no input has a column.
    """
    size = size_of(arguments, targets) if size is None else size
    layout = _layout(arguments, targets, size)
    columns: list[Any] = []
    _match(layout, (arguments, targets), size, columns, [], ())
    return _batch(layout, [_picked(column, range(max(size // 2, 1))) for column in columns])


def size_of(arguments: Arguments, targets: Any) -> int:
    """The number of instances: the first dimension of the targets, or the length of a list of dictionaries or strings.

    Raises:
        ValueError: if neither targets nor inputs have one.
    """
    for tree in (targets, arguments):
        if isinstance(tree, list) and tree and all(isinstance(item, (Mapping, str)) for item in tree):
            return len(tree)
        for leaf in leaves_of(tree):
            if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim:
                return leaf.shape[0]
    raise ValueError("the targets must have a first dimension, the number of instances")


def _layout(arguments: Arguments, targets: Any, size: int, padding: Padding | None = None) -> Any:
    """The batch with the type of each column in its place, and copies of the constants.

    Raises:
        ValueError: if no input has a column, or ``padding`` names what is no tensor of several dimensions.
    """
    fill = padding if isinstance(padding, Mapping) else {}
    padded: list[Any] = []  # names in padding that were met
    sizes: list[Any] = []  # names of what could be padded

    def of(tree: Any, names: tuple[Any, ...]) -> Any:
        if _is_column(tree, size):
            if isinstance(tree, Tensor) and tree.ndim > 1 and padding is not None:
                sizes.append(names[-1])
                known = [name for name in reversed(names) if name in fill]
                padded.extend(known)
                if known or not isinstance(padding, Mapping):
                    return _Padded(fill[known[0]] if isinstance(padding, Mapping) else padding, tree)
            return next(kind for kind in _COLUMNS if isinstance(tree, kind))
        if (children := _children(tree)) is None:
            return _copied(tree)
        children = {key: of(child, (*names, key) if isinstance(key, str) else names) for key, child in children.items()}
        if isinstance(tree, Mapping):
            return children if type(tree) is dict else type(tree)(children)  # type: ignore[call-arg]
        if isinstance(tree, (tuple, list)):
            return type(tree)(*children.values()) if hasattr(tree, "_fields") else type(tree)(children.values())
        return dataclasses.replace(tree, **children)

    positional, named = arguments
    inputs = (
        tuple(of(argument, (position,)) for position, argument in enumerate(positional)),
        {name: of(argument, (name,)) for name, argument in named.items()},
    )
    if not any(_is_kind(leaf) for leaf in leaves_of(inputs)):
        raise ValueError(
            f"no input has a value for each of the {size} instances (a batch-first tensor or array, or a list), "
            "so that instances cannot be kept in the validation buffer: pass validation="
        )
    layout = inputs, of(targets, ("targets",))
    if unknown := [name for name in fill if name not in padded]:
        raise ValueError(
            f"padding names {unknown}, but what has a size to be filled up is {sizes}: inputs by their name, or by "
            "their position where the model is called without names, and 'targets'"
        )
    return layout


def _is_column(tree: Any, size: int) -> bool:
    if isinstance(tree, Tensor):
        return tree.ndim > 0 and tree.shape[0] == size and tree.layout == torch.strided
    if isinstance(tree, np.ndarray):
        return tree.ndim > 0 and tree.shape[0] == size and tree.dtype.kind in "biufc"
    if not isinstance(tree, (tuple, list)) or hasattr(tree, "_fields") or len(tree) != size:
        return False
    first = [leaf.shape[0] for leaf in leaves_of(tree) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim]
    return not first or any(dimension != size for dimension in first)


def _is_kind(leaf: Any) -> bool:
    return isinstance(leaf, _Padded) or (isinstance(leaf, type) and leaf in _COLUMNS)


def _children(tree: Any) -> dict[Any, Any] | None:
    """What a container holds, by key; None for a leaf."""
    if isinstance(tree, (tuple, list)):
        return dict(enumerate(tree))
    if isinstance(tree, Mapping):
        return dict(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
    return None


def _match(layout: Any, tree: Any, size: int, columns: list[Any], differ: list[Tensor], path: tuple[Any, ...]) -> None:
    """Collect the columns of a batch, and for constants on a device whether they differ from the layout's."""
    if isinstance(layout, _Padded):
        found = (tree.ndim, tree.dtype) if isinstance(tree, Tensor) else None
        if found != layout.kind or len(tree) != size:
            raise ValueError(
                f"{_named(path)} must be a tensor of {layout.kind[0]} dimensions and {layout.kind[1]} with a value for "
                f"each of the {size} instances, as in earlier batches, to share the validation buffer, got "
                f"{_described(tree)} of {getattr(tree, 'dtype', 'no dtype')}; or pass validation="
            )
        columns.append(_Instances(tree))
    elif _is_kind(layout):
        if not isinstance(tree, layout) or getattr(tree, "ndim", 1) == 0 or len(tree) != size:
            raise ValueError(
                f"{_named(path)} must be a {layout.__name__} with a value for each of the {size} instances, as in "
                f"earlier batches, to share the validation buffer, got {_described(tree)}; or pass validation="
            )
        columns.append(tree)
    elif (children := _children(layout)) is None:
        different = _different(layout, tree)
        if different is True:
            raise ValueError(f"{_named(path)}, {_described(tree)}, {_CONSTANT}")
        if isinstance(different, Tensor):
            differ.append(different)
    else:
        given = _children(tree) if type(tree) is type(layout) else None
        if given is None or given.keys() != children.keys():
            raise ValueError(
                f"{_named(path)} must be nested as in earlier batches to share the validation buffer: expected "
                f"{type(layout).__name__} of {list(children)}, got {_described(tree)}; or pass validation="
            )
        for key, child in children.items():
            _match(child, given[key], size, columns, differ, (*path, key))


def _different(kept: Any, given: Any) -> bool | Tensor:
    if isinstance(kept, Tensor):
        alike = isinstance(given, Tensor) and _spec(kept[None]) == _spec(given[None]) and kept.layout == torch.strided
        if not alike or _is_read_at_once(kept):
            return not (alike and torch.equal(kept, given))
        return (kept != given.detach()).any()
    if isinstance(kept, np.ndarray):
        return not np.array_equal(kept, given)
    try:
        return kept is not given and not bool(kept == given)
    except Exception:  # a comparison that yields no truth value
        return True


def _is_read_at_once(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _batch(layout: Any, columns: Sequence[Any]) -> tuple[Arguments, Any]:
    """The batch of such a layout with these columns."""
    remaining = iter(columns)

    def filled(leaf: Any) -> Any:
        if not _is_kind(leaf):
            return _copied(leaf)
        column = next(remaining)
        if isinstance(leaf, _Padded):
            return leaf.batch(column)
        return column.numpy() if leaf is np.ndarray else tuple(column) if leaf is tuple else column

    arguments, targets = map_leaves(filled, layout)
    return arguments, targets


def _beside(held: Any, column: Any) -> Any:
    """What is held, on the device of a batch's column."""
    if isinstance(held, Tensor):
        return held.to(column.device) if isinstance(column, Tensor) else held
    on = next(tensors_of(column[0]), None)
    return held if on is None else [move(item, on.device) for item in held]


def _picked(column: Any, positions: Sequence[int], index: Tensor | None = None) -> Any:
    """A copy of some instances of a column (``index``: their positions on its device): a tensor, or a list."""
    if isinstance(column, Tensor):
        if index is None:
            index = torch.tensor(positions, dtype=torch.long).to(column.device, non_blocking=True)
        return column.detach().index_select(0, index)
    if isinstance(column, np.ndarray):
        return torch.from_numpy(column[list(positions)])
    return [_copied(column[position]) for position in positions]


def _spec(column: Any) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
    """Shape without the first dimension, dtype and device; None for a list."""
    if isinstance(column, np.ndarray):
        column = torch.from_numpy(np.empty((0, *column.shape[1:]), column.dtype))
    return (tuple(column.shape[1:]), column.dtype, column.device) if isinstance(column, Tensor) else None


def _copied(tree: Any) -> Any:
    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return map_leaves(copy, tree)


def _nbytes(tree: Any) -> int:
    leaves = [leaf for leaf in leaves_of(tree) if leaf is not None]
    return sum(leaf.nbytes if isinstance(leaf, (Tensor, np.ndarray)) else sys.getsizeof(leaf) for leaf in leaves)


def _named(path: tuple[Any, ...]) -> str:
    """Such as inputs['mask'], by the keys in ``((positional, named), targets)``."""
    name, keys = ("targets", path[1:]) if path[:1] == (1,) else ("inputs", path[2:])
    return name + "".join(f"[{key!r}]" for key in keys)


def _described(value: Any) -> str:
    shape = tuple(value.shape) if hasattr(value, "shape") else len(value) if isinstance(value, (list, tuple)) else ""
    return f"{type(value).__name__} {shape}" if shape != "" else f"{value!r:.60}"

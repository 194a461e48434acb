"""The validation buffer: a bounded store of instances held out of the stream that training already reads."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_molere.distributed import processes
from torch_molere.evaluation import batch_size, is_by_instance, move
from torch_molere.journal import Journal
from torch_molere.states import whole

LABEL_TOLERANCE = 0.25
"""How far the share of a class among the buffer's labels may exceed its share of the stream, relative."""


_TENSOR = object()


class ValidationBuffer:
    """Up to ``capacity`` instances (inputs, targets and, where given, dataset rows), drawn from uniformly.

    Storage is allocated once, beside the first instance, and filled densely: inserting, drawing and releasing take
    time independent of how much it holds. When full, an insertion replaces a random entry: one of its own class where
    the class has its share already, any other where not.

    Args:
        capacity: the most instances it holds; where several processes train together, all their buffers together.
        max_bytes: the most memory its storage may take, together too; lowers the capacity where instances are large.
        seed: of its draws.
        journal: notes its changes, so that those of a failed step can be taken back.
    """

    def __init__(self, capacity: int, max_bytes: int, seed: int = 0, journal: Journal | None = None) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"buffer_size must be a positive number of samples, got {capacity!r}")
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"buffer_bytes must be a positive number of bytes, got {max_bytes!r}")
        self.capacity = -(-capacity // processes())
        self.max_bytes = -(-max_bytes // processes())
        self._journal = journal or Journal()
        self._random = np.random.default_rng(seed)
        self._storage: list[Tensor] = []
        self._spec: Any = None  # how a batch's leaves go together
        self._leaves: list[Any] = []  # the latest batch's leaves that are no tensors, _TENSOR where one is
        self._classes: list[int] = []  # by slot
        self._rows: list[int | None] = []  # by slot
        self._slot_of_row: dict[int, int] = {}
        self._departed: list[int] = []  # rows
        self._slots_of_class: dict[int, list[int]] = {}
        self._place_in_class: list[int] = []  # by slot
        self._seen: dict[int, int] = {}  # how often the stream showed each class
        self._seen_total = 0

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, row: int) -> bool:
        return row in self._slot_of_row

    @property
    def nbytes(self) -> int:
        """Bytes of the storage allocated."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._storage)

    @property
    def rows(self) -> list[int]:
        """The dataset rows held, in no particular order; those that came without an index are left out."""
        return list(self._slot_of_row)

    def departed(self) -> list[int]:
        """The rows that it has let go of since this was last asked."""
        self._journal.keep(self, "_departed")
        departed, self._departed = self._departed, []
        return departed

    def class_counts(self) -> dict[int, int]:
        """How many instances of each class it holds."""
        return {label: len(slots) for label, slots in self._slots_of_class.items() if slots}

    def observe(self, classes: Iterable[int]) -> None:
        """Count the labels of a whole batch: P(y) is that of the stream, not of what is held out."""
        self._journal.keep(self, "_seen_total")
        for label, count in Counter(classes).items():
            self._journal.put(self._seen, label, self._seen.get(label, 0) + count)
            self._seen_total += count

    def shares(self, classes: Sequence[int]) -> dict[int, float]:
        """P(y) of the classes of a batch: each one's share of the stream, this batch included."""
        counts = Counter(classes)
        total = self._seen_total + len(classes)
        return {label: (self._seen.get(label, 0) + count) / total for label, count in counts.items()}

    def accepts(self, label: int, share: float, pending: int = 0, pending_label: int = 0) -> bool:
        """Whether one more of ``label``, of which the stream has ``share``, keeps the labels near P(y), besides
        ``pending`` more instances of which ``pending_label`` have this label."""
        held = len(self._slots_of_class.get(label, ())) + pending_label
        total = min(len(self) + pending + 1, self.capacity)
        return held < (1.0 + LABEL_TOLERANCE) * share * total + 1.0

    def check(self, batch: Any) -> tuple[list[Tensor], list[Any], Any]:
        """Refuse a batch whose instances cannot be stored beside those held.

        Returns:
            The batch :func:`flattened <_flattened>`.

        Raises:
            ValueError: for tensors with other shapes, dtypes, devices or nesting than the ones held, without one
                shared first dimension, or larger than the byte cap.
        """
        tensors, leaves, spec = _flattened(batch)
        batch_size(tensors)
        if not self._storage:
            self._capacity_for(tensors)
            return tensors, leaves, spec
        expected = [(tuple(held.shape[1:]), held.dtype, held.device) for held in self._storage]
        found = [(tuple(tensor.shape[1:]), tensor.dtype, tensor.device) for tensor in tensors]
        if spec != self._spec or expected != found:
            raise ValueError(
                "the instances of every batch must have the same shapes, dtypes and devices to share the validation "
                f"buffer: held {expected}, got {found}; pad inputs to one length, or pass validation="
            )
        return tensors, leaves, spec

    def insert(self, batch: Any, chosen: Sequence[int], classes: Sequence[int], rows: Sequence[int] | None) -> None:
        """Put instances of a batch in; a row already held is refreshed in place.

        Args:
            batch: any nesting of tensors with first dimension B (what is no tensor, or one without dimensions, is kept
                from the latest batch).
            chosen: which k instances.
            classes: their k classes.
            rows: their k dataset rows, or None.

        Raises:
            ValueError: as :meth:`check`.
        """
        tensors, leaves, spec = self.check(batch)
        self._journal.keep(self, "_leaves", "_spec", "capacity", "_storage")
        self._keep_random()
        self._leaves, self._spec = leaves, spec
        held_before = len(self)
        if not self._storage:
            self.capacity = self._capacity_for(tensors)
            self._storage = [tensor.new_empty((self.capacity, *tensor.shape[1:])) for tensor in tensors]
        slots: dict[int, int] = {}  # slot -> position in the batch; a slot taken twice keeps the later one
        for place, position in enumerate(chosen):
            slots[self._slot_for(classes[place], None if rows is None else rows[place])] = position
        if slots:
            to, of = move((torch.tensor(list(slots)), torch.tensor(list(slots.values()))), tensors[0].device)
            for held, tensor in zip(self._storage, tensors, strict=True):
                if min(slots) < held_before:
                    self._journal.keep_rows(held, to)
                held.index_copy_(0, to, tensor.detach().index_select(0, of))

    def draw(self, count: int) -> tuple[Any, list[int]]:
        """``min(count, len(self))`` different instances, uniformly, as a batch, and their slots (for :meth:`release`).

        Raises:
            RuntimeError: if the buffer is empty.
        """
        if not len(self):
            raise RuntimeError("the validation buffer is empty: no instance has been sent to validation yet")
        self._keep_random()
        slots = self._random.choice(len(self), size=min(count, len(self)), replace=False, shuffle=False)
        index = move(torch.from_numpy(slots), self._storage[0].device)
        return self._batch_of([tensor.index_select(0, index) for tensor in self._storage]), slots.tolist()

    def release(self, slots: Iterable[int], keep: int = 1) -> int:
        """Drop instances by slot, but never below ``keep`` of them; returns how many were dropped."""
        released = 0
        for slot in sorted(set(slots), reverse=True):  # the last slot moves into a hole: go from the back
            if len(self) <= keep:
                break
            self._drop(slot)
            released += 1
        return released

    def release_rows(self, rows: Iterable[int], keep: int = 1) -> int:
        """Drop instances by dataset row; rows not held are passed over."""
        return self.release([self._slot_of_row[row] for row in rows if row in self._slot_of_row], keep)

    def _batch_of(self, tensors: Sequence[Tensor]) -> Any:
        remaining = iter(tensors)
        return pytree.tree_unflatten(
            [next(remaining) if leaf is _TENSOR else leaf for leaf in self._leaves], self._spec
        )

    def _capacity_for(self, tensors: Sequence[Tensor]) -> int:
        per_sample = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        capacity = min(self.capacity, self.max_bytes // max(per_sample, 1))
        if capacity < 1:
            raise ValueError(f"buffer_bytes={self.max_bytes} is less than one instance takes ({per_sample}); raise it")
        return capacity

    def _slot_for(self, label: int, row: int | None) -> int:
        if row is not None and row in self._slot_of_row:
            slot = self._slot_of_row[row]
            self._leave_class(slot)
        elif len(self) < self.capacity:
            slot = len(self)
            self._journal.append(self._classes, label)
            self._journal.append(self._rows, None)
            self._journal.append(self._place_in_class, 0)
        else:
            slot = self._replaceable(label)
            self._leave_class(slot)
            self._forget_row(slot)
        self._enter_class(slot, label)
        self._journal.put(self._rows, slot, row)
        if row is not None:
            self._journal.put(self._slot_of_row, row, slot)
        return slot

    def _replaceable(self, label: int) -> int:
        own = self._slots_of_class.get(label, [])
        share = self._seen.get(label, 0) / max(self._seen_total, 1)
        if own and len(own) >= share * len(self):
            return own[int(self._random.integers(len(own)))]
        return int(self._random.integers(len(self)))

    def _keep_random(self) -> None:
        if self._journal.recording:
            generator = self._random.bit_generator
            self._journal.note(setattr, generator, "state", generator.state)

    def _enter_class(self, slot: int, label: int) -> None:
        if label not in self._slots_of_class:
            self._journal.put(self._slots_of_class, label, [])
        slots = self._slots_of_class[label]
        self._journal.put(self._classes, slot, label)
        self._journal.put(self._place_in_class, slot, len(slots))
        self._journal.append(slots, slot)

    def _leave_class(self, slot: int) -> None:
        slots = self._slots_of_class[self._classes[slot]]
        last = self._journal.pop(slots)
        if last != slot:
            place = self._place_in_class[slot]
            self._journal.put(slots, place, last)
            self._journal.put(self._place_in_class, last, place)

    def _forget_row(self, slot: int) -> None:
        row = self._rows[slot]
        if row is not None:
            self._journal.delete(self._slot_of_row, row)
            self._journal.append(self._departed, row)

    def _drop(self, slot: int) -> None:
        self._leave_class(slot)
        self._forget_row(slot)
        last = len(self) - 1
        if slot != last:
            for tensor in self._storage:
                self._journal.note(operator.setitem, tensor, slot, tensor[slot].clone())
                tensor[slot] = tensor[last]
            self._journal.put(self._slots_of_class[self._classes[last]], self._place_in_class[last], slot)
            for by_slot in (self._classes, self._place_in_class, self._rows):
                self._journal.put(by_slot, slot, by_slot[last])
            row = self._rows[slot]
            if row is not None:
                self._journal.put(self._slot_of_row, row, slot)
        for by_slot in (self._classes, self._place_in_class, self._rows):
            self._journal.pop(by_slot)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in types that ``torch.load(weights_only=True)`` reads."""
        held = self._batch_of([tensor[: len(self)].clone() for tensor in self._storage]) if self._storage else None
        return {
            "capacity": self.capacity,
            "held": held,
            "classes": list(self._classes),
            "rows": list(self._rows),
            "slots_of_class": {label: list(slots) for label, slots in self._slots_of_class.items()},
            "seen": dict(self._seen),
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Put back what :meth:`state_dict` gave, with its tensors on ``device``.

        Raises:
            ValueError: if its parts do not fit each other or the byte cap. Nothing has changed then.
        """
        capacity, classes, rows = whole(state["capacity"], "capacity", 1), list(state["classes"]), list(state["rows"])
        slots_of_class = {label: list(slots) for label, slots in state["slots_of_class"].items()}
        known = [row for row in rows if row is not None]
        if len(rows) != len(classes) or len(classes) > capacity or len(set(known)) != len(known):
            raise ValueError(f"the buffer's {len(classes)} classes and {len(rows)} rows do not fit capacity={capacity}")
        for number in (*classes, *known, *state["seen"]):
            whole(number, "a class or row of the buffer", None)
        for count in state["seen"].values():
            whole(count, "how often a class was seen")
        placed = [(slot, label) for label, slots in slots_of_class.items() for slot in slots]
        if sorted(placed) != list(enumerate(classes)):
            raise ValueError("the buffer's slots_of_class contradict its classes")
        generator = np.random.default_rng()
        generator.bit_generator.state = state["random"]
        tensors, leaves, spec = _flattened(move(state["held"], device))
        if (state["held"] is None and classes) or any(tensor.shape[:1] != (len(classes),) for tensor in tensors):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise ValueError(f"the buffer must hold {len(classes)} instances, got tensors of shapes {shapes}")
        per_sample = sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors)
        if (capacity - 1) * per_sample > self.max_bytes:  # dealt out among processes, one may have one more
            raise ValueError(
                f"the state's capacity={capacity} instances take {capacity * per_sample} bytes, more than "
                f"buffer_bytes={self.max_bytes}"
            )
        storage = [tensor.new_empty((capacity, *tensor.shape[1:])) for tensor in tensors]
        for kept, tensor in zip(storage, tensors, strict=True):
            kept[: len(classes)] = tensor

        self.capacity, self._random = capacity, generator
        self._storage, self._leaves, self._spec = storage, leaves, spec
        self._classes, self._rows, self._slots_of_class = classes, rows, slots_of_class
        self._place_in_class = [0] * len(classes)
        for slots in slots_of_class.values():
            for place, slot in enumerate(slots):
                self._place_in_class[slot] = place
        self._slot_of_row = {row: slot for slot, row in enumerate(rows) if row is not None}
        self._seen = dict(state["seen"])
        self._seen_total = sum(self._seen.values())
        self._departed = []


def _flattened(batch: Any) -> tuple[list[Tensor], list[Any], Any]:
    """The tensors of a batch, its leaves with a placeholder for each tensor, and how the leaves go together."""
    leaves, spec = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if is_by_instance(leaf)]
    return tensors, [_TENSOR if is_by_instance(leaf) else leaf for leaf in leaves], spec


class Quota:
    """Keeps the number sent to validation within [δ/2, 3δ/2] of the stream, whatever the splitter says.

    Fractions of an instance are carried from batch to batch, so small batches are served too. One instance always
    stays on the training side: a batch can only be trained on if it has one.
    """

    def __init__(self, val_fraction: float) -> None:
        self.val_fraction = val_fraction
        self._low_carry = 1.0  # the first batch sends one at least: the buffer is never empty after it
        self._high_carry = 1.0

    def bounds(self, size: int) -> tuple[int, int]:
        """The least and the most of a batch of ``size`` instances that may go to validation."""
        low = min(math.floor(0.5 * self.val_fraction * size + self._low_carry), size - 1)
        high = min(math.floor(1.5 * self.val_fraction * size + self._high_carry), size - 1)
        return max(low, 0), max(high, 0)

    def spend(self, size: int, sent: int) -> None:
        """Record that ``sent`` of ``size`` went; what could not be sent yet is owed, up to one batch."""
        self._low_carry = min(max(0.5 * self.val_fraction * size + self._low_carry - sent, 0.0), float(size))
        self._high_carry = min(max(1.5 * self.val_fraction * size + self._high_carry - sent, 0.0), 1.0)

    def state_dict(self) -> dict[str, float]:
        return {"low_carry": self._low_carry, "high_carry": self._high_carry}

    def load_state_dict(self, state: dict[str, float]) -> None:
        low, high = float(state["low_carry"]), float(state["high_carry"])
        if not (0.0 <= low < math.inf and 0.0 <= high <= 1.0):
            raise ValueError(f"the quota's low_carry must be finite, high_carry in [0, 1], got {low} and {high}")
        self._low_carry, self._high_carry = low, high

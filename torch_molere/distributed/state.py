"""A reweighter in checkpoints of :mod:`torch.distributed.checkpoint`, for any number of ranks later."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_molere.calls import move
from torch_molere.distributed.collectives import rank, ranks
from torch_molere.reweighter import MetaReweighter
from torch_molere.validation.buffer import ValidationBuffer

OF_EACH_RANK = ("store", "quota", "seen", "pass", "position")
"""What each rank has of its own in the validation source; all else is the same everywhere."""

Part = dict[str, Any]
"""These entries of one rank."""


class DistributedState:
    """The states of a reweighter in all ranks, as one entry of a distributed checkpoint.

    ``dcp.save({"model": ..., "reweighter": DistributedState(reweighter)}, checkpoint_id=folder)`` and the same with
    ``dcp.load``. As many ranks as saved go on bit for bit. Among another number of them the instances in the validation
    buffers are dealt out anew.

    Args:
        reweighter: in every rank.
    """

    def __init__(self, reweighter: MetaReweighter) -> None:
        self.reweighter = reweighter

    def state_dict(self) -> dict[str, bytes]:
        """One entry, the same in every rank, all of which must call this."""
        state = move(self.reweighter.state_dict(), torch.device("cpu"))
        validation = state["validation"]
        part = {name: validation.pop(name) for name in OF_EACH_RANK if name in validation}
        parts: list[Part] = [part]
        if ranks() > 1:
            parts = [{}] * ranks()
            dist.all_gather_object(parts, part)
        packed = io.BytesIO()
        torch.save({"state": state, "parts": parts}, packed)
        return {"packed": packed.getvalue()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        """Take this rank's part of what :meth:`state_dict` gave.

        Raises:
            ValueError: as :meth:`MetaReweighter.load_state_dict`.
        """
        packed = torch.load(io.BytesIO(state["packed"]), map_location="cpu", weights_only=True)
        source = self.reweighter.validation
        room = source.store.capacity_for if isinstance(source, ValidationBuffer) else len
        part = dealt(packed["parts"], rank(), ranks(), room)
        whole = packed["state"]
        validation = {**whole["validation"], **part}
        self.reweighter.load_state_dict({**whole, "rank": [rank(), ranks()], "validation": validation})


def dealt(parts: Sequence[Part], number: int, count: int, room: Callable[[Sequence[Any]], int]) -> Part:
    """The part of the rank ``number`` of ``count``, of what ``len(parts)`` ranks had.

    Args:
        parts: of the ranks that saved.
        number, count: this rank, of how many.
        room: how many instances of some columns a buffer takes.
    """
    if len(parts) == count:
        return parts[number]
    part = dict(parts[0])
    if "store" in part:
        part["store"] = _dealt_store([part["store"] for part in parts], number, count, room)
        part["quota"] = [sum(carries) / len(parts) for carries in zip(*(part["quota"] for part in parts), strict=True)]
        seen: dict[int, int] = {}
        for other in parts:
            for label, times in other["seen"].items():
                seen[label] = seen.get(label, 0) + times
        part["seen"] = {label: t * (number + 1) // count - t * number // count for label, t in seen.items()}
    return part


def _dealt_store(
    stores: Sequence[dict[str, Any]], number: int, count: int, room: Callable[[Sequence[Any]], int]
) -> dict[str, Any]:
    """The ``number``-th of ``count`` runs of the instances of all stores, one after the other, each row once."""
    filled = [store for store in stores if store["rows"]]
    if not filled:
        return stores[0]
    rows = [row for store in filled for row in store["rows"]]
    classes = [label for store in filled for label in store["classes"]]
    times = [time for store in filled for time in store["times"]]
    columns = [_joined(alike) for alike in zip(*(store["columns"] for store in filled), strict=True)]
    first = {row: place for place, row in reversed(list(enumerate(rows)))}
    places = [place for place, row in enumerate(rows) if row is None or first[row] == place]
    own = places[len(places) * number // count : len(places) * (number + 1) // count][: room(columns)]
    return {
        "columns": [c[own] if isinstance(c, Tensor) else [c[place] for place in own] for c in columns],
        "rows": [rows[place] for place in own],
        "classes": [classes[place] for place in own],
        "times": [times[place] for place in own],
    }


def _joined(columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], Tensor):
        return torch.cat(list(columns))
    return [item for column in columns for item in column]

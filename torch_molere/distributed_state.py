"""A reweighter in checkpoints of :mod:`torch.distributed.checkpoint`, for any number of processes later."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_molere.distributed import processes
from torch_molere.evaluation import is_by_instance, move
from torch_molere.reweighter import MetaReweighter

Part = dict[str, Any]
"""What each process has of its own: its validation buffer, its quota, what it has not told yet, and its history."""


class DistributedState:
    """The states of a reweighter in all processes, as one entry of a distributed checkpoint.

    ``dcp.save({"model": ..., "reweighter": DistributedState(reweighter)}, checkpoint_id=folder)`` and the same with
    ``dcp.load``. As many processes as saved go on bit for bit; among another number of them the validation instances
    are dealt out anew, and the sums of the history go to the first.

    Args:
        reweighter: in every process.
    """

    def __init__(self, reweighter: MetaReweighter) -> None:
        self.reweighter = reweighter

    def state_dict(self) -> dict[str, bytes]:
        """One entry, the same in every process, all of which must call this."""
        state = move(self.reweighter.state_dict(), torch.device("cpu"))
        part: Part = {"history": state.pop("history")}
        if state["holdout"] is not None:
            part |= {name: state["holdout"].pop(name) for name in ("buffer", "quota")}
            part["waiting"] = state["holdout"]["overfitting"].pop("waiting")
        parts = [part]
        if processes() > 1:
            parts = [{}] * processes()
            dist.all_gather_object(parts, part)
        packed = io.BytesIO()
        torch.save({"state": state, "parts": parts}, packed)
        return {"packed": packed.getvalue()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        """Take this process's part of what :meth:`state_dict` gave.

        Raises:
            ValueError: as :meth:`MetaReweighter.load_state_dict`.
        """
        packed = torch.load(io.BytesIO(state["packed"]), map_location="cpu", weights_only=True)
        rank = dist.get_rank() if processes() > 1 else 0
        part = dealt(packed["parts"], rank, processes())
        whole = {**packed["state"], "history": part["history"]}
        if whole["holdout"] is not None:
            overfitting = {**whole["holdout"]["overfitting"], "waiting": part["waiting"]}
            own = {"buffer": part["buffer"], "quota": part["quota"], "overfitting": overfitting}
            whole["holdout"] = {**whole["holdout"], **own}
        self.reweighter.load_state_dict(whole)


def dealt(parts: Sequence[Part], rank: int, number: int) -> Part:
    """The part of one of ``number`` processes, of what ``len(parts)`` processes had."""
    if len(parts) == number:
        return parts[rank]
    part: Part = {"history": _history([part["history"] for part in parts], rank)}
    if "buffer" in parts[0]:
        quotas = [part["quota"] for part in parts]
        part["quota"] = {name: sum(quota[name] for quota in quotas) / len(quotas) for name in quotas[0]}
        part["waiting"] = [entry for part in parts for entry in part["waiting"]] if rank == 0 else []
        part["buffer"] = _buffer([part["buffer"] for part in parts], rank, number)
    return part


def _history(parts: Sequence[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
    sums = [part["sums"] for part in parts]
    total = sums[0].new_zeros(max(map(len, sums)), sums[0].shape[1])
    for own in sums:
        total[: len(own)] += own
    return {"sums": total if rank == 0 else total[:0]}


def _buffer(parts: Sequence[dict[str, Any]], rank: int, number: int) -> dict[str, Any]:
    """The rank-th of ``number`` runs of the instances of all parts, one after the other."""
    classes = [label for part in parts for label in part["classes"]]
    rows = [row for part in parts for row in part["rows"]]
    own = slice(len(classes) * rank // number, len(classes) * (rank + 1) // number)
    slots_of_class: dict[int, list[int]] = {}
    for slot, label in enumerate(classes[own]):
        slots_of_class.setdefault(label, []).append(slot)
    seen: dict[int, int] = {}
    for part in parts:
        for label, count in part["seen"].items():
            seen[label] = seen.get(label, 0) + count
    capacity = sum(part["capacity"] for part in parts)
    stream = np.random.default_rng([parts[0]["random"]["state"]["state"], rank])
    return {
        "capacity": max(capacity // number, len(classes[own])),
        "held": _batch([part["held"] for part in parts if part["held"] is not None], own),
        "classes": classes[own],
        "rows": rows[own],
        "slots_of_class": slots_of_class,
        "seen": {label: count * (rank + 1) // number - count * rank // number for label, count in seen.items()},
        "random": stream.bit_generator.state,
    }


def _batch(batches: Sequence[Any], own: slice) -> Any:
    """Rows of several batches of one nesting, one after the other; None of none."""
    if not batches:
        return None
    leaves, spec = zip(*map(pytree.tree_flatten, batches), strict=True)
    alike = zip(*leaves, strict=True)
    joined = [torch.cat(leaf)[own] if is_by_instance(leaf[0]) else leaf[0] for leaf in alike]
    return pytree.tree_unflatten(joined, spec[0])

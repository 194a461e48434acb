"""Several ranks that train one model together: the meta-gradient is that of the global batch.

Without :mod:`torch.distributed`, or with one rank, every function here is the identity. What each message costs is its
latency, so there are few: one in a step without a meta-update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where there is one."""
    return dist.get_rank() if ranks() > 1 else 0


class Gather:
    """Gathers rows of all ranks, whose numbers may differ, in one collective once the largest number is known."""

    def __init__(self) -> None:
        self._capacity = 0

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """The rows of all ranks in the order of their ranks, and how many each has. Reads the device once.

        Args:
            rows: ``(B, k)`` long; B may differ between ranks, k may not.

        Returns:
            ``(N, k)`` on the device, the same on the CPU, and B of each rank.
        """
        while True:
            message = rows.new_zeros(1 + self._capacity, rows.shape[1])
            message[0, 0] = len(rows)
            message[1 : 1 + min(len(rows), self._capacity)] = rows[: self._capacity]
            parts = [torch.empty_like(message) for _ in range(ranks())]
            dist.all_gather(parts, message)
            known = torch.stack(parts).cpu()
            sizes = known[:, 0, 0].tolist()
            if max(sizes) <= self._capacity:
                break
            self._capacity = max(sizes)  # every rank sees the same sizes and asks again
        told = [torch.cat([part[1 : 1 + size] for part, size in zip(p, sizes, strict=True)]) for p in (parts, known)]
        return told[0], told[1], sizes


def own_slice(sizes: Sequence[int]) -> slice:
    """Where this rank's rows are among those of all ranks."""
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


def gathered(rows: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, slice]:
    """The rows of all ranks in the order of their ranks, and where this rank's own are.

    Only the own rows carry gradients: whatever every rank computes alike from all rows, the sum over ranks of its
    derivatives by own rows is the whole derivative.

    Args:
        rows: ``(B, ...)`` floating or integers; B may differ between ranks.
        sizes: B of each rank; None to ask for it, in one more message.
    """
    if ranks() == 1:
        return rows, slice(0, len(rows))
    if sizes is None:
        own = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(own) for _ in range(ranks())]
        dist.all_gather(counts, own)
        sizes = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    whole = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    whole[rank()] = rows
    return torch.cat(whole), own_slice(sizes)


def gathered_columns(*columns: Tensor) -> list[Tensor]:
    """:func:`gathered` for ``(B,)`` columns of one batch together, in the first one's dtype."""
    if ranks() == 1:
        return list(columns)
    whole, _ = gathered(torch.stack([column.to(columns[0].dtype) for column in columns], dim=1))
    return list(whole.unbind(1))


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any rank."""
    if ranks() == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def averaged(tensors: Sequence[Tensor | None], weight: float) -> list[Tensor | None]:
    """``Σ weight · tensor / Σ weight`` over the ranks; None, which all ranks have at the same places, stays None."""
    given = [tensor for tensor in tensors if tensor is not None]
    if ranks() == 1 or not given:
        return list(tensors)
    dtype = torch.promote_types(given[-1].dtype, torch.float)
    *found, total = summed(
        [*(tensor * weight for tensor in given), torch.tensor(weight, dtype=dtype).to(given[-1].device)]
    )
    means = iter(found)
    return [None if tensor is None else next(means) / total.to(tensor.dtype) for tensor in tensors]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the ranks, in one message for each dtype."""
    if ranks() == 1:
        return list(tensors)
    found: dict[int, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors}:
        alike = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        message = torch.cat([tensors[place].detach().flatten() for place in alike])
        dist.all_reduce(message)
        parts = message.split([tensors[place].numel() for place in alike])
        found |= {place: part.view(tensors[place].shape) for place, part in zip(alike, parts, strict=True)}
    return [found[place] for place in range(len(tensors))]


def summed_gradients(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sum over the ranks of the gradients of a network that every rank holds; they may be sparse."""
    if ranks() == 1:
        return list(gradients)
    found: list[Tensor | None] = list(gradients)
    dense = [place for place, gradient in enumerate(found) if gradient is not None and not gradient.is_sparse]
    for place, total in zip(dense, summed([g for g in found if g is not None and not g.is_sparse]), strict=True):
        found[place] = total
    for place, gradient in enumerate(found):
        if gradient is not None and gradient.is_sparse:
            local = gradient.coalesce()
            rows, values = gathered(local.indices().T)[0].T, gathered(local.values())[0]
            found[place] = torch.sparse_coo_tensor(rows, values, local.shape, check_invariants=False)
    return found


def broadcast(module: nn.Module) -> None:
    """Start every rank from the first one's parameters and buffers."""
    if ranks() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)

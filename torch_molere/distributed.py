"""Several processes that train one model together (DDP): the meta-gradient is that of the global batch.

Without :mod:`torch.distributed`, or with one process, every function here is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes in the order of their ranks, and where this process's own are.

    Only the own rows carry gradients: whatever every process computes alike from all rows, the sum over processes of
    its derivatives by own rows is the whole derivative. Numbers of rows may differ between processes.
    """
    if processes() == 1:
        return rows, slice(0, len(rows))
    rank = dist.get_rank()
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=_sent(rows.dtype), device=rows.device)
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    whole = [part[:size].to(rows.dtype) for part, size in zip(parts, sizes, strict=True)]
    whole[rank] = rows
    start = sum(sizes[:rank])
    return torch.cat(whole), slice(start, start + len(rows))


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    if processes() == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def everyones(numbers: Sequence[int], device: torch.device) -> tuple[list[list[int]], int]:
    """The integers that each process gives, by rank, and this process's rank."""
    if processes() == 1:
        return [list(numbers)], 0
    rank = dist.get_rank()
    whole, _ = gathered(torch.tensor([(rank, number) for number in numbers], device=device).reshape(-1, 2).long())
    told: list[list[int]] = [[] for _ in range(processes())]
    for by, number in whole.tolist():
        told[by].append(number)
    return told, rank


def averaged(tensors: Sequence[Tensor | None], share: float) -> list[Tensor | None]:
    """``Σ share · tensor`` over the processes, whose shares sum to one; None stays None."""
    if processes() == 1:
        return list(tensors)
    found = iter(summed([tensor * share for tensor in tensors if tensor is not None]))
    return [None if tensor is None else next(found) for tensor in tensors]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the processes, in one message for each dtype: latency counts, not size."""
    if processes() == 1:
        return list(tensors)
    found: dict[int, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors}:
        alike = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        message = torch.cat([tensors[place].detach().flatten() for place in alike])
        dist.all_reduce(message)
        parts = message.split([tensors[place].numel() for place in alike])
        found |= {place: part.view(tensors[place].shape) for place, part in zip(alike, parts, strict=True)}
    return [found[place] for place in range(len(tensors))]


def sum_gradients(module: nn.Module) -> None:
    """Add up the gradients of a network that every process holds."""
    if processes() == 1:
        return
    dense = []
    for parameter in module.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            local = parameter.grad.coalesce()
            rows, values = gathered(local.indices().T)[0].T, gathered(local.values())[0]
            parameter.grad = torch.sparse_coo_tensor(rows, values, local.shape, check_invariants=False)
        else:
            dense.append(parameter)
    for parameter, gradient in zip(dense, summed([p.grad for p in dense if p.grad is not None]), strict=True):
        parameter.grad = gradient


def broadcast(module: nn.Module) -> None:
    """Start every process from the first one's parameters and buffers."""
    if processes() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def _sent(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype

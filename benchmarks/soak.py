"""Many steps of a small model, and what of the process grows with them: ``python -m benchmarks.soak``.

The loop does all that a loop may do: whole steps and ones of its own, accumulated gradients, evaluation, refused
batches, failures in the middle of a step and checkpoints.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.provenance import provenance
from benchmarks.store import write
from torch_molere import MetaReweighter, ValidationBuffer


def soak(steps: int, looks: int = 10, report: Callable[[dict[str, int]], None] | None = None) -> list[dict[str, int]]:
    """Train for ``steps`` optimizer steps; what the process holds at ``looks`` moments evenly apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    buffer = ValidationBuffer(capacity=64)
    reweighter = MetaReweighter(model, optimizer, validation=buffer, warmup_steps=50, hypergradient="finite")
    x = torch.randn(256, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    found = []
    while reweighter.steps < steps:
        step = reweighter.steps
        rows = torch.randint(256, (8,))
        if step % 10 == 9:
            _own_loop(model, optimizer, reweighter, x[rows], y[rows])
        else:
            reweighter.step((x[rows], y[rows], rows) if step % 2 else (x[rows], y[rows]))
        if step % 100 == 50:
            _refused(reweighter, x[rows], y[rows])
            with torch.no_grad():
                reweighter.loss(model(x[rows]), y[rows])
        if step % 1000 == 500:
            _resumed(model, optimizer, reweighter)
        if reweighter.steps % max(steps // looks, 1) == 0:
            found.append(_held(reweighter))
            if report is not None:
                report(found[-1])
    return found


def _resumed(*parts: Any) -> None:
    """Every state written and read back."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)


def _own_loop(model: nn.Module, optimizer: Any, reweighter: MetaReweighter, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    for part in torch.arange(len(x)).chunk(2):
        (reweighter.loss(model(x[part]), y[part]) / 2).backward()
    reweighter.loss(model(x), y)  # a loss that nothing follows
    optimizer.step()


def _refused(reweighter: MetaReweighter, x: Tensor, y: Tensor) -> None:
    """A batch with a NaN, and a failure in the backward pass."""
    with suppress(FloatingPointError):
        reweighter.step((x * torch.nan, y))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    hook = reweighter.model[-1].register_full_backward_hook(fail)  # type: ignore[index,union-attr]
    with suppress(torch.OutOfMemoryError):
        reweighter.step((x, y))
    hook.remove()


def _held(reweighter: MetaReweighter) -> dict[str, int]:
    """Counts of what could leak; -1 where the system does not tell."""
    gc.collect()
    model, (optimizer,) = reweighter.model, reweighter.optimizers
    modules = list(model.modules())
    return {
        "step": reweighter.steps,
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "objects": len(gc.get_objects()),
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in modules)
        + len(optimizer._optimizer_step_pre_hooks)
        + len(optimizer._optimizer_step_post_hooks)
        + sum(len(p._backward_hooks or ()) for p in model.parameters()),
        "files": len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else -1,
        "resident_bytes": _resident_bytes(),
    }


def _resident_bytes() -> int:
    if not os.path.exists("/proc/self/statm"):
        return -1
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100_000,
    looks: Annotated[int, typer.Option(min=1, help="How often to count what is held.")] = 20,
    out: Annotated[Path, typer.Option(help="Where the counts go.")] = Path("benchmarks/results/soak-cpu.json"),
) -> None:
    """Train for very many steps on one CPU thread and store what the process holds along the way."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = soak(steps, looks, lambda held: print(held, flush=True))
    stored = provenance("benchmarks.soak", sys.argv[1:], torch.device("cpu"))
    write(out, json.dumps({**stored, "seconds": round(time.perf_counter() - start), "held": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

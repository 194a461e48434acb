"""What training by several processes costs: ``python -m benchmarks.ranks``.

For each number of processes, on one machine (gloo, one thread each): the time of a MOLERE step relative to a plain one
of the same wrapped model, taken interleaved; the messages that a step adds, and their bytes; the memory of a process.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import build
from benchmarks.provenance import provenance
from benchmarks.speed import PERIOD, RESULTS, rounds
from benchmarks.store import write
from torch_molere import MetaReweighter
from torch_molere.distributed.collectives import rank

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 120)

Row = tuple[str, int, float]
"""quantity, round, value"""


class Messages(TorchDispatchMode):
    """Counts the collective operations inside, and the bytes that this process gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in func.__name__:
            gathers = "gather" in func.__name__ or "scatter" in func.__name__  # (outputs, inputs, …)
            given = args[1] if gathers else args[0]
            self.count += 1
            self.nbytes += sum(t.numel() * t.element_size() for t in ([given] if isinstance(given, Tensor) else given))
        return func(*args, **(kwargs or {}))


def wrapped(model: nn.Module, wrap: str) -> Any:
    """A model as DDP or FSDP2 trains it, each of its children that has parameters sharded for itself."""
    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def contender(name: str, wrap: str, model: str, batch_size: int) -> tuple[Callable[[], None], MetaReweighter | None]:
    """A training step of one of the two, on random images; MOLERE's at the default ``every``, after warm-up."""
    torch.manual_seed(0)
    network = wrapped(build(model, (3, 32, 32), 10), wrap)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(rank())
    inputs, targets = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    first = rank() * 10 * batch_size
    number = 0

    if name == "ERM":

        def plain() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()

        return plain, None

    reweighter = MetaReweighter(network, optimizer, warmup_steps=PERIOD, every=PERIOD)

    def step() -> None:
        nonlocal number
        number += 1
        rows = first + (number % 10) * batch_size + torch.arange(batch_size)
        optimizer.zero_grad()
        reweighter.loss(network(inputs), targets, rows).backward()
        optimizer.step()

    for _ in range(4 * PERIOD):
        step()
    return step, reweighter


def timed(wrap: str, model: str, batch_size: int, count: int) -> list[Row]:
    """Seconds of a step of both, interleaved."""
    steps = {name: contender(name, wrap, model, batch_size)[0] for name in ("ERM", "MOLERE")}
    return [(f"seconds, {name}", number, seconds) for number, name, seconds in rounds(steps, count, "cpu")]


def told(wrap: str, model: str, batch_size: int) -> list[Row]:
    """The messages of plain training, and what a step adds to them: one without and one with a meta-update."""
    plain, _ = contender("ERM", wrap, model, batch_size)
    for _ in range(PERIOD):
        plain()
    with Messages() as base:
        plain()
    step, reweighter = contender("MOLERE", wrap, model, batch_size)
    assert reweighter is not None
    rows: list[Row] = [("messages, plain", 0, base.count), ("bytes, plain", 0, base.nbytes)]
    for _ in range(PERIOD):
        with Messages() as messages:
            step()
        assert reweighter.result is not None
        kind = "a step" if reweighter.result.val_loss is None else "a step with a meta-update"
        rows += [
            (f"messages, {kind}", len(rows), messages.count - base.count),
            (f"bytes, {kind}", len(rows), messages.nbytes - base.nbytes),
        ]
    return rows


def remembered(wrap: str, model: str, batch_size: int, name: str) -> list[Row]:
    """The peak memory of a process that trains."""
    step, _ = contender(name, wrap, model, batch_size)
    for _ in range(2 * PERIOD):
        step()
    return [(f"peak, {name}", 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)]


def _rank(
    number_of_rank: int, folder: str, number: int, measure: Callable[..., list[Row]], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number_of_rank, world_size=number)
    rows = measure(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    if number_of_rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))


def measured(number: int, measure: Callable[..., list[Row]], *arguments: Any) -> list[Row]:
    """What the first of ``number`` processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, number, measure, arguments), nprocs=number)
        return [tuple(row) for row in json.loads(Path(folder, "rows.json").read_text())]


def summarised(frame: pd.DataFrame) -> pd.DataFrame:
    """For each wrapper and number of processes: time and memory relative to plain training, messages and bytes."""
    rows = []
    for (wrap, number), part in frame.groupby(["wrap", "ranks"], sort=False):
        values = {name: own.sort_values("round").value.to_numpy() for name, own in part.groupby("quantity")}
        ratios = pd.Series(values["seconds, MOLERE"] / values["seconds, ERM"])
        row: dict[str, Any] = {"wrap": wrap, "ranks": number, "time": ratios.median()}
        row |= {"time_low": ratios.quantile(0.25), "time_high": ratios.quantile(0.75)}
        for kind, short in (("plain", "plain"), ("a step", "step"), ("a step with a meta-update", "meta")):
            row |= {
                f"{short}_{name}": float(pd.Series(values[f"{name}, {kind}"]).median())
                for name in ("messages", "bytes")
            }
        row["memory"] = values["peak, MOLERE"][0] / values["peak, ERM"][0]
        rows.append(row)
    return pd.DataFrame(rows)


@app.command()
def ranks(
    numbers: Annotated[str, typer.Option("--ranks", help="Comma-separated numbers of processes.")] = "1,2,4",
    wraps: Annotated[str, typer.Option("--wrap", help="Comma-separated: ddp, fsdp.")] = "ddp,fsdp",
    model: Annotated[str, typer.Option(help="Of benchmarks.models.")] = "conv",
    batch_size: Annotated[int, typer.Option(min=2, help="Of each process.")] = 32,
    count: Annotated[int, typer.Option("--rounds", min=1)] = 9,
    out: Annotated[Path, typer.Option(help="Folder of the stored results.")] = RESULTS,
) -> None:
    """What several processes on one machine cost: time, messages and memory beside plain training."""
    rows: list[tuple[Any, ...]] = []
    for wrap in wraps.split(","):
        for number in map(int, numbers.split(",")):
            setting = (wrap, model, batch_size)
            found = measured(number, timed, *setting, count) + measured(number, told, *setting)
            for name in ("ERM", "MOLERE"):
                found += measured(number, remembered, *setting, name)
            rows += [(wrap, number, *row) for row in found]
            console.print(f"{wrap}, {number} processes: measured")
    frame = pd.DataFrame(rows, columns=["wrap", "ranks", "quantity", "round", "value"])
    out.mkdir(parents=True, exist_ok=True)
    write(out / "ranks-cpu.csv", frame.to_csv(index=False, float_format="%.6g"))
    config = provenance("benchmarks.ranks", sys.argv[1:], torch.device("cpu"))
    parameters = sum(parameter.numel() for parameter in build(model, (3, 32, 32), 10).parameters())
    config |= {"model": model, "parameters": parameters, "batch": batch_size, "threads": 1}
    write(out / "ranks-cpu.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    console.print(summarised(frame).round(2).to_string(index=False))


if __name__ == "__main__":
    app()

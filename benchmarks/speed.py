"""What a step costs beside plain training, ours and the peers'.

``python -m benchmarks.speed steps``, ``profile``, ``memory``, ``growth`` or ``error``; ``--help`` tells what each
measures.

Times are taken interleaved, every contender once a round in an order shuffled anew, so that a machine that drifts
drifts for all; figures are medians over the rounds of the ratio to plain training in the same round.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.contenders import CONTENDERS, Step, Task, erm, molere
from benchmarks.models import MLP, build
from benchmarks.profiling import WHOLE, seconds_by_part
from benchmarks.provenance import provenance
from benchmarks.results import write
from torch_molere import MetaReweighter, Samples, hypergradient

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 120)

PEERS = ("betty-ml", "torchopt", "higher")
PERIOD = 5
"""Steps timed at a go: one whole period of ``every=5``."""

LASTING = 3
"""Rounds that a contender lasts before it is made anew: where its tensors lie in memory costs or saves per cents."""

ALLOCATORS = {"glibc": {}, "handing back": {"MALLOC_MMAP_THRESHOLD_": str(2**18)}}
"""By name, the environment of a process: as it is, and with blocks of 256 KiB and more handed back once freed, so that
the peak is of what is needed and not of the gaps that small tensors leave between the activations of steps gone by."""

CHANNELS_LAST = "-channels-last"
"""After a model's name: the model itself and its images are in that order."""

Models = Annotated[
    str,
    typer.Option(
        help="Comma-separated: conv, resnet20, mlp, vit-tiny, wrn-28-10, resnet50; with -channels-last after the name, "
        "the model itself in that order."
    ),
]
Optimizers = Annotated[str, typer.Option(help="Comma-separated: sgd, adamw.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16: every contender's whole step under autocast.")]
Only = Annotated[list[str] | None, typer.Option(help="Only ERM and contenders with this in their name; repeatable.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Folder of the stored results.")]
RESULTS = Path("benchmarks/results")


def task_of(model: str, optimizer: str, device: str, batch: int = 128, validation: int | None = None) -> Task:
    """A task of one of the benchmark's models on random images (the cost does not depend on what they show)."""
    torch.manual_seed(0)
    shape, classes, network = _network(model.removesuffix(CHANNELS_LAST))
    sizes = (batch, batch if validation is None else validation)
    x, xv = (torch.randn(size, *shape, device=device) for size in sizes)
    if model.endswith(CHANNELS_LAST):
        network = network.to(memory_format=torch.channels_last)
        x, xv = (images.to(memory_format=torch.channels_last) for images in (x, xv))
    y, yv = (torch.randint(classes, (size,), device=device) for size in sizes)
    return Task(network.to(device), optimizer, (x, y), (xv, yv))


def _network(name: str) -> tuple[tuple[int, ...], int, nn.Module]:
    if name == "mlp":  # on the 1,600 features of an image, as in the studies
        return (1600,), 10, MLP(1600, 10, hidden=512)
    if name == "vit-tiny":
        return (3, 32, 32), 10, torchvision.models.VisionTransformer(32, 4, 12, 3, 192, 768, num_classes=10)
    if name == "resnet50":
        return (3, 224, 224), 1000, build(name, (3, 224, 224), 1000)
    return (3, 32, 32), 10, build(name, (3, 32, 32), 10)


def rounds(
    contenders: Mapping[str, Step], count: int, device: str, period: int = PERIOD, seed: int = 0
) -> Iterator[tuple[int, str, float]]:
    """``(round, contender, seconds a step)``, every contender once a round in random order, after one to warm up.

    A round takes ``period`` steps of each: a multiple of ``every``, so that all rounds have as many meta-updates.
    """
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    for number in range(-1, count):
        shuffle(order)
        for name in order:
            seconds = _seconds(contenders[name], device, period)
            if number >= 0:
                yield number, name, seconds


def rounds_anew(
    factories: Mapping[str, Callable[[Task], Step]], task: Task, count: int, device: str, period: int = PERIOD
) -> Iterator[tuple[int, str, float]]:
    """As :func:`rounds`, with contenders that are made anew every :data:`LASTING` rounds."""
    for first in range(0, count, LASTING):
        contenders, _ = made(factories, task)
        for number, name, seconds in rounds(contenders, min(LASTING, count - first), device, period, seed=first):
            yield first + number, name, seconds
        contenders.clear()  # before the next are made


def _seconds(step: Step, device: str, period: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(period):
        step()
    _wait(device)
    return (time.perf_counter() - start) / period


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def made(factories: Mapping[str, Callable[[Task], Step]], task: Task) -> tuple[dict[str, Step], dict[str, str]]:
    """The contenders that run here, each having taken a step, and the errors of those that do not."""
    steps, errors = {}, {}
    for name, factory in factories.items():
        try:
            step = factory(task)
            step()
        except Exception as error:  # a peer may fail in any way: its error goes into the table
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            steps[name] = step
    return steps, errors


def relative(frame: pd.DataFrame, keys: list[str], column: str = "seconds") -> pd.DataFrame:
    """Adds ``ratio`` of a column: to the contender ERM of the same round and setting."""
    base = frame[frame.contender == "ERM"].set_index([*keys, "round"])[column]
    index = pd.MultiIndex.from_frame(frame[[*keys, "round"]])
    return frame.assign(ratio=frame[column].to_numpy() / base.reindex(index).to_numpy())


def summary(frame: pd.DataFrame, keys: list[str], column: str = "seconds") -> pd.DataFrame:
    """Median and quartiles of the ratio, by setting and contender."""
    known = pd.CategoricalDtype([*CONTENDERS, *sorted(set(frame.contender) - set(CONTENDERS))], ordered=True)
    frame = relative(frame, keys, column).astype({"contender": known})
    grouped = frame.groupby([*keys, "contender"], sort=True, observed=True).ratio
    return grouped.quantile([0.25, 0.5, 0.75]).unstack().set_axis(["low", "median", "high"], axis=1).reset_index()


def _store(name: str, frame: pd.DataFrame, out: Path, device: str, also: dict[str, Any] | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"speed-{name}-{device}.csv", frame.to_csv(index=False, float_format="%.6g"))
    config = provenance("benchmarks.speed", sys.argv[1:], torch.device(device), PEERS)
    config |= {"threads": torch.get_num_threads()} | (also or {})
    write(out / f"speed-{name}-{device}.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _show(frame: pd.DataFrame, keys: list[str], title: str, column: str = "seconds") -> None:
    shown = summary(frame, keys, column)
    table = Table(*keys, "contender", "relative to ERM", "quartiles", title=title)
    for row in shown.itertuples(index=False):
        table.add_row(
            *(str(getattr(row, key)) for key in keys),
            row.contender,
            f"{row.median:.2f}",
            f"{row.low:.2f}–{row.high:.2f}",
        )
    console.print(table)


@app.command()
def steps(
    models: Models = "conv,resnet20",
    optimizers: Optimizers = "sgd,adamw",
    count: Annotated[int, typer.Option("--rounds", min=1)] = 11,
    batch: int = 128,
    precision: Precision = "fp32",
    only: Only = None,
    device: Device = "cpu",
    out: Out = RESULTS,
) -> None:
    """Time of one training step, and of one meta-gradient alone, for every contender."""
    chosen = _chosen(only)
    if precision == "bf16":
        chosen = {name: partial(_autocast, factory) for name, factory in chosen.items()}
    kind = "" if precision == "fp32" else f"-{precision}"
    for model in models.split(","):
        for optimizer in optimizers.split(","):
            task = task_of(model, optimizer, device, batch)
            running, errors = made(chosen, task)
            contenders = {name: chosen[name] for name in running}
            running.clear()
            measured = rounds_anew(contenders, task, count, device)
            progress = track(measured, f"{model}, {optimizer}", total=len(contenders) * count, console=console)
            rows = [(model, optimizer, name, number, seconds) for number, name, seconds in progress]
            frame = pd.DataFrame(rows, columns=["model", "optimizer", "contender", "round", "seconds"])
            settings = {"batch": batch, "precision": precision, "errors": errors}
            _store(f"steps-{model}-{optimizer}{kind}", frame, out, device, settings)
            _show(frame, ["model", "optimizer"], f"Time of a step, batch {batch}, {precision}, {device}")


def _autocast(factory: Callable[[Task], Step], task: Task) -> Step:
    """A contender whose step runs under autocast to bfloat16."""
    step = factory(task)
    return torch.autocast(task.batch[0].device.type, torch.bfloat16)(step)


def _chosen(only: list[str] | None) -> dict[str, Callable[[Task], Step]]:
    parts = ("ERM", *only) if only else ("",)
    return {name: factory for name, factory in CONTENDERS.items() if any(part in name for part in parts)}


@app.command("profile")
def profile_parts(
    models: Models = "conv,resnet20",
    optimizer: str = "sgd",
    count: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    every: Annotated[int, typer.Option(min=1)] = 1,
    batch: int = 128,
    out: Out = RESULTS,
) -> None:
    """Where the time of a MOLERE step goes on the CPU, by torch.profiler, relative to plain steps taken in turn."""
    for model in models.split(","):
        task = task_of(model, optimizer, "cpu", batch)
        plain, ours = erm(task), molere(task, every)
        rows = []
        for number in range(-1, count):  # the first to warm up
            parts = {"ERM": seconds_by_part(plain, PERIOD)[WHOLE], **seconds_by_part(ours, PERIOD)}
            if number >= 0:
                rows += [(model, optimizer, part, number, seconds) for part, seconds in parts.items()]
        frame = pd.DataFrame(rows, columns=["model", "optimizer", "contender", "round", "seconds"])
        _store(f"profile-{model}-{optimizer}", frame, out, "cpu", {"batch": batch, "every": every})
        _show(frame, ["model", "optimizer"], f"Parts of a step, every {every}, batch {batch}")


@app.command()
def memory(
    models: Models = "conv,resnet20",
    optimizer: str = "sgd",
    count: Annotated[int, typer.Option("--rounds", min=1)] = 1,
    batch: int = 128,
    only: Only = None,
    device: Device = "cpu",
    out: Out = RESULTS,
) -> None:
    """Peak memory of training, each contender in a process of its own; on the CPU by two ways to allocate it."""
    for model in models.split(","):
        rows, errors = [], {}
        allocators = ALLOCATORS if device == "cpu" else {"CUDA": {}}
        runs = list(itertools.product(range(count), allocators, _chosen(only)))
        for number, allocator, name in track(runs, model, console=console):
            child = [sys.executable, "-m", "benchmarks.speed", "peak", model, optimizer, name]
            done = subprocess.run(
                [*child, "--batch", str(batch), "--device", device],
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | allocators[allocator],
            )
            if done.returncode == 0:
                added, whole = map(int, done.stdout.split()[-2:])
                rows.append((model, optimizer, allocator, name, number, added, whole))
            else:
                errors[name] = done.stderr.strip().splitlines()[-1]
        columns = ["model", "optimizer", "allocator", "contender", "round", "added", "whole"]
        frame = pd.DataFrame(rows, columns=columns)
        _store(f"memory-{model}-{optimizer}", frame, out, device, {"batch": batch, "errors": errors})
        for column, title in (
            ("added", "Memory added by training at its peak"),
            ("whole", "Peak of the whole process"),
        ):
            _show(frame, ["model", "allocator"], f"{title}, batch {batch}, {device}", column)


@app.command(hidden=True)
def peak(model: str, optimizer: str, contender: str, batch: int = 128, device: str = "cpu") -> None:
    """Print the bytes that two periods of a contender's steps add at their peak, and the whole process's peak."""
    task = task_of(model, optimizer, device, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # The peak so far is that of importing; the first plain step on two instances pays for lazy initialisation.
        small = task_of(model, optimizer, device, 2)
        erm(small)()
        before = _process_peak()
    step = CONTENDERS[contender](task)
    for _ in range(2 * PERIOD):
        step()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else _process_peak()
    print(after - before, after)


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _growth_settings(device: str) -> dict[str, dict[Any, tuple[Task, Callable[[Task], Step]]]]:
    """By what is varied and its value: the task, and what is measured on it beside ERM."""
    mlp = partial(task_of, "mlp", "sgd", device)
    conv = partial(task_of, "conv", "sgd", device)
    shipped = partial(molere, every=5)

    def with_classes(classes: int) -> Task:
        task = mlp()
        network = MLP(1600, classes, hidden=512).to(device)
        y, yv = (torch.randint(classes, (128,), device=device) for _ in range(2))
        return Task(network, "sgd", (task.batch[0], y), (task.validation[0], yv))

    def wide(hidden: int) -> Task:
        return Task(MLP(1600, 10, hidden=hidden).to(device), "sgd", mlp().batch, mlp().validation)

    return {
        "batch size (conv)": {size: (conv(size), shipped) for size in (16, 32, 64, 128, 256)},
        "validation batch (conv, batch 128)": {
            size: (task_of("conv", "sgd", device, 128, size), shipped) for size in (16, 32, 64, 128, 256)
        },
        "every (conv)": {every: (conv(), partial(molere, every=every)) for every in (1, 2, 5, 10, 20)},
        "hidden units (MLP)": {hidden: (wide(hidden), shipped) for hidden in (128, 256, 512, 1024, 2048)},
        "classes (MLP)": {classes: (with_classes(classes), shipped) for classes in (10, 100, 1000, 10_000)},
    }


@app.command()
def growth(
    count: Annotated[int, typer.Option("--rounds", min=1)] = 7, device: Device = "cpu", out: Out = RESULTS
) -> None:
    """How MOLERE's cost beside ERM grows with the batch, the model, the classes; and the buffer's with its capacity."""
    rows = []
    for varied, settings in _growth_settings(device).items():
        for value, (task, factory) in settings.items():
            contenders = {"ERM": erm, "MOLERE": factory}
            period = math.lcm(PERIOD, value) if varied.startswith("every") else PERIOD
            for number, name, seconds in rounds_anew(contenders, task, count, device, period):
                rows.append((varied, value, name, number, seconds))
    for capacity in (1_000, 10_000, 100_000, 1_000_000):
        for number, (name, seconds) in enumerate(_buffer_operations(capacity, count)):
            rows.append(("buffer capacity", capacity, name, number % count, seconds))
    frame = pd.DataFrame(rows, columns=["varied", "value", "contender", "round", "seconds"])
    _store("growth", frame, out, device)
    _show(frame[frame.varied != "buffer capacity"], ["varied", "value"], f"Growth of a step's time, {device}")
    buffer = frame[frame.varied == "buffer capacity"].groupby(["contender", "value"]).seconds.median() * 1e6
    console.print(
        buffer.unstack().round(1).to_string(), "\nmicroseconds for 13 instances inserted, 128 drawn, 13 released"
    )


def _buffer_operations(capacity: int, count: int) -> Iterator[tuple[str, float]]:
    """Seconds of inserting 13 instances into a full buffer, drawing 128 and releasing 13, ``count`` times each."""
    from torch_molere.buffer import ValidationBuffer

    buffer = ValidationBuffer(capacity, 2**34)
    for start in range(0, capacity, 1000):
        rows = range(start, start + 1000)
        batch = {"x": torch.zeros(1000, 4), "y": torch.arange(1000) % 10}
        buffer.observe([row % 10 for row in rows])
        buffer.insert(batch, range(1000), [row % 10 for row in rows], rows)
    batch = {"x": torch.zeros(13, 4), "y": torch.arange(13) % 10}
    seconds: dict[str, list[float]] = {"insert": [], "draw": [], "release": []}
    for number in range(20 * count):
        first = capacity + 13 * number
        start_time = time.perf_counter()
        buffer.insert(batch, range(13), [i % 10 for i in range(13)], range(first, first + 13))
        inserted = time.perf_counter()
        _, slots = buffer.draw(128)
        drawn = time.perf_counter()
        buffer.release(slots[:13])
        released = time.perf_counter()
        for name, spent in zip(seconds, (inserted - start_time, drawn - inserted, released - drawn), strict=True):
            seconds[name].append(spent)
    for name, values in seconds.items():
        for part in range(count):
            yield name, sorted(values[part::count])[len(values) // count // 2]


@app.command()
def error(
    models: Models = "conv",
    optimizers: Optimizers = "sgd,adamw",
    seeds: int = 3,
    training_steps: int = 400,
    data: Annotated[str, typer.Option(help="As in benchmarks.compare.")] = "digits",
    device: Device = "cpu",
    out: Out = RESULTS,
) -> None:
    """Each engine's meta-gradient in float32 against forward mode in float64, along a real training run.

    In float64 forward mode equals ``unrolled`` to 1e-10 (a test), also for optimizers that ``higher`` does not have.
    """
    from benchmarks.datasets import DataOptions, load

    task_data = load(DataOptions(data=data)).to(torch.device(device))
    rows = []
    for model in models.split(","):
        for optimizer in optimizers.split(","):
            for seed in range(seeds):
                torch.manual_seed(seed)
                network = build(model, task_data.image_shape, len(task_data.classes)).to(device)
                settings = Task(network, optimizer, *2 * [(torch.empty(0), torch.empty(0))])
                rows += [
                    (model, optimizer, seed, *row) for row in _errors(settings, task_data.train, training_steps, seed)
                ]
    columns = ["model", "optimizer", "seed", "step", "engine", "cosine", "relative_error"]
    frame = pd.DataFrame(rows, columns=columns)
    _store("error", frame, out, device, {"data": data, "seeds": seeds})
    console.print(
        frame.groupby(["model", "optimizer", "step", "engine"])[["cosine", "relative_error"]].mean().to_string()
    )


def _errors(task: Task, train: Any, total: int, seed: int) -> Iterator[tuple[int, str, float, float]]:
    model, optimizer = task.start()
    batches: list[Any] = []
    for step in range(total + 1):
        if len(batches) < 2:
            batches = list(train.batches(range(len(train)), 128, seed=seed * 1000 + step, augment=False))
        batch = batches.pop()[:2]
        if step in (0, total // 20, total // 4, total):
            weights = torch.rand(len(batch[1]), device=batch[1].device) + 0.5
            setting = (batch, batches[0][:2], weights / weights.mean())
            exact = _gradient(model, optimizer, setting, "forward", torch.float64)
            single = {
                "finite": _gradient(model, optimizer, setting, "finite", torch.float32),
                "finite, in training": _in_training(model, optimizer, setting),
                "forward": _gradient(model, optimizer, setting, "forward", torch.float32),
            }
            for engine, found in single.items():
                cosine = F.cosine_similarity(found.double(), exact, dim=0).item()
                yield step, engine, cosine, ((found - exact).norm() / exact.norm()).item()
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def _gradient(
    model: nn.Module, optimizer: torch.optim.Optimizer, setting: Any, engine: Any, dtype: torch.dtype
) -> torch.Tensor:
    """The meta-gradient of a copy of model and optimizer in another precision."""
    model, optimizer = copy.deepcopy((model, optimizer))
    model.to(dtype)
    optimizer.load_state_dict(optimizer.state_dict())  # which casts the state to the parameters' precision
    (x, y), (xv, yv), weights = setting
    return hypergradient(model, optimizer, (x.to(dtype), y), (xv.to(dtype), yv), weights.to(dtype), engine=engine)


class _Given(nn.Module):
    """Weights that are given and do not learn."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, samples: Samples) -> torch.Tensor:
        return self.weights


def _in_training(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Any) -> torch.Tensor:
    """The meta-gradient that a :class:`MetaReweighter` takes within a training step, from the losses of training."""
    model, optimizer = copy.deepcopy((model, optimizer))
    batch, validation, weights = setting
    reweighter = MetaReweighter(
        model,
        optimizer,
        weighting=_Given(weights),
        validation=[validation],
        hypergradient="finite",
        every=1,
        warmup_steps=0,
    )
    with mock.patch.object(reweighter, "_learn") as learn:
        reweighter.step(batch)
    derivative: torch.Tensor = learn.call_args.args[1][0]
    return derivative


if __name__ == "__main__":
    app()

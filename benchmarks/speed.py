"""What a step costs beside plain training, ours and the peers'.

``python -m benchmarks.speed steps``, ``profile``, ``memory``, ``growth`` or ``error`` measure and store; ``draw`` makes
tables and pictures of what is stored.

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

import pandas as pd
import sklearn.datasets
import torch
import torch.nn.functional as F
import torchvision
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.contenders import CONTENDERS, Step, Task, erm, molere
from benchmarks.models import MLP, build
from benchmarks.profiling import PARTS, WHOLE, seconds_by_part
from benchmarks.provenance import provenance
from benchmarks.report import markdown
from benchmarks.speed_figures import draw_growth, draw_steps
from benchmarks.store import write
from torch_molere import MetaReweighter, Samples, hypergradient

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 160)

PERIOD = 5
"""Steps timed at a go: one whole period of ``every=5``."""

LASTING = 3
"""Rounds that a contender lasts before it is made anew: where its tensors lie in memory costs or saves per cents."""

ALLOCATORS = {"glibc": {}, "handing back": {"MALLOC_MMAP_THRESHOLD_": str(2**18)}}
"""By name, the environment of a process: as it is, and with blocks of 256 KiB and more handed back once freed, so that
the peak is of what is needed and not of the gaps that small tensors leave between the activations of steps gone by."""

CHANNELS_LAST = "-channels-last"
"""After a model's name: the model and its images are in that order."""

RESULTS = Path("benchmarks/results")
TIMED = ["model", "optimizer", "contender", "round", "seconds"]

Models = Annotated[
    str,
    typer.Option(
        help="Comma-separated: conv, resnet20, features-mlp, vit-tiny, wrn-28-10, resnet50; with -channels-last after "
        "the name, in that order."
    ),
]
Optimizers = Annotated[str, typer.Option(help="Comma-separated: sgd, adamw.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16: every contender's whole step under autocast.")]
Only = Annotated[list[str] | None, typer.Option(help="Only ERM and contenders with this in their name; repeatable.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1)]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Folder of the stored results.")]


def task_of(model: str, optimizer: str, device: str, batch: int = 128) -> Task:
    """A task of one of the models on random inputs (the cost does not depend on what they show).

    The peers' validation batch is half as large as the training batch, as ours is by default.
    """
    torch.manual_seed(0)
    name = model.removesuffix(CHANNELS_LAST)
    shape: tuple[int, ...] = (3, 224, 224) if name == "resnet50" else (3, 32, 32)
    classes = 1000 if name == "resnet50" else 10
    if name == "features-mlp":
        shape = (1280,)
        network: nn.Module = MLP(1280, classes)
    elif name == "vit-tiny":
        network = torchvision.models.VisionTransformer(32, 4, 12, 3, 192, 768, num_classes=classes)
    else:
        network = build(name, shape, classes)
    sizes = (batch, max(batch // 2, 2))
    x, xv = (torch.randn(size, *shape, device=device) for size in sizes)
    if model.endswith(CHANNELS_LAST):
        network = network.to(memory_format=torch.channels_last)
        x, xv = (images.to(memory_format=torch.channels_last) for images in (x, xv))
    y, yv = (torch.randint(classes, (size,), device=device) for size in sizes)
    return Task(network.to(device), optimizer, (x, y), (xv, yv))


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
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(period):
        step()
    wait()
    return (time.perf_counter() - start) / period


def made(factories: Mapping[str, Callable[[Task], Step]], task: Task) -> tuple[dict[str, Step], dict[str, str]]:
    """The contenders that run here, each having taken a step, and the errors of those that do not."""
    steps, errors = {}, {}
    for name, factory in factories.items():
        try:
            step = factory(task)
            step()
        except Exception as error:  # a peer may fail in any way: its error goes into the stored settings
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            steps[name] = step
    return steps, errors


def summary(frame: pd.DataFrame, keys: list[str], column: str = "seconds") -> pd.DataFrame:
    """Quartiles of the ratio of a column to ERM's of the same round and setting, by setting and contender."""
    base = frame[frame.contender == "ERM"].set_index([*keys, "round"])[column]
    index = pd.MultiIndex.from_frame(frame[[*keys, "round"]])
    ratio = frame[column].to_numpy() / base.reindex(index).to_numpy()
    known = (*CONTENDERS, WHOLE, *PARTS)
    order = pd.CategoricalDtype([*known, *sorted(set(frame.contender) - set(known))], ordered=True)
    frame = frame.assign(ratio=ratio).astype({"contender": order})
    grouped = frame.groupby([*keys, "contender"], sort=True, observed=True).ratio
    return grouped.quantile([0.25, 0.5, 0.75]).unstack().set_axis(["low", "median", "high"], axis=1).reset_index()


def _store(name: str, frame: pd.DataFrame, out: Path, device: str, also: dict[str, Any] | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"speed-{name}-{device}.csv", frame.to_csv(index=False, float_format="%.6g"))
    config = provenance("benchmarks.speed", sys.argv[1:], torch.device(device), ("betty-ml", "higher"))
    config |= {"threads": torch.get_num_threads()} | (also or {})
    write(out / f"speed-{name}-{device}.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _show(frame: pd.DataFrame, keys: list[str], title: str, column: str = "seconds") -> None:
    console.print(f"{title}, relative to ERM\n{summary(frame, keys, column).round(2).to_string(index=False)}\n")


def _chosen(only: list[str] | None) -> dict[str, Callable[[Task], Step]]:
    parts = ("ERM", *only) if only else ("",)
    return {name: factory for name, factory in CONTENDERS.items() if any(part in name for part in parts)}


def _autocast(factory: Callable[[Task], Step], task: Task) -> Step:
    """A contender that is made and steps under autocast to bfloat16."""
    autocast = torch.autocast(task.batch[0].device.type, torch.bfloat16)
    with autocast:
        return autocast(factory(task))


@app.command()
def steps(
    models: Models = "conv,resnet20,features-mlp",
    optimizers: Optimizers = "sgd,adamw",
    count: Rounds = 9,
    batch: int = 128,
    precision: Precision = "fp32",
    only: Only = None,
    device: Device = "cpu",
    out: Out = RESULTS,
) -> None:
    """Time of one training step, for every contender."""
    chosen = _chosen(only)
    if precision == "bf16":
        chosen = {name: partial(_autocast, factory) for name, factory in chosen.items()}
    kind = "" if precision == "fp32" else f"-{precision}"
    for model, optimizer in itertools.product(models.split(","), optimizers.split(",")):
        task = task_of(model, optimizer, device, batch)
        running, errors = made(chosen, task)
        contenders = {name: chosen[name] for name in running}
        running.clear()
        measured = rounds_anew(contenders, task, count, device)
        progress = track(measured, f"{model}, {optimizer}", total=len(contenders) * count, console=console)
        rows = [(model, optimizer, name, number, seconds) for number, name, seconds in progress]
        frame = pd.DataFrame(rows, columns=TIMED)
        settings = {"batch": batch, "precision": precision, "errors": errors}
        _store(f"steps-{model}-{optimizer}{kind}", frame, out, device, settings)
        _show(frame, ["model", "optimizer"], f"Time of a step, batch {batch}, {precision}, {device}")


@app.command("profile")
def profile_parts(
    models: Models = "conv,resnet20,features-mlp",
    optimizer: str = "sgd",
    count: Rounds = 5,
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
        frame = pd.DataFrame(rows, columns=TIMED)
        _store(f"profile-{model}-{optimizer}", frame, out, "cpu", {"batch": batch, "every": every})
        _show(frame, ["model", "optimizer"], f"Parts of a step, every {every}, batch {batch}")


@app.command()
def memory(
    models: Models = "conv,resnet20",
    optimizer: str = "sgd",
    count: Rounds = 1,
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
            child += ["--batch", str(batch), "--device", device]
            environment = os.environ | allocators[allocator]
            done = subprocess.run(child, capture_output=True, text=True, check=False, env=environment)
            if done.returncode == 0:
                rows.append((model, optimizer, allocator, name, number, *map(int, done.stdout.split()[-2:])))
            else:
                errors[name] = done.stderr.strip().splitlines()[-1]
        columns = ["model", "optimizer", "allocator", "contender", "round", "added", "whole"]
        frame = pd.DataFrame(rows, columns=columns)
        _store(f"memory-{model}-{optimizer}", frame, out, device, {"batch": batch, "errors": errors})
        for column, title in (("added", "Memory that training adds at its peak"), ("whole", "Peak of the process")):
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
        erm(task_of(model, optimizer, device, 2))()
        before = _process_peak()
    step = CONTENDERS[contender](task)
    for _ in range(2 * PERIOD):
        step()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else _process_peak()
    print(after - before, after)


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _growth_settings(device: str) -> dict[str, dict[int, tuple[Task, Callable[[Task], Step]]]]:
    """By what is varied and its value: the task, and what is measured on it beside ERM."""
    shipped = partial(molere, every=5)
    conv = partial(task_of, "conv", "sgd", device)
    features = task_of("features-mlp", "sgd", device)

    def mlp(classes: int = 10, hidden: int = 256) -> Task:
        batch = (features.batch[0], torch.randint(classes, (128,), device=device))
        return Task(MLP(1280, classes, hidden).to(device), "sgd", batch, batch)

    return {
        "batch size (conv)": {size: (conv(size), shipped) for size in (16, 32, 64, 128, 256)},
        "every (conv)": {every: (conv(), partial(molere, every=every)) for every in (1, 2, 5, 10, 20)},
        "hidden units (MLP)": {hidden: (mlp(hidden=hidden), shipped) for hidden in (128, 256, 512, 1024, 2048)},
        "classes (MLP)": {classes: (mlp(classes), shipped) for classes in (10, 100, 1000, 10_000)},
        "instances held (MLP)": {held: (features, partial(molere, every=5, held=held)) for held in (100, 1000, 10_000)},
    }


@app.command()
def growth(count: Rounds = 6, device: Device = "cpu", out: Out = RESULTS) -> None:
    """How MOLERE's cost beside ERM grows with the batch, the model, the classes and the buffer."""
    rows = []
    for varied, settings in _growth_settings(device).items():
        for value, (task, factory) in track(settings.items(), varied, console=console):
            period = math.lcm(PERIOD, value) if varied.startswith("every") else PERIOD
            measured = rounds_anew({"ERM": erm, "MOLERE": factory}, task, count, device, period)
            rows += [(varied, value, name, number, seconds) for number, name, seconds in measured]
    frame = pd.DataFrame(rows, columns=["varied", "value", "contender", "round", "seconds"])
    _store("growth", frame, out, device)
    _show(frame, ["varied", "value"], f"Growth of a step's time, {device}")


@app.command()
def error(
    models: Models = "conv",
    optimizers: Optimizers = "sgd,adamw",
    seeds: int = 3,
    training_steps: int = 400,
    device: Device = "cpu",
    out: Out = RESULTS,
) -> None:
    """Each engine's meta-gradient in float32 against forward mode in float64, along training on digits."""
    digits = sklearn.datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float, device=device)[:, None] / 16
    y = torch.tensor(digits.target, device=device)
    rows: list[tuple[Any, ...]] = []
    for model, optimizer, seed in itertools.product(models.split(","), optimizers.split(","), range(seeds)):
        torch.manual_seed(seed)
        task = Task(build(model, (1, 8, 8), 10).to(device), optimizer, (x, y), (x, y))
        rows += [(model, optimizer, seed, *row) for row in _errors(task, training_steps)]
    columns = ["model", "optimizer", "seed", "step", "engine", "cosine", "relative_error"]
    frame = pd.DataFrame(rows, columns=columns)
    _store("error", frame, out, device, {"data": "digits", "seeds": seeds})
    console.print(frame.groupby(columns[:2] + columns[3:5])[columns[5:]].mean().to_string())


def _errors(task: Task, total: int) -> Iterator[tuple[int, str, float, float]]:
    model, optimizer = task.start()
    x, y = task.batch
    for step in range(total + 1):
        rows = torch.randperm(len(y), device=y.device)[:256]
        batch, validation = ((x[own], y[own]) for own in rows.chunk(2))
        if step in (0, total // 20, total // 4, total):
            weights = torch.rand(len(batch[1]), device=y.device) + 0.5
            setting = (batch, validation, weights / weights.mean())
            exact = _gradient(model, optimizer, setting, "forward", torch.float64)
            found = {name: _gradient(model, optimizer, setting, name) for name in ("finite", "forward", "reverse")}
            found["finite, in training"] = _in_training(model, optimizer, setting)
            for engine, single in found.items():
                cosine = F.cosine_similarity(single.double(), exact, dim=0).item()
                yield step, engine, cosine, ((single - exact).norm() / exact.norm()).item()
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def _gradient(model: Any, optimizer: Any, setting: Any, engine: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The meta-gradient of a copy of model and optimizer in a precision."""
    model, optimizer = copy.deepcopy((model, optimizer))
    model.to(dtype)
    optimizer.load_state_dict(optimizer.state_dict())  # which casts the state to the parameters' precision
    (x, y), (xv, yv), weights = setting
    return hypergradient(model, optimizer, (x.to(dtype), y), (xv.to(dtype), yv), weights.to(dtype), engine=engine)


class _Given(nn.Module):
    """Weights that are given and do not learn."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, samples: Samples) -> Tensor:
        return self.weights


def _in_training(model: Any, optimizer: Any, setting: Any) -> Tensor:
    """The meta-gradient that a :class:`MetaReweighter` takes within a training step, from the losses of training."""
    model, optimizer = copy.deepcopy((model, optimizer))
    batch, validation, weights = setting
    options: dict[str, Any] = {"hypergradient": "finite", "every": 1, "warmup_steps": 0}
    reweighter = MetaReweighter(model, optimizer, weighting=_Given(weights), validation=[validation], **options)
    found = reweighter.step(batch).meta_gradient
    assert found is not None
    return found


def steps_stored(folder: Path, device: str) -> dict[str, pd.DataFrame]:
    """The ratios of every stored measurement of steps, by model and optimizer."""
    files = sorted(folder.glob(f"speed-steps-*-{device}.csv"))
    keys = ["model", "optimizer"]
    return {file.stem[len("speed-steps-") : -len(device) - 1]: summary(pd.read_csv(file), keys) for file in files}


def steps_table(panels: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each model and optimizer, a column for each contender: medians."""
    shown = {name: part.set_index("contender")["median"].map("{:.2f}".format) for name, part in panels.items()}
    table = pd.DataFrame(shown).T.fillna("–")
    return table[[name for name in CONTENDERS if name in table]].reset_index(names="time of a step / ERM")


@app.command()
def draw(device: Device = "cpu", out: Out = RESULTS) -> None:
    """The table and the pictures of what is stored."""
    panels = steps_stored(out, device)
    if panels:
        console.print(markdown(steps_table(panels)), markup=False, soft_wrap=True)
        draw_steps(panels, out / f"speed-steps-{device}.png")
    grown = out / f"speed-growth-{device}.csv"
    if grown.exists():
        draw_growth(summary(pd.read_csv(grown), ["varied", "value"]), out / f"speed-growth-{device}.png")


if __name__ == "__main__":
    app()

"""ERM, learned reweighting (easy, random and hard validation) and MOLERE on one data set, over several seeds.

python -m benchmarks.compare                                        # digits, a minute on two CPU cores
python -m benchmarks.compare --data cifar10 --download --model resnet32
python -m benchmarks.compare --data parquet:DIR --label-column label_worst --subset 10000
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from benchmarks import datasets, figures, models, results, training
from benchmarks.datasets import DataOptions, Task
from benchmarks.provenance import provenance, without_machine
from benchmarks.results import Runs
from benchmarks.training import METHODS, Outcome, Recipe, Report

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
console = Console()

INTERRUPTED = 130
"""The exit code of a process stopped by Ctrl-C: 128 + SIGINT."""


@dataclass(frozen=True)
class Comparison:
    """Everything that decides what is run.

    Attributes:
        task: the data, on ``device``.
        model: the classifier's name.
        recipe: how it is trained.
        methods: which methods, ERM first.
        seeds: 0 to seeds − 1.
        device: where.
    """

    task: Task
    model: str
    recipe: Recipe
    methods: tuple[str, ...]
    seeds: int
    device: torch.device

    def pairs(self) -> list[tuple[str, int]]:
        """(method, seed), seed by seed, so that a stop leaves paired runs."""
        return [(method, seed) for seed in range(self.seeds) for method in self.methods]

    def run(self, method: str, seed: int, runs: Runs, report: Report) -> Outcome:
        """Train and evaluate once; LRW-Hard and LRW-Easy read ERM's margins from ``runs``."""

        def build() -> torch.nn.Module:
            return models.build(self.model, self.task.image_shape, len(self.task.classes))

        margins = runs.erm_margins(seed) if method in ("LRW-Hard", "LRW-Easy") else None
        return training.run(method, seed, self.task, build, self.recipe, self.device, margins, report)


class _KeepsArguments(TyperCommand):
    """Keeps the command line, to be stored with the results."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)


@app.command(cls=_KeepsArguments)
def compare(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(help="digits, cifar10, cifar100, imagefolder:DIR or parquet:DIR.", rich_help_panel="Data"),
    ] = "digits",
    root: Annotated[Path, typer.Option(help="Where CIFAR lies.", rich_help_panel="Data")] = Path("data"),
    download: Annotated[bool, typer.Option(help="Fetch CIFAR into --root.", rich_help_panel="Data")] = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=8, help="Shorter side resized to this, centre cropped; imagefolder: 224.", rich_help_panel="Data"
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="Parquet column to train on; tests always go by the clean 'label'.", rich_help_panel="Data"),
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="Train on so many rows, balanced by class.", rich_help_panel="Data")
    ] = None,
    label_noise: Annotated[
        str | None,
        typer.Option(
            help="symmetric:RATE replaces that share of the training labels by another class.", rich_help_panel="Data"
        ),
    ] = None,
    imbalance: Annotated[
        float,
        typer.Option(
            help="Long tail: the first class keeps so many times the rows of the last.", rich_help_panel="Data"
        ),
    ] = 1.0,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read an imagefolder.", rich_help_panel="Data")
    ] = 4,
    model: Annotated[
        str | None,
        typer.Option(
            help="mlp, conv, resnet20, resnet32, wrn-28-10 or a torchvision classifier; by default mlp for digits, "
            "conv for the others.",
            rich_help_panel="Training",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Separated by commas; ERM always runs, it is the baseline.", rich_help_panel="Training"),
    ] = ",".join(METHODS),
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each method; default: 10 for mlp, else 5.", rich_help_panel="Training"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: the model's own.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Default: the model's own.", rich_help_panel="Training")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="SGD's, before the cosine schedule; default: the model's own.", rich_help_panel="Training"),
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment",
            help="Random crops and flips; by default off for digits, on for the others.",
            rich_help_panel="Training",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …", rich_help_panel="Training")] = "auto",
    amp: Annotated[
        Literal["off", "bf16"], typer.Option(help="Autocast around the forward.", rich_help_panel="Training")
    ] = "off",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; default: 1 for mlp, else PyTorch's own.", rich_help_panel="Training"),
    ] = None,
    weighting: Annotated[
        Literal["loss", "signals", "inputs"],
        typer.Option(
            help="What φ sees: the loss; loss, margin, probabilities and label; or the image.",
            rich_help_panel="Reweighting",
        ),
    ] = "loss",
    weighting_lr: Annotated[
        float, typer.Option(help="φ's learning rate.", rich_help_panel="Reweighting")
    ] = Recipe.weighting_lr,
    every: Annotated[
        int, typer.Option(min=1, help="Steps from one meta-update to the next.", rich_help_panel="Reweighting")
    ] = Recipe.every,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the training rows that is validation.", rich_help_panel="Reweighting")
    ] = Recipe.val_fraction,
    warmup: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the steps that trains plainly.", rich_help_panel="Reweighting"),
    ] = Recipe.warmup,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; default: runs/compare-<data>-<model>.", rich_help_panel="Output"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the folder's unfinished comparison.", rich_help_panel="Output")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop the folder's earlier comparison.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Compare plain training (ERM), learned reweighting on easy, random and hard validation rows (LRW), and MOLERE.

    Every method gets the same epochs, batches, optimizer and schedule, and for one seed the same initialisation and
    data order. Nothing is tuned or stopped on the test set.
    """
    if resume and overwrite:
        raise typer.BadParameter("exclude each other; give one of them", param_hint="--resume, --overwrite")
    chosen_methods = _methods(methods)
    options = DataOptions(data, root, download, image_size, label_column, subset, imbalance, label_noise, workers)
    on_digits = options.kind == "digits"
    name = model or ("mlp" if on_digits else "conv")
    models.check_name(name)
    own = models.default_training(name)
    if (wanted_threads := threads or own.threads) is not None:
        torch.set_num_threads(wanted_threads)
    recipe = Recipe(
        epochs=epochs or own.epochs,
        batch_size=batch_size or own.batch_size,
        lr=_positive(own.lr if lr is None else lr, "--lr"),
        weight_decay=own.weight_decay,
        augment=not on_digits if augment is None else augment,
        weighting=weighting,
        weighting_lr=_positive(weighting_lr, "--weighting-lr"),
        every=every,
        val_fraction=_share(val_fraction, "--val-fraction"),
        warmup=warmup,
        amp=amp,
    )
    chosen_device = _device(device)
    task = datasets.load(options)
    models.check_fits(name, task.image_shape, len(task.classes))
    comparison = Comparison(task.to(chosen_device), name, recipe, chosen_methods, seeds or own.seeds, chosen_device)

    arguments: list[str] = context.meta["arguments"]
    data_name = "-".join(part for part in (options.kind, options.folder.name) if part)
    runs = Runs(out or Path("runs") / f"compare-{data_name}-{name}")
    runs.start(_config(comparison, options, arguments), resume, overwrite)
    title = f"{data_name}, {name}: {len(task.train):,} training rows, {recipe.epochs} epochs"
    _go(comparison, runs, title, arguments)


def _go(comparison: Comparison, runs: Runs, title: str, arguments: Sequence[str]) -> None:
    """Run what is missing and show the results, of the finished runs alone if it has to stop early."""
    try:
        _run_missing(comparison, runs)
    except KeyboardInterrupt:
        _show(runs, title)
        command = shlex.join(["python", "-m", "benchmarks.compare", *_resuming(arguments)])
        console.print(
            f"Stopped. Finished runs are kept; to go on:\n  {command}", soft_wrap=True, markup=False, highlight=False
        )
        raise typer.Exit(INTERRUPTED) from None
    except FloatingPointError as error:
        _show(runs, title)
        console.print(f"{error}. Finished runs are kept. Lower --lr or --weighting-lr.", markup=False)
        raise typer.Exit(1) from error
    _show(runs, title)


def _run_missing(comparison: Comparison, runs: Runs) -> None:
    finished = runs.finished()
    missing = [pair for pair in comparison.pairs() if pair not in finished]
    if not missing:
        return
    with _progress() as progress:
        total = len(comparison.pairs())
        overall = progress.add_task("runs", total=total, completed=total - len(missing), state="")
        for method, seed in missing:
            current = progress.add_task(f"{method}, seed {seed}", total=None, state="")

            def report(step: int, steps: int, loss: float, accuracy: float, current: Any = current) -> None:
                state = f"loss {loss:.3f}, accuracy {100 * accuracy:.0f} %"
                progress.update(current, completed=step, total=steps, state=state)

            try:
                outcome = comparison.run(method, seed, runs, report)
            except FloatingPointError as error:
                raise FloatingPointError(f"{method} with seed {seed} diverged: {error}") from error
            runs.add(outcome)
            numbers = outcome.numbers
            progress.console.print(
                f"{method}, seed {seed}: accuracy {100 * numbers['accuracy']:.2f} %, "
                f"margin {numbers['test_margin']:.3f}, {numbers['seconds']:.1f} s",
                highlight=False,
                soft_wrap=True,
            )
            progress.remove_task(current)
            progress.advance(overall)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars on a terminal; elsewhere nothing but the lines printed through it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _show(runs: Runs, title: str) -> None:
    """The table and the picture of what is finished, on the screen and in the folder."""
    summaries = results.summarise(runs.frame())
    if not summaries:
        console.print("No run has finished yet.")
        return
    results.write(runs.folder / "summary.csv", results.as_frame(summaries).to_csv(index=False))
    results.write(runs.folder / "table.md", results.markdown(summaries))
    figures.draw(runs, summaries, title, runs.folder / "compare.png")
    table = Table(
        title=title, caption="± 95 % t intervals over seeds; differences are paired by seed", box=box.SIMPLE_HEAD
    )
    for name in results.COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for summary in summaries:
        table.add_row(*results.cells(summary))
    console.print(table)
    console.print(f"Results are in {runs.folder}", soft_wrap=True, markup=False, highlight=False)


def _methods(text: str) -> tuple[str, ...]:
    """The methods named, in the usual order, ERM among them: every difference is taken from it."""
    known = {method.lower(): method for method in METHODS}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name.lower() not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"{', '.join(map(repr, unknown)) or 'nothing'} given; take some of {', '.join(METHODS)}",
            param_hint="--methods",
        )
    chosen = {known[name.lower()] for name in names} | {"ERM"}
    return tuple(method for method in METHODS if method in chosen)


def _positive(value: float, option: str) -> float:
    if not 0.0 < value < float("inf"):
        raise typer.BadParameter(f"must be a positive number, got {value}", param_hint=option)
    return value


def _share(value: float, option: str) -> float:
    if not 0.0 < value < 1.0:
        raise typer.BadParameter(f"must lie between 0 and 1, got {value}", param_hint=option)
    return value


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(
            f"{name!r} is not here ({str(error).splitlines()[0]}); take auto or cpu", param_hint="--device"
        ) from error
    return device


def _config(comparison: Comparison, options: DataOptions, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` holds; ``"configuration"`` is what a resumed comparison must have in common."""
    data = asdict(options)
    for of_this_machine in ("root", "download", "workers"):
        del data[of_this_machine]
    return {
        "configuration": {
            "data": data | {"data": without_machine(options.data)},
            "train_rows": len(comparison.task.train),
            "test_rows": len(comparison.task.test),
            "classes": len(comparison.task.classes),
            "model": comparison.model,
            "recipe": asdict(comparison.recipe),
            "methods": list(comparison.methods),
            "seeds": comparison.seeds,
            "device": comparison.device.type,
            "threads": torch.get_num_threads(),
        },
        **provenance("benchmarks.compare", arguments, comparison.device),
    }


def _resuming(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if argument not in ("--overwrite", "--resume")] + ["--resume"]


if __name__ == "__main__":
    app()

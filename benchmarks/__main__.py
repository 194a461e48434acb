"""The command line: ``python -m benchmarks`` is the main job, ``python -m benchmarks STUDY`` a study."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import demo, gpu, mixture, pages, real, report_cost, report_run
from benchmarks.catalogue import STUDIES
from benchmarks.provenance import provenance
from benchmarks.runs import Job, Place, run_all
from benchmarks.store import Store, write
from benchmarks.studies import PLAIN, Study

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
console = Console()
RESULTS = Path("benchmarks/results")
INTERRUPTED = 130
"""The exit code of a process stopped by Ctrl-C: 128 + SIGINT."""

Jobs = Annotated[int, typer.Option(min=1, help="Parallel processes, one thread each.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Runs of each method; default: the study's own.")]
Root = Annotated[Path, typer.Option(help="The folder with fashion-mnist/, cifar10/ and tiny-imagenet-50/.")]
Cache = Annotated[Path, typer.Option(help="Where decoded images and features are kept.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results.")]
Only = Annotated[str, typer.Option(help="Only settings with this in their name.")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, jobs: Jobs = 2, seeds: Seeds = None, out: Out = None) -> None:
    """Without a command, the **main job**: what learned reweighting does on scikit-learn's digits, in four situations,
    in three minutes on two cores. With one, a study; `render` writes the page of all results."""
    if context.invoked_subcommand is None:
        folder = out or Path("runs/main")
        store = go(demo.STUDY, folder, Place(Path("data"), Path("runs/cache")), jobs, seeds, "")
        console.print(demo.table(store.frame()))
        console.print(str(demo.draw(store.frame(), folder / "main.png")), soft_wrap=True, markup=False, highlight=False)


def _command(study: Study) -> Callable[..., None]:
    def command(
        jobs: Jobs = 2,
        seeds: Seeds = None,
        root: Root = Path("data"),
        cache: Cache = Path("runs/cache"),
        out: Out = None,
        only: Only = "",
    ) -> None:
        store = go(study, out or RESULTS / study.name, Place(root, cache), jobs, seeds, only)
        console.print(pages.section(study, store.folder), markup=False, soft_wrap=True)

    return command


def at_real_scale(options: real.Options) -> None:
    """One run of a large model on images from files; under `torchrun`, on several accelerators."""

    def report(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    made = provenance("benchmarks", sys.argv[1:], real.device_of(options.device))
    if (numbers := real.train(options, report)) is not None:
        write(options.out / "result.json", json.dumps({"result": numbers, "made_by": made}, indent=1) + "\n")
        report(str(options.out / "result.json"))


app.command("real")(real.command(at_real_scale))
app.command("people")(report_run.run)
app.command("mixture")(mixture.run)
app.command("gpu")(gpu.run)
app.command("report-cost")(report_cost.cost)


@app.command()
def render(results: Annotated[Path, typer.Option(help="Folder of all results.")] = RESULTS) -> None:
    """Write the page and the figures of all stored studies."""
    pages.render(results)


def go(study: Study, folder: Path, place: Place, processes: int, seeds: int | None, only: str) -> Store:
    """Run what is missing of a study and store it."""
    store = Store(folder)
    methods = (PLAIN, *study.tried, *study.methods)
    store.start(study.settings, methods, provenance("benchmarks", sys.argv[1:], torch.device("cpu")))
    torch.set_num_threads(1)
    try:
        for jobs in (list(study.first(seeds)), None):
            _run_missing(jobs or list(study.second(seeds, store.frame())), store, place, processes, only)
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept; the same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    return store


def missing_of(jobs: list[Job], store: Store) -> list[Job]:
    """Jobs without a stored run; tuned ones also where it has another rate or decay than is best by now."""
    finished = store.finished()

    def missing(job: Job) -> bool:
        key = job.setting.name, job.method.name, job.seed
        if key not in finished:
            return True
        training = job.method.training
        return job.method.tuned and finished[key] != (training["lr"], training["weight_decay"])

    return [job for job in jobs if missing(job)]


def _run_missing(jobs: list[Job], store: Store, place: Place, processes: int, only: str) -> None:
    jobs = [job for job in jobs if only in job.setting.name]
    missing = missing_of(jobs, store)
    if not missing:
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(missing))
        for job, row in run_all(missing, place, processes):
            store.add(row)
            what = f"{job.setting.name}, {job.method.name}, seed {job.seed}"
            if "accuracy" in row:
                what += f": {100 * row['accuracy']:.1f} %, {row['seconds']:.1f} s"
            progress.update(task, advance=1, description=what if console.is_terminal else "runs")
            if not console.is_terminal:
                console.print(what, soft_wrap=True, markup=False, highlight=False)


for _study in STUDIES.values():
    app.command(_study.name, help=_study.question)(_command(_study))

if __name__ == "__main__":
    app()

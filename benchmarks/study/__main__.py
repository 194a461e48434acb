"""The command line: ``python -m benchmarks.study NAME --data parquet:DIR``, and ``render``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.datasets import DataOptions
from benchmarks.features import PatchOptions
from benchmarks.provenance import provenance, without_machine
from benchmarks.study import overhead, people, rendering
from benchmarks.study.problems import Corpus
from benchmarks.study.store import Stored, described
from benchmarks.study.studies import STUDIES, Study
from benchmarks.study.training import Laboratory

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
RESULTS = Path("benchmarks/results")
RowsOfSeed = Callable[[Corpus, int], Iterable[Mapping[str, Any]]]
BY_SEED = {study.name: (study, rows) for study, rows in ((people.STUDY, people.rows), (overhead.STUDY, overhead.costs))}
"""Studies that are no lists of single runs, with what gives the rows of a seed."""


@app.command(
    help=f"Run a study, or what is missing of it: {', '.join([*STUDIES, *BY_SEED])}; or render all stored ones."
)
def study(
    name: Annotated[str, typer.Argument(help="Which study, or render.")],
    data: Annotated[str, typer.Option(help="cifar10, or parquet:DIR with the label columns of CIFAR-10N.")] = "cifar10",
    root: Annotated[Path, typer.Option(help="Where CIFAR lies.")] = Path("data"),
    results: Annotated[Path, typer.Option(help="Folder of all results.")] = RESULTS,
    cache: Annotated[Path, typer.Option(help="Folder of the extracted features.")] = Path("runs/features"),
    patches: Annotated[int, typer.Option(min=1, help="Of the features' dictionary.")] = PatchOptions.patches,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: the study's own.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Run what is missing of a study and store it."""
    if name == "render":
        rendering.render(results)
        return
    if name not in STUDIES | BY_SEED:
        known = ", ".join([*STUDIES, *BY_SEED, "render"])
        raise typer.BadParameter(f"{name!r} is unknown; take one of {known}", param_hint="NAME")
    torch.set_num_threads(threads)
    options = PatchOptions(patches=patches)
    corpus = Corpus(DataOptions(data, root), cache, options)
    chosen, rows = BY_SEED[name] if name in BY_SEED else (STUDIES[name], None)
    stored = Stored(results / chosen.folder)
    stored.start(_config(chosen, data, options, corpus))
    if rows is None:
        run_missing(chosen, Laboratory(corpus, chosen.on_test), stored, seeds or chosen.seeds)
    else:
        add_missing(chosen, rows, corpus, stored, seeds or chosen.seeds)


def run_missing(chosen: Study, laboratory: Laboratory, stored: Stored, seeds: int) -> None:
    """Each run whose row is not there yet."""
    finished = stored.finished()
    for setting, method, seed in chosen.runs(seeds):
        if (setting.name, method.name, seed) in finished:
            continue
        numbers = laboratory.run(setting, method, seed)
        stored.add([numbers])
        typer.echo(
            f"{setting.name}, {method.name}, seed {seed}: accuracy {100 * numbers['accuracy']:.2f} %, "
            f"balanced {100 * numbers['balanced_accuracy']:.2f} %, train {100 * numbers['train_accuracy']:.1f} %, "
            f"{numbers['seconds']:.0f} s"
        )


def add_missing(chosen: Study, rows: RowsOfSeed, corpus: Corpus, stored: Stored, seeds: int) -> None:
    """All rows of each seed that has none yet."""
    for seed in range(seeds):
        if seed not in set(stored.frame()["seed"]):
            stored.add(rows(corpus, seed))
            typer.echo(f"{chosen.name}, seed {seed}: stored")


def _config(chosen: Study, data: str, patches: PatchOptions, corpus: Corpus) -> dict[str, Any]:
    arguments: Sequence[str] = sys.argv[1:]
    return {
        "data": {
            "data": without_machine(data),
            "features": asdict(patches),
            "pool_rows": len(corpus.pool),
            "judged_on": "test set" if chosen.on_test else "selection set, held out of the training rows",
            "judged_rows": len(corpus.test[1]) if chosen.on_test else len(corpus.selection_rows),
        },
        **described(chosen.settings, chosen.methods),
        **provenance("benchmarks.study", arguments, torch.device("cpu"), also=("torchmetrics",)),
    }


if __name__ == "__main__":
    app()

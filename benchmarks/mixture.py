"""A learned mixture of data: one weight for each source of a small language model's texts."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from scipy.stats import t
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.provenance import provenance
from benchmarks.store import write
from torch_molere import GroupWeighting, MetaReweighter, with_indices

SCRIPT = Path(__file__).parents[1] / "examples" / "language_model" / "plain.py"
METHODS = ("uniform", "learned", "the target's source alone")
SOURCES = ("steps of +1", "steps of +3 (the target's)", "noise")


def one(method: str, seed: int, sequences: int, epochs: int) -> dict[str, Any]:
    """Train once: the loss on held-out texts of the target domain, and the weights of the sources at the end."""
    script = runpy.run_path(str(SCRIPT))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets, source = script["mixture"](sequences, 32, 50, generator)
    held = [script["mixture"](count, 32, 50, generator) for count in (300, 900)]
    validation, test = (TensorDataset(*(part[kind == 1] for part in (x, y))) for x, y, kind in held)
    weighting = GroupWeighting(source)
    if method == "the target's source alone":
        with torch.no_grad():
            weighting.scores.copy_(torch.tensor([-50.0, 50.0, -50.0]))
    model = script["GPT"](50, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = epochs * -(-sequences // 32)
    reweighter = MetaReweighter(
        model,
        optimizer,
        loss_fn=script["sequence_loss"],
        weighting=weighting,
        weighting_optimizer=None if method == "learned" else lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        validation=DataLoader(validation, 16, shuffle=True),
        warmup_steps=steps if method == "uniform" else 20 if method == "learned" else 0,
        max_weight=None,
        shrinkage=None,
    )
    for _ in range(epochs):
        for batch in DataLoader(with_indices(TensorDataset(inputs, targets)), 32, shuffle=True):
            reweighter.step(batch)
    with torch.no_grad():
        loss = script["sequence_loss"](model(test.tensors[0]), test.tensors[1]).mean().item()
    weights = [1.0, 1.0, 1.0] if method == "uniform" else weighting.weights.tolist()
    return {"method": method, "seed": seed, "target_loss": loss, **dict(zip(SOURCES, weights, strict=True))}


def table(frame: pd.DataFrame) -> str:
    """Markdown: mean target loss, and the paired difference from uniform with a 95 % interval."""
    losses = frame.pivot(index="seed", columns="method", values="target_loss")
    lines = [
        "| mixture | loss on the target domain | less than uniform by | weights of the sources |",
        "| --- | --- | --- | --- |",
    ]
    for method in METHODS:
        gain = losses["uniform"] - losses[method]
        half = t.ppf(0.975, len(gain) - 1) * gain.std() / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
        weights = frame[frame["method"] == method][list(SOURCES)].mean()
        shown = ", ".join(f"{name} {value:.2f}" for name, value in weights.items())
        change = "" if method == "uniform" else f"{gain.mean():.4f} ± {half:.4f}"
        lines.append(f"| {method} | {losses[method].mean():.4f} | {change} | {shown} |")
    return "\n".join(lines) + "\n"


def section(folder: Path) -> str:
    """The experiment's part of the page of results; empty where it has not been run."""
    if not (folder / "results.csv").exists():
        return ""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = (
        "## `mixture`\n\nA small GPT on texts of three sources, of which one is the target domain's, in equal parts. "
        "Can one learned weight for each source find the mixture that serves the target domain? "
        f"{about['sequences']:,} texts, {about['epochs']} epochs; `{about['made_by']['command']}`.\n\n"
    )
    return text + table(pd.read_csv(folder / "results.csv")) + "\n"


def run(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    sequences: Annotated[int, typer.Option(min=96)] = 3_000,
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results/mixture"),
) -> None:
    """A small GPT on three sources, of which one is the target domain's: uniform, learned and known weights."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    made = provenance("benchmarks", sys.argv[1:], torch.device("cpu"))
    rows = []
    for seed in range(seeds):
        for method in METHODS:
            rows.append(one(method, seed, sequences, epochs))
            typer.echo(f"{method}, seed {seed}: {rows[-1]['target_loss']:.4f}")
            write(out / "results.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.5g"))
    about = {"sequences": sequences, "epochs": epochs, "made_by": made}
    write(out / "config.json", json.dumps(about, indent=1) + "\n")
    typer.echo(table(pd.DataFrame(rows)))

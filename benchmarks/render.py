"""Writes the results sections of README.md from the stored files: ``python -m benchmarks.render``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from benchmarks import results
from benchmarks.speed import ORDER, summary
from benchmarks.speed_figures import draw_growth

STORED = Path("benchmarks/results")
COMPARISONS = {
    "compare-digits-mlp": "scikit-learn's digits, small MLP",
    "compare-cifar10-conv": "CIFAR-10, small conv net",
    "compare-tiny-imagenet-50-conv": "Tiny ImageNet, 50 classes, small conv net",
}
MODELS = {"conv": "conv net", "resnet20": "ResNet-20", "mlp": "MLP", "vit-tiny": "ViT-Tiny"}


def rendered(readme: str, stored: Path = STORED) -> str:
    """The README with each section between its markers written anew."""
    for name, content in (("results", comparisons(stored)), ("speed", speed(stored))):
        section = re.search(rf"(?s)(<!-- {name}: .*? -->\n)(.*?)<!-- end of {name} -->", readme)
        assert section is not None, f"README.md has no section between markers for {name}"
        readme = f"{readme[: section.start(2)]}\n{content}\n{readme[section.end(2) :]}"
    return readme


def comparisons(stored: Path) -> str:
    """A table, a picture and the command of each stored comparison."""
    parts = []
    for folder, title in COMPARISONS.items():
        if not (stored / folder / "results.csv").exists():
            continue
        config = json.loads((stored / folder / "config.json").read_text(encoding="utf-8"))
        ran = config["configuration"]
        summaries = results.summarise(pd.read_csv(stored / folder / "results.csv"))
        parts.append(
            f"### {title}\n\n"
            f"{ran['train_rows']:,} training rows, {ran['recipe']['epochs']} epochs, on {_machine(config)}; "
            "± is the 95 % interval over seeds, differences are paired by seed.\n\n"
            f"{results.markdown(summaries)}\n"
            f"![Test accuracy by method and change of margin: {title}](benchmarks/results/{folder}/compare.png)\n\n"
            f"`{config['command']}`\n"
        )
    return "\n".join(parts)


def speed(stored: Path) -> str:
    """Time and memory relative to plain training, by model, and one meta-gradient alone."""
    steps = stored / "speed-steps-cpu.csv"
    if not steps.exists():
        return "Not measured yet.\n"
    config = json.loads(steps.with_suffix(".json").read_text(encoding="utf-8"))
    frame = summary(pd.read_csv(steps), ["model", "optimizer"])
    settings = list(dict.fromkeys(zip(frame.model, frame.optimizer, strict=True)))
    values = {(row.model, row.optimizer, row.contender): f"{row.median:.2f}" for row in frame.itertuples()}
    header = ["", *(f"{MODELS[model]}, {optimizer.upper()}" for model, optimizer in settings)]
    memory = _memory(stored / "speed-memory-cpu.csv")
    header += [f"memory, {MODELS[model]}" for model in memory]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for contender in ORDER:
        cells = [values.get((*setting, contender)) or _why_not(config, setting, contender) for setting in settings]
        rows.append([contender, *cells, *(of.get(contender, "–") for of in memory.values())])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return (
        f"Medians of the ratio to one plain training step of the same round, batch {config['batch']}, on "
        f"{_machine(config)}; torch {config['versions']['torch']}, "
        f"betty-ml {config['versions']['betty-ml']}, torchopt {config['versions']['torchopt']}, "
        f"higher {config['versions']['higher']}. The lines “gradient” are one meta-gradient alone, in the same unit. "
        "Memory is the peak of the whole process, each contender in one of its own.\n\n"
        f"{table}\n`{config['command']}`\n{_growth(stored)}{_error(stored)}"
    )


def _growth(stored: Path) -> str:
    if not (stored / "speed-growth-cpu.csv").exists():
        return ""
    config = json.loads((stored / "speed-growth-cpu.json").read_text(encoding="utf-8"))
    picture = "benchmarks/results/speed-growth-cpu.png"
    return f"\n![Cost as batch, model, classes and buffer grow]({picture})\n\n`{config['command']}`\n"


def _error(stored: Path) -> str:
    """How far each engine's meta-gradient is from the exact one, along training."""
    path = stored / "speed-error-cpu.csv"
    if not path.exists():
        return ""
    config = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    frame = pd.read_csv(path)
    grouped = frame.groupby(["model", "optimizer", "step", "engine"], sort=False)[["cosine", "relative_error"]]
    rows = [
        f"| {MODELS[model]}, {name.upper()} | {step} | {engine} | {part.cosine:.6f} | {part.relative_error:.1e} |\n"
        for (model, name, step, engine), part in grouped.median().iterrows()
    ]
    return (
        "\nThe error of a float32 meta-gradient against forward mode in float64 (which equals `unrolled` to 1e-10), "
        f"along training on {config['data']}, medians over {config['seeds']} seeds:\n\n"
        "| | step | engine | cosine | relative error |\n| --- | ---: | --- | ---: | ---: |\n"
        f"{''.join(rows)}\n`{config['command']}`\n"
    )


def _memory(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    frame = pd.read_csv(path)
    found: dict[str, dict[str, str]] = {}
    for model, part in frame.groupby("model", sort=False):
        base = part.loc[part.contender == "ERM", "whole"].iloc[0]
        found[str(model)] = {row.contender: f"{row.whole / base:.2f}" for row in part.itertuples()}
    return found


def _why_not(config: dict[str, dict[str, dict[str, str]]], setting: tuple[str, str], contender: str) -> str:
    error = config["errors"].get(", ".join(setting), {}).get(contender)
    return "–" if error is None else f"– ({error.split(':')[0]})"


def _machine(config: dict[str, dict[str, str]]) -> str:
    machine = config["machine"]
    return machine.get("accelerator") or f"{machine['cores']} cores of an {machine['processor']}"


def main() -> None:
    """Rewrite README.md, and draw the growth plots."""
    growth = STORED / "speed-growth-cpu.csv"
    if growth.exists():
        frame = pd.read_csv(growth)
        draw_growth(
            frame, summary(frame[frame.varied != "buffer capacity"], ["varied", "value"]), growth.with_suffix(".png")
        )
    readme = Path("README.md")
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

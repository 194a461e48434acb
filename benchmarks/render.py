"""Writes the results sections of the pages from the stored files: ``python -m benchmarks.render``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import results
from benchmarks.contenders import CONTENDERS
from benchmarks.profiling import PARTS, WHOLE
from benchmarks.provenance import machine_name
from benchmarks.ranks import summarised
from benchmarks.speed import ALLOCATORS, CHANNELS_LAST, summary
from benchmarks.speed_figures import draw_growth, draw_steps

STORED = Path("benchmarks/results")
COMPARISONS = {
    "compare-digits-mlp": "scikit-learn's digits, small MLP",
    "compare-cifar10-conv": "CIFAR-10, small conv net",
    "compare-tiny-imagenet-50-conv": "Tiny ImageNet, 50 classes, small conv net",
}
LEAST_SEEDS = 3
"""With fewer, a comparison is stored but not reported."""

PEERS = ("Betty darts", "TorchOpt", "higher", "double backward")
WRAPPERS = {"ddp": "DDP", "fsdp": "FSDP2"}
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
MODELS = {"conv": "conv net", "resnet20": "ResNet-20", "mlp": "MLP", "vit-tiny": "ViT-Tiny"}
IN_CHANNELS_LAST = {f"{model}{CHANNELS_LAST}": f"{MODELS[model]}, channels last" for model in ("conv", "resnet20")}
"""Of the times of steps: where the user's model is in that order itself. Not in the picture."""


def rendered(page: str, sections: Mapping[str, Callable[[Path], str]], stored: Path = STORED) -> str:
    """A page with each section between its markers written anew."""
    for name, content in sections.items():
        section = re.search(rf"(?s)(<!-- {name}: .*? -->\n)(.*?)<!-- end of {name} -->", page)
        assert section is not None, f"the page has no section between markers for {name}"
        page = f"{page[: section.start(2)]}\n{content(stored)}\n{page[section.end(2) :]}"
    return page


def comparisons(stored: Path) -> str:
    """A table, a picture and the command of each stored comparison that has enough seeds to be reported."""
    parts, too_few = [], []
    for folder, title in COMPARISONS.items():
        table = stored / folder / "results.csv"
        if not table.exists():
            continue
        config = json.loads((stored / folder / "config.json").read_text(encoding="utf-8"))
        ran = config["configuration"]
        if ran["seeds"] < LEAST_SEEDS:
            too_few.append(f"[{title}](benchmarks/results/{folder}/table.md)")
            continue
        summaries = results.summarise(pd.read_csv(table))
        parts.append(
            f"### {title}\n\n"
            f"{ran['train_rows']:,} training rows, {ran['recipe']['epochs']} epochs, on {machine_name(config)}; "
            "± is the 95 % interval over seeds, differences are paired by seed.\n\n"
            f"{results.markdown(summaries)}\n"
            f"![Test accuracy by method and change of margin: {title}](benchmarks/results/{folder}/compare.png)\n\n"
            f"`{config['command']}`\n"
        )
    if too_few:
        parts.append(f"Stored, but with fewer than {LEAST_SEEDS} seeds no result yet: {', '.join(too_few)}.\n")
    return "\n".join(parts)


def speed(stored: Path) -> str:
    """Time and memory relative to plain training, by model, and one meta-gradient alone."""
    columns, added = {}, []
    steps = _measured(stored, "steps", MODELS | IN_CHANNELS_LAST)
    memory, profile = _measured(stored, "memory"), _measured(stored, "profile")
    sources = [_config(path) for path in (*steps.values(), *profile.values(), *memory.values())]
    for title, path in steps.items():
        config = _config(path)
        ratios = _ratios(path).set_index("contender")["median"]
        shown = {name: f"– ({error.split(':')[0]})" for name, error in config["errors"].items()}
        columns[title] = shown | {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
        added.append([title, *_added(ratios)])
    if not sources:
        return "Not measured yet.\n"
    versions = sources[0]["versions"]
    return (
        f"Relative to one plain training step of the same round, batch {sources[0]['batch']}, on "
        f"{machine_name(sources[0])}; torch {versions['torch']}, betty-ml {versions['betty-ml']}, torchopt "
        f"{versions['torchopt']}, higher {versions['higher']}.\n\n"
        "![Time of a step by model, optimizer and method](benchmarks/results/speed-steps-cpu.png)\n\n"
        "Where a peer is missing it does not run there, or was not measured; the long table below says which.\n\n"
        "What a meta-update adds to a step (“every 1” less 1.00), and how many times as much it is with the peers:\n\n"
        f"{results.markdown_table([['', 'MOLERE', *PEERS], *added])}\n"
        f"{_profile(profile)}"
        "<details><summary>All contenders: engines, orders, one meta-gradient alone, and memory</summary>\n\n"
        "Medians. The lines “gradient” are one meta-gradient alone, in the same unit; Betty's has a training step with "
        "it, for it looks ahead by taking it.\n\n"
        f"{_contenders(columns)}\n"
        "Peak memory of a whole process of its own, as glibc allocates it and with what is freed handed back "
        f"(`MALLOC_MMAP_THRESHOLD_={ALLOCATORS['handing back']['MALLOC_MMAP_THRESHOLD_']}`):\n\n"
        f"{_contenders(_peaks(memory))}\n"
        + "".join(f"- `{command}`\n" for command in dict.fromkeys(s["command"] for s in sources))
        + "\n</details>\n"
        + _growth(stored)
        + _error(stored)
    )


def _contenders(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table with a row for each contender that any column has."""
    shown = [name for name in CONTENDERS if any(name in column for column in columns.values())]
    rows = [[name, *(column.get(name, "–") for column in columns.values())] for name in shown]
    return results.markdown_table([["", *columns], *rows])


def _peaks(paths: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Peak memory relative to plain training, by model and way to allocate, then by contender."""
    columns = {}
    for title, path in paths.items():
        for allocator, frame in pd.read_csv(path).groupby("allocator"):
            peaks = frame.groupby("contender").whole.median()
            columns[f"{title}, {allocator}"] = {name: f"{peak / peaks['ERM']:.2f}" for name, peak in peaks.items()}
    return columns


def _profile(paths: Mapping[str, Path]) -> str:
    """The parts of a step, and what is left of it for training itself."""
    columns = {}
    for title, path in paths.items():
        parts = _ratios(path).set_index("contender")["median"]
        rest = parts[WHOLE] - sum(parts[part] for part in PARTS)
        columns[title] = [f"{share:.3f}" for share in (parts[WHOLE], rest, *(parts[part] for part in PARTS))]
    if not columns:
        return ""
    rows = zip(["a step with a meta-update", "training itself", *PARTS], *columns.values(), strict=True)
    title = (
        "Where the time of a step with a meta-update goes, by `torch.profiler`, in plain steps taken in turn with it:"
    )
    return f"{title}\n\n{results.markdown_table([['', *columns], *map(list, rows)])}\n"


def _measured(stored: Path, kind: str, models: Mapping[str, str] = MODELS) -> dict[str, Path]:
    """Where measurements of a kind are stored, by model and optimizer."""
    paths = {
        f"{model}, {optimizer}": stored / f"speed-{kind}-{m}-{o}-cpu.csv"
        for m, model in models.items()
        for o, optimizer in OPTIMIZERS.items()
    }
    return {title: path for title, path in paths.items() if path.exists()}


def _ratios(path: Path) -> pd.DataFrame:
    return summary(pd.read_csv(path), ["model", "optimizer"])


def _added(ratios: pd.Series) -> list[str]:
    """What MOLERE's meta-update adds to a step, and the peers' relative to it."""
    added = ratios - 1.0
    ours = added["MOLERE, every 1"]
    peers = (added.get(f"{peer}, every 1") for peer in PEERS)
    return [f"{ours:.2f}", *("–" if peer is None else f"{peer / ours:.1f} ×" for peer in peers)]


def ranks(stored: Path) -> str:
    """What several processes cost."""
    path = stored / "ranks-cpu.csv"
    if not path.exists():
        return "Not measured yet.\n"
    config = _config(path)
    rows = [
        f"| {WRAPPERS[row.wrap]} | {row.ranks} | {row.time:.2f} ({row.time_low:.2f}–{row.time_high:.2f}) "
        f"| {row.step_messages:.0f} | {_bytes(row.step_bytes)} "
        f"| {row.meta_messages:.0f} | {_bytes(row.meta_bytes)} | {row.memory:.2f} |\n"
        for row in summarised(pd.read_csv(path)).itertuples()
    ]
    return (
        f"`{config['model']}`, {config['parameters']:,} parameters ({_bytes(4 * config['parameters'])}), batch "
        f"{config['batch']} a process with `indices`, gloo, one thread a process, on {machine_name(config)}; torch "
        f"{config['versions']['torch']}. Time: a MOLERE step (`every=5`) relative to a plain one under the same "
        "wrapper, median and quartiles. Messages and bytes: what a step adds to plain training, a process. Memory: the "
        "peak of a process relative to plain training. More processes than cores share them.\n\n"
        "| wrapper | processes | time | messages, a step | bytes | messages, with a meta-update | bytes | memory |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        f"{''.join(rows)}\n`{config['command']}`\n"
    )


def _bytes(number: float) -> str:
    for size, unit in ((1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _growth(stored: Path) -> str:
    if not (stored / "speed-growth-cpu.csv").exists():
        return ""
    config = _config(stored / "speed-growth-cpu.csv")
    picture = "benchmarks/results/speed-growth-cpu.png"
    return f"\n![Cost as batch, model, classes and buffer grow]({picture})\n\n`{config['command']}`\n"


def _error(stored: Path) -> str:
    """How far each engine's meta-gradient is from the exact one, along training."""
    path = stored / "speed-error-cpu.csv"
    if not path.exists():
        return ""
    config = _config(path)
    frame = pd.read_csv(path)
    grouped = frame.groupby(["model", "optimizer", "step", "engine"], sort=False)[["cosine", "relative_error"]]
    rows = [
        f"| {MODELS[model]}, {OPTIMIZERS[name]} | {step} | {engine} | {part.cosine:.6f} | {part.relative_error:.1e} |\n"
        for (model, name, step, engine), part in grouped.median().iterrows()
    ]
    return (
        "\nThe error of a float32 meta-gradient against forward mode in float64 (which equals `unrolled` to 1e-10), "
        f"along training on {config['data']}, medians over {config['seeds']} seeds. “In training” is what a step "
        "takes: the difference starts from the losses of training, in the memory order of the model's own.\n\n"
        "| | step | engine | cosine | relative error |\n| --- | ---: | --- | ---: | ---: |\n"
        f"{''.join(rows)}\n`{config['command']}`\n"
    )


def _config(path: Path) -> dict[str, Any]:
    """What is stored beside a CSV file."""
    config: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return config


PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"results": comparisons, "speed": speed},
    "docs/distributed.md": {"ranks": ranks},
}
"""The sections of each page, by the names of their markers."""


def main() -> None:
    """Rewrite the pages, and draw the pictures of the cost."""
    if steps := _measured(STORED, "steps"):
        columns = {title: _ratios(path) for title, path in steps.items()}
        draw_steps(columns, ["MOLERE", *PEERS], STORED / "speed-steps-cpu.png")
    growth = STORED / "speed-growth-cpu.csv"
    if growth.exists():
        frame = pd.read_csv(growth)
        draw_growth(
            frame, summary(frame[frame.varied != "buffer capacity"], ["varied", "value"]), growth.with_suffix(".png")
        )
    for name, sections in PAGES.items():
        page = Path(name)
        page.write_text(rendered(page.read_text(encoding="utf-8"), sections), encoding="utf-8")


if __name__ == "__main__":
    main()

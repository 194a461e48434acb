"""The part of the page of results that says what reweighting costs: time, memory and messages beside plain training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from benchmarks import report_cost
from benchmarks.provenance import machine_name
from benchmarks.ranks import summarised
from benchmarks.report import markdown
from benchmarks.speed import steps_stored, steps_table, summary
from benchmarks.speed_figures import draw_steps


def section(results: Path) -> str:
    """The tables of all stored measurements, the figure drawn; empty without any."""
    parts = [*_steps(results), *_memory(results), *_ranks(results), *_report(results)]
    return "## What it costs\n\n" + "\n".join(parts) + "\n" if parts else ""


def _steps(results: Path) -> Iterator[str]:
    for device in ("cpu", "cuda"):
        panels = steps_stored(results, device)
        if panels:
            picture = results / f"speed-steps-{device}.png"
            draw_steps(panels, picture)
            yield (
                "Time of a step relative to plain training (ERM), batch 128: medians of rounds in which all take "
                f"turns, in the figure with quartiles. {_made(results, f'speed-steps-*-{device}.json')}\n\n"
                f"{markdown(steps_table(panels))}\n![time of a step]({picture.name})\n"
            )


def _memory(results: Path) -> Iterator[str]:
    for device in ("cpu", "cuda"):
        files = sorted(results.glob(f"speed-memory-*-{device}.csv"))
        if files:
            keys = ["model", "optimizer", "allocator"]
            frame = pd.concat(map(pd.read_csv, files))
            found = {name: summary(frame, keys, name).set_index([*keys, "contender"])["median"] for name in MEMORY}
            shown = pd.DataFrame({MEMORY[name]: part.map("{:.2f}".format) for name, part in found.items()})
            shown = shown.reset_index().query("contender != 'ERM'")
            yield (
                f"Peak memory relative to plain training. {_made(results, f'speed-memory-*-{device}.json')}\n\n"
                f"{markdown(shown)}"
            )


MEMORY = {"added": "what training adds", "whole": "the whole process"}


def _ranks(results: Path) -> Iterator[str]:
    file = results / "ranks-cpu.csv"
    if file.exists():
        frame = summarised(pd.read_csv(file))
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        frame["wrap"] = frame["wrap"].map({"ddp": "DDP", "fsdp": "FSDP2"})
        shown = _formatted(
            frame,
            {
                "wrapper": ("wrap", ""),
                "processes": ("ranks", ""),
                "messages more": ("step_messages", ".0f"),
                "bytes more": ("step_bytes", ",.0f"),
                "messages more, meta-update": ("meta_messages", ".0f"),
                "bytes more, meta-update": ("meta_bytes", ",.0f"),
                "plain training's messages": ("plain_messages", ".0f"),
                "and bytes": ("plain_bytes", ",.0f"),
            },
        )
        yield (
            f"What a process sends in a step, and how much more with reweighting, without and with a meta-update: "
            f"{about['model']}, {about['parameters']:,} parameters, a batch of {about['batch']} a process, gloo. "
            f"{_made(results, file.with_suffix('.json').name)}\n\n{markdown(shown)}"
        )


def _report(results: Path) -> Iterator[str]:
    file = results / report_cost.FILE
    if file.exists():
        shown = _formatted(
            pd.read_csv(file),
            {
                "rows": ("rows", ",.0f"),
                "to record once, s": ("record_seconds", ".2f"),
                "file, MB": ("file_mb", ".1f"),
                "to write the report, s": ("write_seconds", ".1f"),
                "report, MB": ("page_mb", ".1f"),
                "until it is drawn, s": ("drawn_seconds", ".2f"),
            },
        )
        yield (
            "A `Recorder` (it records at every 1,000 steps by default) and its report with thumbnails, in "
            f"headless Chromium. {_made(results, file.with_suffix('.json').name)}\n\n{markdown(shown)}"
        )


def _formatted(frame: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """By title a column of the frame and its format."""
    return pd.DataFrame({title: frame[name].map(f"{{:{form}}}".format) for title, (name, form) in columns.items()})


def _made(results: Path, pattern: str) -> str:
    """Machine and commands of stored measurements."""
    made = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob(pattern))]
    commands = dict.fromkeys(f"`{each['command']}`" for each in made)
    return f"{machine_name(made[-1])}; {' '.join(commands)}"

"""``python -m benchmarks gpu``: all that wants an accelerator, in one command that goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.provenance import provenance
from benchmarks.store import write
from torch_molere import MetaReweighter

MODES = ("plain", "bf16", "fp16 and scaler", "compiled", "channels last", "dropout", "fused optimizer")
ENGINES = ("finite", "forward", "reverse")
LOOSE = {"bf16": 0.25, "fp16 and scaler": 0.05}
"""How far the meta-gradient may be from that of double precision, relative; 0.03 elsewhere."""


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Dropout(dropout), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * 16, 10))


def meta_gradient(mode: str, engine: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(32,)`` the meta-gradient of one step."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(48, 3, 16, 16, dtype=torch.double), torch.randint(10, (48,))
    inputs, targets = inputs.to(device, dtype), targets.to(device)
    model: Any = network(0.2 if mode == "dropout" else 0.0).to(device, dtype)
    if mode == "channels last":
        model, inputs = (
            model.to(memory_format=torch.channels_last),
            inputs.contiguous(memory_format=torch.channels_last),
        )
    if mode == "compiled":
        model = torch.compile(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=mode == "fused optimizer")
    scaler = torch.amp.GradScaler(device.type) if mode == "fp16 and scaler" else None
    validation = [(inputs[32:], targets[32:])]
    reweighter = MetaReweighter(
        model, optimizer, validation=validation, every=1, warmup_steps=3, hypergradient=engine, scaler=scaler
    )
    low = {"bf16": torch.bfloat16, "fp16 and scaler": torch.float16}.get(mode)
    for step in range(4):
        torch.manual_seed(step)
        with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None and dtype != torch.double):
            result = reweighter.step((inputs[:32], targets[:32], torch.arange(32)))
    assert result.meta_gradient is not None
    return result.meta_gradient


def correctness(device: torch.device) -> Iterator[dict[str, Any]]:
    """Each mode and engine: the relative distance from reverse mode in double precision, and whether that is close."""
    for mode in MODES:
        if mode in ("fp16 and scaler", "fused optimizer") and device.type == "cpu":
            continue
        exact = None if mode == "dropout" else meta_gradient("plain", "reverse", device, torch.double)
        for engine in ENGINES:
            row: dict[str, Any] = {"part": "correctness", "mode": mode, "engine": engine}
            try:
                found = meta_gradient(mode, engine, device).double()
            except (RuntimeError, TypeError, NotImplementedError) as error:
                yield row | {"refused": str(error)[:200]}
                continue
            if exact is None:  # masks are the device's own: against reverse mode in single precision
                exact = meta_gradient(mode, "reverse", device).double()
            distance = float((found - exact).norm() / exact.norm())
            yield row | {"distance": distance, "right": distance <= LOOSE.get(mode, 0.03)}


def parts(device: str, root: Path, cache: Path, out: Path) -> list[tuple[str, list[str]]]:
    """(name, command): each is stored by the command itself, which skips what it has."""
    speed = [sys.executable, "-m", "benchmarks.speed"]
    on = ["--device", device, "--out", str(out)]
    study = [sys.executable, "-m", "benchmarks"]
    where = ["--root", str(root), "--cache", str(cache)]
    return [
        ("speed, conv nets", [*speed, "steps", "--models", "conv,resnet20,resnet18", "--optimizers", "sgd", *on]),
        (
            "speed, large",
            [*speed, "steps", "--models", "resnet50,vit_b_16", "--optimizers", "adamw", "--rounds", "5", *on],
        ),
        ("speed, bf16", [*speed, "steps", "--models", "resnet50", "--optimizers", "sgd", "--precision", "bf16", *on]),
        ("memory", [*speed, "memory", *on]),
        ("order", [*study, "order", *where, "--seeds", "1", "--out", str(out / "order")]),
        ("rare", [*study, "rare", *where, "--seeds", "1", "--out", str(out / "rare")]),
    ]


def run(
    minutes: Annotated[float, typer.Option(min=0.1, help="No new part is begun after so long.")] = 25.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command.")] = "cuda",
    root: Annotated[Path, typer.Option(help="The folder with fashion-mnist/ and cifar10/.")] = Path("data"),
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path("runs/cache"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results/gpu"),
) -> None:
    """Correctness on the accelerator, speed beside plain training and peers, memory, and studies while time is left.

    A part that has ended is not run again; delete its entry in ``done.json`` for that.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; --device cpu tries the command", param_hint="--device")
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "done.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    done["made_by"] = provenance("benchmarks", sys.argv[1:], torch.device(device))
    if "correctness" not in done:
        done["correctness"] = []
        for row in correctness(torch.device(device)):
            done["correctness"].append(row)
            typer.echo(json.dumps(row))
        write(path, json.dumps(done, indent=1) + "\n")
    for name, command in parts(device, root, cache, out):
        left = 60.0 * minutes - (time.monotonic() - started)
        if name in done or left <= 0.0:
            continue
        typer.echo(f"{name}: {' '.join(command[1:])}")
        try:
            done[name] = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            typer.echo(f"{name}: stopped, the time is over")
            break
        write(path, json.dumps(done, indent=1) + "\n")
    wrong = [row for row in done["correctness"] if row.get("right") is False]
    if wrong:
        typer.echo(f"{len(wrong)} meta-gradients are wrong: {wrong}")
        raise typer.Exit(1)

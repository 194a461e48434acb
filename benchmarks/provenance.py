"""Where figures come from: the command, the versions and the kind of machine, stored beside every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import torch_molere


def provenance(module: str, arguments: Sequence[str], device: torch.device, also: Sequence[str] = ()) -> dict[str, Any]:
    """What to store beside the results of ``python -m <module> <arguments>``.

    Args:
        also: further distributions whose versions matter; None where one is not installed.
    """
    return {
        "command": shlex.join(["python", "-m", module, *map(without_machine, arguments)]),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "torchvision", *also)},
            "torch_molere": torch_molere.__version__,
        },
        "machine": machine(device),
    }


def without_machine(argument: str) -> str:
    """An argument with a path that leads out of the repository cut down to the last name."""
    return re.sub(r"(^|[:=])(?:/|\.\./)(?:.*/)?([^/]+)/?$", r"\1…/\2", argument)


def machine(device: torch.device) -> dict[str, Any]:
    """The kind of machine: its processor and, if one computes, its accelerator."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"^model name\s*: (.+)$", information.read_text(), re.MULTILINE)
        processor = match[1] if match else processor
    found: dict[str, Any] = {"processor": processor, "cores": os.cpu_count()}
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        found["accelerator"] = device.type
    return found


def machine_name(config: Mapping[str, Any]) -> str:
    """The machine of a stored configuration in words."""
    machine = config["machine"]
    name: str = machine.get("accelerator") or f"{machine['cores']} cores of an {machine['processor']}"
    return name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

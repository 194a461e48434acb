"""What recording a run costs, how large its report is and how soon a browser has drawn it, by the number of rows."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.provenance import provenance
from benchmarks.store import write
from torch_molere import MetaReweighter, with_indices
from torch_molere.report import Recorder, Run

STEPS = 200
FILE = "report-cpu.csv"


def cost(
    rows: Annotated[list[int], typer.Option(min=1000, help="Training rows.")] = [5_000, 50_000, 1_000_000],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
) -> None:
    """Record a run on made rows, write its report with thumbnails, and open it in Chromium."""
    torch.set_num_threads(1)
    found = []
    for count in rows:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(count, repeats, Path(folder)))
        typer.echo("  ".join(f"{name} {value:g}" for name, value in found[-1].items()))
    write(out / FILE, pd.DataFrame(found).round(4).to_csv(index=False))
    made = provenance("benchmarks", sys.argv[1:], torch.device("cpu"), ("playwright", "pyarrow"))
    write((out / FILE).with_suffix(".json"), json.dumps({"repeats": repeats, **made}, indent=1) + "\n")


def measured(count: int, repeats: int, folder: Path) -> dict[str, float]:
    """Of a run with so many rows; seconds are medians."""
    from torch_molere.report.page import write as write_page  # which needs the extra 'report'
    from torch_molere.report.pictures import Pictures

    reweighter = trained(count)
    recorder = Recorder(reweighter, folder / "run")
    record = median(recorder.record, repeats)
    file = max((folder / "run").glob("rows-*.parquet"))
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 255, (1_000, 32, 32, 3), dtype=np.uint8))
    pictures = Pictures(folder / "images.npy")
    page = folder / "report.html"
    made = median(lambda: write_page(Run(folder / "run"), page, picture=lambda row: pictures(row % 1_000)), 1)
    drawn = opened(page, repeats)
    return {
        "rows": count,
        "record_seconds": record,
        "file_mb": file.stat().st_size / 1e6,
        "write_seconds": made,
        "page_mb": page.stat().st_size / 1e6,
        "drawn_seconds": drawn,
    }


def trained(count: int) -> MetaReweighter:
    """A small network after two passes over rows of which a fifth has a wrong label."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 16, generator=generator)
    targets = inputs[:, :10].argmax(dim=1)
    wrong = torch.rand(count, generator=generator) < 0.2
    targets[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    loader = DataLoader(
        with_indices(TensorDataset(inputs, targets)), batch_size=-(-count // (STEPS // 2)), shuffle=True
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    reweighter = MetaReweighter(model, torch.optim.Adam(model.parameters(), lr=1e-2), warmup_steps=20)
    for _ in range(2):
        for batch in loader:
            reweighter.step(batch)
    return reweighter


def median(call: Callable[[], Any], repeats: int) -> float:
    """Seconds that a call takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def opened(page: Path, repeats: int) -> float:
    """Seconds from opening a file in a new tab until its charts, galleries and table are drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )

        def load() -> None:
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-drawn=yes]", state="attached", timeout=60_000)
            tab.close()

        load()  # the browser's own start
        return median(load, repeats)

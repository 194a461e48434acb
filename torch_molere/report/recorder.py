"""Snapshots of a run on disk: numbers over time, and what was known of each row at several moments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_molere.arguments import check_count
from torch_molere.distributed.collectives import rank

try:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(
        f"torch_molere.report needs {error.name}: pip install 'torch-molere[report]'", name=error.name
    ) from error

if TYPE_CHECKING:
    from torch_molere.reweighter import MetaReweighter

NUMBERS = "metrics.jsonl"
COUNTS = ("row", "seen", "meta_seen", "target", "prediction")


class Recorder:
    """Keeps what a run finds out about its rows, for ``python -m torch_molere report FOLDER``.

    Call :meth:`step` after each training step, or :meth:`record` where you like, such as once an epoch::

        recorder = Recorder(reweighter, "runs/first")
        for epoch in range(epochs):
            for batch in loader:
                reweighter.step(batch)
            recorder.record(epoch=epoch, test_accuracy=evaluate(model))

    Each record is one line of ``metrics.jsonl`` (:meth:`MetaReweighter.metrics` and your own numbers) and one file
    ``rows-<step>.parquet`` (:meth:`SampleHistory.table`, single precision). Files are written beside and renamed, so
    that a run that is killed leaves whole ones. Of more than ``keep`` files every second one goes, but the last.
    Where several ranks train together the first one writes; every rank has the whole history.

    Args:
        reweighter: whose history and metrics are kept.
        folder: made if it is not there. A run that is resumed goes on in it.
        every: :meth:`step` records at every so many optimizer steps.
        keep: the most files of rows, at least 2.

    Raises:
        ImportError: without pandas and pyarrow (``pip install 'torch-molere[report]'``).
        ValueError: for an argument out of its range.
    """

    def __init__(self, reweighter: MetaReweighter, folder: str | Path, *, every: int = 1000, keep: int = 20) -> None:
        self.reweighter = reweighter
        self.folder = Path(folder)
        self.every = check_count("every", every, 1)
        self.keep = check_count("keep", keep, 2)
        self.folder.mkdir(parents=True, exist_ok=True)

    def step(self, **numbers: float) -> None:
        """Record if a multiple of ``every`` steps has been taken."""
        if self.reweighter.steps % self.every == 0:
            self.record(**numbers)

    def record(self, **numbers: float) -> None:
        """Record now.

        Args:
            **numbers: your own, such as ``epoch`` or ``test_accuracy``: shown over the steps.

        Raises:
            TypeError: for a value that is no number.
        """
        try:
            own = {name: float(value) for name, value in numbers.items()}
        except (TypeError, ValueError) as error:
            raise TypeError(f"record() takes numbers, got {numbers!r:.120}: {error}") from error
        if rank() != 0:
            return
        step = self.reweighter.steps
        line = json.dumps({"step": step, **self.reweighter.metrics(), **own})
        with (self.folder / NUMBERS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        columns: dict[str, Any] = {
            name: column.numpy() if name in COUNTS else column.float().numpy()
            for name, column in self.reweighter.history.table().items()
        }
        path = self.folder / f"rows-{step:010d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.table(columns), partial, compression="zstd")
        os.replace(partial, path)
        files = sorted(self.folder.glob("rows-*.parquet"))
        if len(files) > self.keep:
            for old in files[-2::-2]:
                old.unlink()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.record()


class Run:
    """A recorded run, read from its folder.

    Args:
        folder: of a :class:`Recorder`.

    Attributes:
        numbers: one row a record, with ``step`` and the numbers.
        steps: of the files of rows, ascending.

    Raises:
        FileNotFoundError: if there is no run in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = sorted(self.folder.glob("rows-*.parquet"))
        if not self._files:
            raise FileNotFoundError(f"{self.folder} holds no run: a torch_molere.report.Recorder writes one")
        self.steps = [int(file.stem.removeprefix("rows-")) for file in self._files]
        lines = (self.folder / NUMBERS).read_text(encoding="utf-8").splitlines()
        self.numbers = pd.DataFrame([found for line in lines if (found := _parsed(line)) is not None])
        if len(self.numbers):  # a run that was resumed tells some steps twice
            self.numbers = self.numbers.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)

    def rows(self, number: int = -1) -> pd.DataFrame:
        """What was known of each row at the ``number``-th file (the last by default), with ``row`` as the index."""
        return pq.read_table(self._files[number]).to_pandas().set_index("row")


def _parsed(line: str) -> dict[str, float] | None:
    """A line of numbers; None for one that a killed run left in part."""
    try:
        found: dict[str, float] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found

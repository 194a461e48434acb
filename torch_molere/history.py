"""What training saw of each row of the dataset: a view of which instances are hard or wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_molere.distributed import everyones, summed
from torch_molere.journal import Journal
from torch_molere.samples import Samples

_COLUMNS = ("seen", "loss", "margin", "correct", "held_out", "weighed", "weight")


class SampleHistory:
    """Means over all encounters with each dataset row; kept for batches that carry ``indices``.

    Takes seven numbers a row, and time independent of how many rows there are.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal or Journal()
        self._sums = torch.zeros(0, len(_COLUMNS))

    def record(self, samples: Samples, weights: Tensor, val_mask: Tensor, weighed: Tensor) -> None:
        """Add one batch; weights count where ``weighed``: after warm-up, for instances on the training side."""
        rows = samples.on_host.rows
        if samples.indices is None or rows is None:
            return
        self._reserve(max(rows) + 1, samples.losses.device)
        ones = torch.ones_like(samples.losses)
        margins = torch.full_like(ones, torch.nan) if samples.classes is None else samples.margins
        columns = [ones, samples.losses, margins, samples.correct, val_mask, weighed, weighed * weights]
        values = torch.stack([column.to(self._sums.dtype) for column in columns], dim=1)
        self._journal.keep_rows(self._sums, samples.indices)
        self._sums.index_add_(0, samples.indices, values)

    def table(self) -> dict[str, Tensor]:
        """One entry for each of the R rows that this process has seen, in ascending order, on the CPU.

        Returns:
            ``row`` (long); ``seen``, the number of encounters (long); and, in float32, the means of ``loss``,
            ``margin`` (the probabilistic margin, NaN without class indices), ``correct`` (how often the classifier was
            right), ``held_out`` (how often it was validation) and ``weight`` (NaN where it was never weighed). Wrong
            labels show as large losses and small margins; ``pandas.DataFrame(history.table())`` sorts them. By weight
            they are small against a clean validation set and large against hard instances.
        """
        sums = self._sums.cpu()
        row = sums[:, 0].nonzero().squeeze(1)
        seen, loss, margin, correct, held_out, weighed, weight = sums[row].unbind(1)
        return {
            "row": row,
            "seen": seen.long(),
            "loss": loss / seen,
            "margin": margin / seen,
            "correct": correct / seen,
            "held_out": held_out / seen,
            "weight": weight / weighed,
        }

    def together(self) -> SampleHistory:
        """The history of all processes that train together, all of which must call this."""
        sums = self._sums
        told, _ = everyones([len(sums)], sums.device)
        history = SampleHistory()
        history._reserve(max(rows for (rows,) in told), sums.device)
        history._sums[: len(sums)] = sums
        (history._sums,) = summed([history._sums])
        return history

    def state_dict(self) -> dict[str, Any]:
        """The sums behind the means."""
        return {"sums": self._sums.clone()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Put back what :meth:`state_dict` gave, on ``device``.

        Raises:
            ValueError: for sums of another shape or dtype.
        """
        sums = state["sums"]
        if not isinstance(sums, Tensor) or sums.shape[1:] != self._sums.shape[1:] or not sums.is_floating_point():
            found = f"{tuple(sums.shape)} {sums.dtype}" if isinstance(sums, Tensor) else type(sums).__name__
            raise ValueError(f"the history's sums must be floating (rows, {len(_COLUMNS)}), got {found}")
        self._sums = sums.to(device, self._sums.dtype, copy=True)

    def _reserve(self, rows: int, device: torch.device) -> None:
        if rows > len(self._sums):
            larger = torch.zeros(max(rows, 2 * len(self._sums)), len(_COLUMNS), device=device)
            larger[: len(self._sums)] = self._sums
            self._journal.keep(self, "_sums")
            self._sums = larger

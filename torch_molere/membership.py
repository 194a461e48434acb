"""Which dataset rows are validation in some other process: a sampler that shuffles hands rows from one to another."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torch_molere.distributed import everyones, processes


class HeldElsewhere:
    """The rows that the other processes hold out. They tell each other at every batch what came and what went."""

    def __init__(self) -> None:
        self._rows: set[int] = set()
        self._met = False

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def meet(self, held: Iterable[int], device: torch.device) -> None:
        """Tell the others everything once, before the first batch (or the first after loading)."""
        if not self._met and processes() > 1:
            told, own = everyones(sorted(held), device)
            self._rows = {row for rank, rows in enumerate(told) if rank != own for row in rows}
            self._met = True

    def tell(
        self, came: Iterable[int], departed: Iterable[int], trained: Iterable[int], device: torch.device
    ) -> list[int]:
        """Tell the others, at every batch, what has changed.

        Args:
            came: rows of the batch that this process holds out.
            departed: rows that it has let go of since the last time.
            trained: rows of the batch that it trains on; those that another holds are told.
            device: that the processes' messages go through.

        Returns:
            The rows that this process must let go of: others hold them now, or train on them. Where several take a
            row at once the first of them has it, and where one trains on a row that another takes it is held.
        """
        if processes() == 1:
            return []
        came = set(came)
        went = {*departed, *(row for row in trained if row in self._rows)} - came
        told, own = everyones([*came, *(-1 - row for row in went)], device)
        taken: dict[int, int] = {}
        gone = {-1 - row for rows in told for row in rows if row < 0}
        for rank, rows in enumerate(told):
            for row in rows:
                if row >= 0:
                    taken.setdefault(row, rank)
        self._rows -= gone
        self._rows |= {row for row, rank in taken.items() if rank != own}
        self._rows -= {row for row, rank in taken.items() if rank == own}
        return [*(gone - taken.keys()), *(row for row, rank in taken.items() if rank != own)]

"""Whether the classifier overfits: the one time at which leaving hard instances out of training pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torch_molere.distributed import gathered
from torch_molere.journal import Journal
from torch_molere.states import whole

STANDARD_ERRORS = 2.0
"""How many of them the mean rise must exceed."""

LEAST = 20
"""The fewest rows that a rise is believed of."""

Losses = dict[int, float]


class OverfittingTest:
    """Has the loss of rows that are never trained on risen above its lowest?

    This is the generalisation loss of early stopping (Prechelt, "Early Stopping – But When?", 1998), with a test in
    place of a threshold: the rise is measured on the same rows, and its mean must exceed two of its standard errors.
    They are compared whenever a row is met once more, which is once an epoch where epochs show each row once. Once
    found, it stays found.

    Where several processes train together they observe apart and decide alike.

    Args:
        journal: notes its changes, so that those of a failed step can be taken back.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal or Journal()
        self.found = False
        self._waiting: list[list[float]] = []  # (step, row, loss) not yet shared with the other processes
        self._latest: Losses = {}
        self._lowest: Losses = {}  # as the latest were when their mean was lowest
        self._met: dict[int, bool] = {}  # the rows met since they were last compared

    def observe(self, step: int, rows: Sequence[int], losses: Sequence[float]) -> None:
        """The losses of some of the rows, at one step of training."""
        if not self.found:
            for row, loss in zip(rows, losses, strict=True):
                self._journal.append(self._waiting, [float(step), float(row), loss])

    def decide(self, device: torch.device) -> bool:
        """Take in what all processes have observed since the last time; ``device`` passes their messages.

        Returns:
            Whether it was found just now.
        """
        if self.found:
            return False
        own = torch.tensor(self._waiting, dtype=torch.double, device=device).reshape(-1, 3)
        everyones: list[list[float]] = gathered(own)[0].tolist()
        self._journal.keep(self, "found", "_waiting", "_lowest", "_met")
        self._waiting = []
        for _, row, loss in sorted(everyones, key=lambda entry: entry[0]):
            self._meet(int(row), loss)
        return self.found

    def _meet(self, row: int, loss: float) -> None:
        if row in self._met:
            self._compare()
            self._met = {}
        self._journal.put(self._met, row, True)
        self._journal.put(self._latest, row, loss)

    def _compare(self) -> None:
        both = [row for row in self._latest if row in self._lowest]
        rises = torch.tensor([self._latest[row] - self._lowest[row] for row in both], dtype=torch.double)
        if not both or rises.mean() < 0:
            self._lowest = dict(self._latest)
        elif len(both) >= LEAST:
            self.found = self.found or bool(rises.mean() > STANDARD_ERRORS * rises.std() / math.sqrt(len(both)))

    def state_dict(self) -> dict[str, Any]:
        """What was observed and found."""
        return {
            "found": self.found,
            "waiting": [list(entry) for entry in self._waiting],
            "latest": dict(self._latest),
            "lowest": dict(self._lowest),
            "met": list(self._met),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: for rows that are no integers or losses that are no finite numbers.
        """
        latest, lowest = (
            {whole(row, "a row of the overfitting test"): _finite(loss) for row, loss in state[name].items()}
            for name in ("latest", "lowest")
        )
        waiting = [[_finite(number) for number in entry] for entry in state["waiting"]]
        met = {whole(row, "a row of the overfitting test"): True for row in state["met"]}
        if any(len(entry) != 3 for entry in waiting) or not isinstance(state["found"], bool):
            raise ValueError("the overfitting test must have (step, row, loss) waiting and found True or False")
        self.found, self._waiting = state["found"], waiting
        self._latest, self._lowest, self._met = latest, lowest, met


def _finite(number: Any) -> float:
    if not isinstance(number, float) or not math.isfinite(number):
        raise ValueError(f"a loss of the overfitting test must be a finite number, got {number!r}")
    return number

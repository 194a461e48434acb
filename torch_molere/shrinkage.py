"""How strongly weights are pulled to one: a fixed λ, or one that follows from how far meta-gradients repeat."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from torch_molere.arguments import is_number

Given = float | Literal["auto"] | None

REPEATED = 0.03
"""λ times the repeated share, with "auto"; set in a trial on rows held out of training."""

START = 0.1
"""The repeated share that is believed before there is evidence."""

BELIEF = 200.0
"""How much evidence that belief counts as: about as much as four batches of 100 instances give."""

DECAY = 0.99
"""How much of the evidence stays at each meta-update."""

STRONGEST = 3.0
"""The largest λ of "auto": weights then differ by a few per cent."""


class Shrinkage:
    r"""λ of ``d̂ + λ (w̄ − 1)``, which φ is given in place of the meta-gradient.

    d̂_i is the meta-gradient of a row in standard deviations of its batch, m_i the mean of the row's earlier ones. Under
    a fixed λ weights settle at 1 − E[d̂ | what φ sees]/λ, whether what φ sees is signal or noise. With ``"auto"``, λ is
    ``0.03 / b``, at most 3, where

        b = Σ d̂_i m_i / Σ m_i²

    is the slope of a row's new meta-gradient on its memory, over past meta-updates with a decay of 0.99 and the rows
    that were seen before: 0 where meta-gradients of a row have nothing to do with each other, 1 where they repeat
    themselves exactly. Without memory (no ``indices``) λ stays where it starts, at 0.3.

    Args:
        given: λ ≥ 0, None for the bare meta-gradient, or ``"auto"``.

    Raises:
        ValueError: for another value.
    """

    def __init__(self, given: Given) -> None:
        if not (given is None or given == "auto" or (is_number(given) and 0.0 <= given < math.inf)):
            raise ValueError(f"shrinkage must be a number ≥ 0, None or 'auto', got {given!r}")
        self.given = given
        self._products = self._squares = 0.0

    @property
    def repeated(self) -> float:
        """b, the share of the meta-gradient that repeats itself, with the belief before all evidence counted in."""
        return (self._products + START * BELIEF) / (self._squares + BELIEF)

    @property
    def strength(self) -> float | None:
        """λ at present; None for the bare meta-gradient."""
        if self.given == "auto":
            return REPEATED / max(self.repeated, REPEATED / STRONGEST)
        return self.given

    def describe(self) -> str:
        """In words, for people."""
        return f"auto, {self.strength:.2g} now" if self.given == "auto" else f"{self.given}"

    def observe(self, evidence: Tensor, memory: Tensor, known: Tensor) -> None:
        """Count one batch in.

        Args:
            evidence: ``(B,)`` d̂.
            memory: ``(B,)`` m, before this batch.
            known: ``(B,)`` bool, which rows have a memory.
        """
        if self.given != "auto":
            return
        m = (memory * known).double()
        products, squares = (m * evidence.double()).sum().item(), (m * m).sum().item()
        self._products = DECAY * self._products + products
        self._squares = DECAY * self._squares + squares

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"products": self._products, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: for sums that no training gives. Nothing has changed then.
        """
        products, squares = state["products"], state["squares"]
        if not (is_number(products) and math.isfinite(products) and is_number(squares) and 0.0 <= squares < math.inf):
            raise ValueError(f"the shrinkage's sums must be finite, the second ≥ 0, got {products!r} and {squares!r}")
        self._products, self._squares = float(products), float(squares)

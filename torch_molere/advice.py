"""What is said after a step: transitions at INFO, and warnings where lines of a loop do nothing or do harm."""

from __future__ import annotations

import logging

from torch_molere.core import Core
from torch_molere.splitting import RandomSplitter

logger = logging.getLogger("torch_molere")

LABELS_EVERY = 100
"""Meta-updates from one look at the labels to the next."""

DOUBTED, MANY = -0.5, 0.15
"""A row is doubted whose running margin is below the first; a share of rows above the second is many."""


def advise(r: Core, rows: list[int] | None, meta: bool) -> None:
    """A step was taken.

    Args:
        r: the reweighter, with its new state.
        rows: of the step's first batch; None where the loop does not say.
        meta: whether there was a meta-update.
    """
    if meta:
        if r.meta_updates == 1:
            logger.info("first meta-update, at step %d, by engine %r", r.steps, r.engine)
        _of_labels(r)
    if rows is None:
        r.messages.once(
            "indices",
            "batches come without indices, so rows cannot be known again: the weighting has no memory of them and "
            "reweighter.history stays empty. Use DataLoader(with_indices(dataset)) and pass (inputs, targets, "
            "indices)",
        )
    elif r.warming_up:
        _of_warmup(r, rows)
    if r.steps == r.warmup_steps:
        logger.info("warm-up is over after %d steps: weights are the weighting's own from now on", r.steps)


def _of_warmup(r: Core, rows: list[int]) -> None:
    """Have most rows of the first batch come again? Then the warm-up is longer than an epoch."""
    if r.messages.first_rows is None:
        r.messages.first_rows = len(rows), set(rows)
        return
    size, missing = r.messages.first_rows
    missing.difference_update(rows)
    if 2 * len(missing) < size:
        r.messages.once(
            "warm-up",
            f"the warm-up is longer than an epoch: rows come again after {r.steps} steps, and weights stay equal for "
            f"{r.warmup_steps - r.steps} more. A run that ends before them reweights nothing; lower warmup_steps if "
            "that is so",
        )


def _of_labels(r: Core) -> None:
    """Is validation drawn by hardness, and do many rows look wrong? Those are what hard rows then are."""
    splitter = getattr(r.validation, "splitter", None)
    if r.meta_updates % LABELS_EVERY or splitter is None or isinstance(splitter, RandomSplitter):
        return
    if getattr(splitter, "sharpness", 1.0) <= 0.0:
        return
    share = r.history.share_below(DOUBTED)
    if share > MANY:
        r.messages.once(
            "labels",
            f"{100 * share:.0f} % of the rows are predicted as another class with certainty (running margin below "
            f"{DOUBTED}): if their labels are wrong, validation by hardness is drawn from wrong labels. Give "
            "trusted rows as validation=, or take ValidationBuffer(splitter=RandomSplitter()) or "
            "MarginSplitter(trim=...); reweighter.history shows the rows",
        )

"""What is said while a reweighter runs: each warning once, with its remedy; INFO at transitions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from torch_molere.losses import constants_of
from torch_molere.splitting import RandomSplitter

if TYPE_CHECKING:
    from torch_molere.hypergradients.check import EngineChoice
    from torch_molere.metrics import Tally
    from torch_molere.reweighter import MetaReweighter

logger = logging.getLogger("torch_molere")

LABELS_EVERY = 100
"""Meta-updates from one look at the labels to the next."""

DOUBTED, MANY = -0.5, 0.15
"""A row is doubted whose running margin is below the first; a share of rows above the second is many."""


class Messages:
    """Warnings of one reweighter."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._first_rows: tuple[int, set[int]] | None = None
        self._constants: dict[str, float] | None = None

    def once(self, topic: str, message: str) -> None:
        """A warning, once."""
        if topic not in self._said:
            self._said.add(topic)
            logger.warning(message)

    def skipped(self, error: RuntimeError) -> None:
        """No engine agrees with backward any more."""
        self.once(
            "skipped",
            "skipped a meta-update, and will skip others like it: no engine agrees with backward at this step. Most "
            f"likely the batch is fitted, so that its gradients are lost in rounding. {error}",
        )

    def at_start(self, optimizers: Sequence[Optimizer]) -> None:
        """Before the first loss: has training begun without this reweighter?"""
        if any(optimizer.state for optimizer in optimizers):
            self.once(
                "resumed",
                "the optimizer has taken steps already, but this MetaReweighter starts anew: if this is a resumed run, "
                "save reweighter.state_dict() beside the model's and load it too",
            )

    def of_loss(self, loss_fn: Any, trusted: bool, meta: bool) -> None:
        """Does the loss function keep numbers that change? Held instances are validated with the present ones.

        Args:
            loss_fn: of training.
            trusted: whether validation has rows of its own.
            meta: whether a meta-update is due; else only the first loss is looked at.
        """
        if self._constants is not None and not meta:
            return
        constants = constants_of(loss_fn)
        before, self._constants = self._constants, constants
        changed = [name for name, value in (before or {}).items() if constants.get(name, value) != value]
        if changed and not trusted:
            self.once(
                "constants",
                f"loss_fn keeps numbers that change from step to step ({', '.join(changed)}): instances held in the "
                "validation buffer are validated with the present ones, not those of their batch. If that is the lam "
                "of MixUp, give it with the targets, as a (B,) tensor: targets = (first, second, lam), and a loss_fn "
                "that reads them",
            )

    def after_step(self, r: MetaReweighter, rows: list[int] | None, meta: bool) -> None:
        """A step was taken.

        Args:
            r: the reweighter, with its new state.
            rows: of the step's first batch; None where the loop does not say.
            meta: whether there was a meta-update.
        """
        if meta:
            if r.meta_updates == 1:
                logger.info("first meta-update, at step %d, by engine %r", r.steps, r.engine)
            self._of_labels(r)
        if rows is None:
            self.once(
                "indices",
                "batches come without indices, so rows cannot be known again: the weighting has no memory of them and "
                "reweighter.history stays empty. Use DataLoader(with_indices(dataset)) and pass (inputs, targets, "
                "indices)",
            )
        elif r.warming_up:
            self._of_warmup(rows, r.steps, r.warmup_steps)
        if r.steps == r.warmup_steps:
            logger.info("warm-up is over after %d steps: weights are the weighting's own from now on", r.steps)

    def _of_warmup(self, rows: list[int], steps: int, warmup_steps: int) -> None:
        """Have most rows of the first batch come again? Then the warm-up is longer than an epoch."""
        if self._first_rows is None:
            self._first_rows = len(rows), set(rows)
            return
        size, missing = self._first_rows
        missing.difference_update(rows)
        if 2 * len(missing) < size:
            self.once(
                "warm-up",
                f"the warm-up is longer than an epoch: rows come again after {steps} steps, and weights stay equal for "
                f"{warmup_steps - steps} more. A run that ends before them reweights nothing; lower warmup_steps if "
                "that is so",
            )

    def _of_labels(self, r: MetaReweighter) -> None:
        """Is validation drawn by hardness, and do many rows look wrong? Those are what hard rows then are."""
        splitter = getattr(r.validation, "splitter", None)
        if r.meta_updates % LABELS_EVERY or splitter is None or isinstance(splitter, RandomSplitter):
            return
        if getattr(splitter, "sharpness", 1.0) <= 0.0:
            return
        share = r.history.share_below(DOUBTED)
        if share > MANY:
            self.once(
                "labels",
                f"{100 * share:.0f} % of the rows are predicted as another class with certainty (running margin below "
                f"{DOUBTED}): if their labels are wrong, validation by hardness is drawn from wrong labels. Give "
                "trusted rows as validation=, or take ValidationBuffer(splitter=RandomSplitter()) or "
                "MarginSplitter(trim=...); reweighter.history shows the rows",
            )


def say_end(tally: Tally, engines: EngineChoice) -> None:
    """A reweighter was closed or let go of: did it do anything?"""
    if tally.steps and not engines.updates:
        logger.warning(
            "MetaReweighter did nothing in %d steps: there was no meta-update. warmup_steps is longer than the run, or "
            "the validation set stayed empty",
            tally.steps,
        )

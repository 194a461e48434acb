"""What is said while a reweighter runs: each warning once, with its remedy; INFO at transitions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from torch_molere.hypergradients.check import EngineChoice
from torch_molere.losses import constants_of
from torch_molere.result import Tally

logger = logging.getLogger("torch_molere")


class Messages:
    """Warnings of one reweighter."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.first_rows: tuple[int, set[int]] | None = None  # of the first batch: how many, and which are to come again
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
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        if any(state and state.get("step") != 0 for state in states):  # Adagrad has state before its first step
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


def say_end(tally: Tally, engines: EngineChoice) -> None:
    """A reweighter was closed or let go of: did it do anything?"""
    if tally.steps and not engines.updates:
        logger.warning(
            "MetaReweighter did nothing in %d steps: there was no meta-update. warmup_steps is longer than the run, or "
            "the validation set stayed empty",
            tally.steps,
        )

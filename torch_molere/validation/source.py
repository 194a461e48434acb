"""What serves as validation set: one interface for a fixed one and for one that a buffer holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_molere.calls import Arguments
from torch_molere.samples import Samples


@dataclass(frozen=True)
class Drawn:
    """A validation batch: what the model is called with, the targets, and each instance's place in the source."""

    arguments: Arguments
    targets: Any
    slots: list[int]


@dataclass(frozen=True)
class Sending:
    """What one training batch of an optimizer step sends to validation.

    Attributes:
        arguments, targets: the batch.
        sent: positions of the instances that go to validation.
        classes: the class of every instance of the batch, or None where that is not known.
        rows: the dataset row of every instance, or None where the loop does not say.
        sent_rows: rows that any rank sent in this optimizer step.
        trained_rows: rows that any rank trained on in this optimizer step.
        samples: the instances of all ranks, for splitters that observe the stream: every ``(B,)`` column is of all of
            them; arguments, targets and outputs are this rank's.
    """

    arguments: Arguments
    targets: Any
    sent: list[int]
    classes: list[int] | None
    rows: list[int] | None
    sent_rows: frozenset[int]
    trained_rows: frozenset[int]
    samples: Samples | None = None


class ValidationSource:
    """Where validation batches come from. Only :meth:`commit` and :meth:`load_state_dict` change one.

    Attributes:
        trusted: whether its labels are known to be right.
        holds_out: whether instances sent to it are left out of training.
        balances_labels: whether :meth:`choose` needs the classes.
    """

    trusted = False
    holds_out = False
    balances_labels = False
    device: torch.device | None = None
    seed = 0

    @property
    def ready(self) -> bool:
        """Whether :meth:`draw` has a batch to give."""
        return True

    def attach(self, model: nn.Module, device: torch.device, seed: int) -> None:
        """Called once, by the reweighter that uses it.

        Raises:
            ValueError: if a reweighter uses it already.
        """
        if self.device is not None:
            raise ValueError(f"this {type(self).__name__} is used by a reweighter already; give each one its own")
        self.device, self.seed = device, seed

    def probabilities(self, samples: Samples, warming_up: bool) -> Tensor | None:
        """``(B,)`` probabilities of the training side, on the device, for :meth:`choose`; None if it sends nothing."""
        return None

    def choose(
        self,
        samples: Samples,
        p: list[float] | None,
        rows: list[int] | None,
        classes: list[int] | None,
        decided: Mapping[int, bool],
    ) -> list[int]:
        """Positions of the instances that go to validation.

        Args:
            samples: the B instances.
            p: the values of :meth:`probabilities`.
            rows, classes: of the instances, or None.
            decided: for rows that other batches of this optimizer step had, whether they were sent: they keep their
                side.
        """
        return []

    def draw(self, batch_size: int, seed: int) -> Drawn | None:
        """A validation batch for training batches of ``batch_size``, or None while there are too few instances.

        The same ``seed`` draws the same batch until :meth:`commit`.
        """
        raise NotImplementedError

    def differentiate(self, validation: Samples, batch: Samples, drawn: Drawn) -> Any:
        """What is to be learned from a validation batch and a training batch: given to :meth:`commit`, or dropped."""
        return None

    def check_together(self, sendings: Sequence[Sending]) -> None:
        """Refuse training batches of one optimizer step that :meth:`commit` could not take, before the step is taken.

        Raises:
            ValueError: if they do not fit each other.
        """

    def commit(self, sendings: Sequence[Sending], drawn: Drawn | None, learned: Any) -> None:
        """Take over what belongs to an optimizer step, once that has returned.

        Args:
            sendings: one for each training batch of the step.
            drawn: the validation batch that a meta-update used, if there was one.
            learned: what :meth:`differentiate` returned for it.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything, in types that ``torch.load(weights_only=True)`` reads."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if it does not fit. Nothing has changed then.
        """
        raise NotImplementedError


def held_out(rows: list[int] | None, sent: list[bool]) -> list[bool]:
    """Which instances of a step are not trained on: those whose row is sent to validation at any position.

    One instance always stays on the training side: where every row is sent, the first instance that was not sent
    itself, or the first of all.

    Args:
        rows: the dataset rows of the instances of all ranks, or None where the loop does not say.
        sent: for each of them, whether it is sent to validation.
    """
    mask = list(sent)
    if rows is not None:
        sent_rows = {row for row, is_sent in zip(rows, sent, strict=True) if is_sent}
        mask = [row in sent_rows for row in rows]
    if mask and all(mask):
        mask[sent.index(False) if False in sent else 0] = False
    return mask

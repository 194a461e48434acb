"""What training saw of each row of the dataset: the memory that weightings and splitters read, and a table for people.

Rows are known by their index (any integer from 0 to 2**63 - 1). Memory follows the number of different rows seen: 19
numbers for each on the device of the losses, and one entry of a dict on the host.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_molere.samples import Samples

if TYPE_CHECKING:
    import pandas

RUNNING_DECAY = 0.9
"""How much of a row's running loss and margin stays at each encounter."""

# Of each row: sums over its encounters, and two labels of the latest one.
_SUMS = (
    *("count", "margin_count", "weighed", "loss", "margin", "weight", "correct", "held_out", "sent"),
    *("target", "prediction"),
)
# Running means, each with the share that the next encounter will have in it: 1 at first.
_RUNNING = ("loss", "loss_share", "margin", "margin_share", "meta_gradient", "meta_share", "meta_count")
_BLANK = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
_WAIT = 16  # so many batches at most are written to the tables together: on small networks each operation counts
_LARGEST = 1e30  # what an infinite loss counts as: its sums stay finite


class Memory(NamedTuple):
    """What is remembered of the B instances of a batch.

    Attributes:
        running_losses: ``(B,)``, the present encounter included.
        running_margins: ``(B,)`` in [-1, 1], the present encounter included; None without margins.
        meta_gradients: ``(B,)``, 0 where there is none.
        has_meta_gradient: ``(B,)`` bool.
    """

    running_losses: Tensor
    running_margins: Tensor | None
    meta_gradients: Tensor
    has_meta_gradient: Tensor


class _Encounters(NamedTuple):
    """One batch that was recorded, in copies of its tensors."""

    rows: list[int]
    numbers: Tensor  # (3, B): losses, margins, weights
    flags: Tensor  # (3, B) bool: correct, held out, sent
    labels: Tensor  # (2, B) long: target, prediction
    has_margins: bool
    weighed: bool


class _Slots(dict[int, int]):
    """Where each row's numbers lie in the tables. Slot 0 stays blank, for rows that have not been seen."""

    def __missing__(self, row: int) -> int:
        if row < 0:
            raise ValueError(f"indices must not be negative, got {row}; give each instance its row in the dataset")
        return 0


class SampleHistory:
    """Sums over all encounters with each row of the dataset, kept for batches that carry ``indices``.

    Running means are bias-corrected: after t encounters the mean is ``Σ_s d^(t−s) x_s / Σ_s d^(t−s)`` with the decay d,
    0.9 for losses and margins. Where several ranks train together every rank is given the whole batch, and so has the
    whole history.

    Args:
        meta_decay: the decay of a row's own meta-gradient, in [0, 1). At 0 nothing is remembered of it.

    Raises:
        ValueError: for a decay out of its range.
    """

    def __init__(self, meta_decay: float = 0.8) -> None:
        if not 0.0 <= meta_decay < 1.0:
            raise ValueError(f"meta_decay must lie in [0, 1), got {meta_decay!r}")
        self.meta_decay = meta_decay
        self._slots = _Slots()
        self._sums = torch.zeros(1, len(_SUMS))
        self._running = _BLANK.clone()
        self._waiting: list[_Encounters] = []  # what is not in the tables yet
        self._waiting_rows: set[int] = set()

    def __len__(self) -> int:
        """How many different rows have been seen."""
        self._write()
        return len(self._slots)

    def recall(
        self, rows: list[int] | None, losses: Tensor, margins: Tensor | None, meta_gradients: Tensor | None = None
    ) -> Memory:
        """What is remembered of a batch; changes nothing. A row that comes twice is recalled twice alike.

        Args:
            rows: the B instances' rows; None where the loop does not say: then the present values are all there is.
            losses: ``(B,)`` at present.
            margins: ``(B,)`` at present, or None.
            meta_gradients: ``(B,)`` at present, in standard deviations, to be counted in; None where there is none.

        Raises:
            ValueError: for negative rows.
        """
        if rows is None:
            has = torch.full_like(losses, meta_gradients is not None, dtype=torch.bool)
            return Memory(losses, margins, torch.zeros_like(losses) if meta_gradients is None else meta_gradients, has)
        if not self._waiting_rows.isdisjoint(rows):
            self._write()
        self._follow(losses)
        dtype = self._running.dtype
        known = self._running.index_select(0, self._places(rows))
        loss, loss_share, margin, margin_share, meta, meta_share, count = known.unbind(1)
        losses = torch.lerp(loss, losses.to(dtype), loss_share)
        if margins is not None:
            margins = torch.lerp(margin, margins.to(dtype), margin_share)
        if meta_gradients is not None:
            meta = torch.lerp(meta, meta_gradients.to(dtype), meta_share)
            return Memory(losses, margins, meta, torch.ones_like(meta, dtype=torch.bool))
        if self.meta_decay == 0.0:
            return Memory(losses, margins, torch.zeros_like(meta), torch.zeros_like(meta, dtype=torch.bool))
        return Memory(losses, margins, meta, count > 0)

    def record(
        self,
        rows: list[int] | None,
        samples: Samples,
        weights: Tensor,
        held_out: Tensor | None = None,
        val_mask: Tensor | None = None,
        weighed: bool = True,
        predictions: Tensor | None = None,
    ) -> None:
        """Add one batch. A row that comes twice counts as two encounters in the order of positions.

        Args:
            rows: the B instances' rows; None where the loop does not say: they leave no trace.
            samples: the batch.
            weights: ``(B,)`` normalised weights.
            held_out: ``(B,)`` bool, not trained on; None for nobody.
            val_mask: ``(B,)`` bool, sent to validation; None for nobody.
            weighed: whether the weights were the weighting's own: not so in warm-up.
            predictions: ``(B,)`` long, the classes predicted; None for those of the samples' outputs.
        """
        if rows is None:
            return
        losses, margins, classes = samples.losses, samples.margins, samples.classes
        self._follow(losses)
        dtype = self._sums.dtype
        if classes is None:
            labels = torch.full((2, len(losses)), -1, device=losses.device)
        else:
            if predictions is None:
                guesses = isinstance(samples.outputs, Tensor) and samples.outputs.ndim == 2
                predictions = samples.outputs.argmax(dim=1) if guesses else torch.full_like(classes, -1)
            labels = torch.stack([classes, predictions])
        numbers = [losses, torch.zeros_like(losses) if margins is None else margins, weights.detach()]
        none = torch.zeros_like(samples.correct) if held_out is None or val_mask is None else samples.correct
        flags = [samples.correct, none if held_out is None else held_out, none if val_mask is None else val_mask]
        batch = _Encounters(
            rows=rows,
            numbers=torch.stack([column.to(dtype) for column in numbers]),
            flags=torch.stack(flags),
            labels=labels,
            has_margins=margins is not None,
            weighed=weighed,
        )
        self._waiting.append(batch)
        self._waiting_rows.update(batch.rows)
        if len(self._waiting) >= _WAIT:
            self._write()

    def _write(self) -> None:
        """Add what waits to the tables."""
        waiting, self._waiting, self._waiting_rows = self._waiting, [], set()
        if not waiting:
            return
        dtype, device = self._sums.dtype, self._sums.device
        losses, margins, weights = torch.cat([batch.numbers for batch in waiting], dim=1).to(dtype).unbind(0)
        correct, held_out, sent = torch.cat([batch.flags for batch in waiting], dim=1).to(dtype).unbind(0)
        target, prediction = torch.cat([batch.labels for batch in waiting], dim=1).to(dtype).unbind(0)
        switches = torch.tensor([[batch.has_margins, batch.weighed] for batch in waiting], dtype=dtype)
        sizes = torch.tensor([batch.numbers.shape[1] for batch in waiting])
        has_margin, weighed = switches.repeat_interleave(sizes, dim=0).to(device).unbind(1)
        weighed = weighed * (1.0 - held_out)
        columns = [torch.ones_like(losses), has_margin, weighed, losses, margins, weighed * weights]
        values = torch.stack([*columns, correct, held_out, sent, target, prediction], dim=1)
        for rows, given in self._in_turn([row for batch in waiting for row in batch.rows], values):
            slots = self._places(rows, new=True)
            sums, running = self._sums.index_select(0, slots), self._running.index_select(0, slots)
            sums[:, -2:] = 0.0
            self._sums.index_copy_(0, slots, sums + given)
            _, has_margin, _, losses, margins = given[:, :5].unbind(1)
            _count_in(running[:, :2], losses, RUNNING_DECAY)
            _count_in(running[:, 2:4], margins, RUNNING_DECAY, has_margin)
            self._running.index_copy_(0, slots, running)

    def record_meta_gradients(self, rows: list[int] | None, meta_gradients: Tensor) -> None:
        """Add the instances' own meta-gradients.

        Args:
            rows: the instances' rows, recorded before; None where the loop does not say.
            meta_gradients: ``(B,)``, divided by their standard deviation over the batch.
        """
        if rows is None:
            return
        self._follow(meta_gradients)
        for rows_, values in self._in_turn(rows, meta_gradients.detach().to(self._running.dtype).unsqueeze(1)):
            slots = self._places(rows_, new=True)
            running = self._running.index_select(0, slots)
            _count_in(running[:, 4:6], values[:, 0], self.meta_decay)
            running[:, 6] += 1.0
            self._running.index_copy_(0, slots, running)

    def table(self) -> dict[str, Tensor]:
        """One entry for each of the R rows that have been seen, in ascending order, on the CPU.

        Returns:
            - ``row`` (long) and ``seen``, the number of encounters (long);
            - means over the encounters: ``loss``, ``margin`` (NaN without classes), ``correct``, ``held_out`` (not
                trained on), ``sent`` (to validation), ``weight`` (where it was weighed; NaN where it never was);
            - ``running_loss`` and ``running_margin`` (NaN without classes);
            - ``meta_gradient``, its running mean in standard deviations (NaN where there is none; at ``meta_decay=0``
                the latest), and ``meta_seen``, of how many (long);
            - ``target`` and ``prediction`` at the latest encounter (long; -1 without classes).

        Wrong labels show as large running losses and small running margins; against a trusted validation set also as
        small weights and positive meta-gradients.
        """
        rows, sums, running = self._sorted()
        total = dict(zip(_SUMS, sums.unbind(1), strict=True))
        mean = dict(zip(_RUNNING, running.unbind(1), strict=True))
        seen, nan = total["count"], torch.tensor(torch.nan)
        return {
            "row": rows,
            "seen": seen.long(),
            "loss": total["loss"] / seen,
            "running_loss": mean["loss"],
            "margin": total["margin"] / total["margin_count"],
            "running_margin": torch.where(total["margin_count"] > 0, mean["margin"], nan),
            "correct": total["correct"] / seen,
            "weight": total["weight"] / total["weighed"],
            "held_out": total["held_out"] / seen,
            "sent": total["sent"] / seen,
            "meta_gradient": torch.where(mean["meta_count"] > 0, mean["meta_gradient"], nan),
            "meta_seen": mean["meta_count"].long(),
            "target": total["target"].long(),
            "prediction": total["prediction"].long(),
        }

    def share_below(self, margin: float) -> float:
        """The share of rows seen at least three times whose running margin is below ``margin``; 0 where none is.

        Reads the device.
        """
        self._write()
        sums, running = self._sums[1 : len(self._slots) + 1], self._running[1 : len(self._slots) + 1]
        seen = sums[:, _SUMS.index("margin_count")] >= 3
        below = seen & (running[:, _RUNNING.index("margin")] < margin)
        return float(below.sum() / seen.sum().clamp_min(1))

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`table` as a data frame with the rows as its index.

        Raises:
            ImportError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas; or use table(), which does not") from error
        columns = {name: column.numpy() for name, column in self.table().items()}
        return pandas.DataFrame(columns).set_index("row")

    def state_dict(self) -> dict[str, Any]:
        """The rows with the sums and running means behind the table, exactly."""
        rows, sums, running = self._sorted()
        return {"rows": rows, "sums": sums, "running": running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave. The tables follow the losses' device; nothing changes on failure.

        Raises:
            ValueError: for other shapes, rows that are negative or come twice, or numbers that no training gives: NaN,
                infinite, negative counts, shares outside (0, 1].
        """
        rows: Any = state.get("rows")
        sums: Any = state.get("sums")
        running: Any = state.get("running")
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.long:
            raise ValueError(f"the history's rows must be a (R,) tensor of long, got {_shown(rows)}")
        for name, given, width in (("sums", sums, len(_SUMS)), ("running", running, len(_RUNNING))):
            shape = (len(rows), width)
            if not isinstance(given, Tensor) or given.shape != shape or given.dtype not in (torch.float, torch.double):
                raise ValueError(f"the history's {name} must be float or double {shape}, got {_shown(given)}")
            if not bool(given.isfinite().all()):
                raise ValueError(f"the history's {name} must be finite; the state is damaged")
        listed = rows.tolist()
        if len(set(listed)) != len(listed) or (listed and min(listed) < 0):
            raise ValueError("the history's rows must be different and not negative; the state is damaged")
        shares = running[:, 1:6:2]
        if bool((sums[:, :3] < 0).any() or (running[:, 6] < 0).any() or ((shares <= 0) | (shares > 1)).any()):
            raise ValueError(
                "the history's counts must not be negative and its shares lie in (0, 1]; the state is damaged"
            )
        self._slots = _Slots((row, place + 1) for place, row in enumerate(listed))
        self._sums = torch.cat([sums.new_zeros(1, len(_SUMS)), sums])
        self._running = torch.cat([_BLANK.to(sums), running.to(sums)])
        self._waiting, self._waiting_rows = [], set()

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """All rows in ascending order with their sums and running means, on the CPU."""
        self._write()
        rows = sorted(self._slots)
        slots = self._places(rows)
        sums, running = self._sums.index_select(0, slots), self._running.index_select(0, slots)
        return torch.tensor(rows, dtype=torch.long), sums.cpu(), running.cpu()

    def _follow(self, like: Tensor) -> None:
        """The tables go where the losses are, and to double precision with them."""
        table = self._sums
        if table.device != like.device or (like.dtype == torch.double and table.dtype != torch.double):
            self._write()
            dtype = torch.promote_types(like.dtype, table.dtype)
            self._sums, self._running = self._sums.to(like.device, dtype), self._running.to(like.device, dtype)

    def _places(self, rows: list[int], new: bool = False) -> Tensor:
        """The slots of some rows; 0 where one has none and none is to be made."""
        slots = self._slots
        places = np.fromiter(map(slots.__getitem__, rows), np.int64, len(rows))
        if new and not places.all():
            self._reserve(len(slots) + len(rows))
            for row in rows:
                if row not in slots:
                    slots[row] = len(slots) + 1
            places = np.fromiter(map(slots.__getitem__, rows), np.int64, len(rows))
        return torch.from_numpy(places).to(self._sums.device, non_blocking=True)

    def _reserve(self, rows: int) -> None:
        """Room for so many rows: the tables grow by doubling."""
        missing = rows + 1 - len(self._sums)
        if missing > 0:
            more = max(missing, len(self._sums))
            running = torch.cat([self._running, _BLANK.to(self._running).expand(more, -1)])
            self._sums, self._running = torch.cat([self._sums, self._sums.new_zeros(more, len(_SUMS))]), running

    def _in_turn(self, rows: list[int], values: Tensor) -> list[tuple[list[int], Tensor]]:
        """Rows and their values, in parts within which no row comes twice: first encounters, then second ones, and so
        on."""
        values = values.nan_to_num(0.0, _LARGEST, -_LARGEST)
        if len(set(rows)) == len(rows):
            return [(rows, values)]
        encounters: dict[int, int] = {}
        turns: list[list[int]] = []
        for position, row in enumerate(rows):
            turn = encounters[row] = encounters.get(row, -1) + 1
            if turn == len(turns):
                turns.append([])
            turns[turn].append(position)
        return [([rows[i] for i in turn], values[torch.tensor(turn, device=values.device)]) for turn in turns]


def _count_in(running: Tensor, values: Tensor, decay: float, where: Tensor | None = None) -> None:
    """Count values in running means, in place.

    With S_t = Σ_s d^(t−s) x_s and W_t = Σ_s d^(t−s) the mean is S_t / W_t, so that the next value has the share
    1/W_(t+1) in it; from W_(t+1) = d W_t + 1 that share follows as a/(a + d) from the present one, a.

    Args:
        running: ``(n, 2)``, the means and the shares of the next values.
        values: ``(n,)``.
        decay: d.
        where: ``(n,)`` 1 for the values that count, else 0; None for all.
    """
    mean, share = running.unbind(1)
    following = share / (share + decay)
    if where is None:
        mean.lerp_(values, share)
        share.copy_(following)
    else:
        mean.lerp_(values, share * where)
        share.lerp_(following, where)


def indices_of(indices: Any, size: int) -> Tensor:
    """The ``indices`` of a batch as a ``(size,)`` tensor of long, exact up to 2**63 - 1.

    Raises:
        TypeError: for strings, fractions or anything else that is no integer.
        ValueError: for another number of them.
    """
    if not isinstance(indices, Tensor):
        try:
            indices = torch.tensor([operator.index(index) for index in indices], dtype=torch.long)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(
                f"indices must be integers from 0 to 2**63 - 1, one for each instance, got {_shown(indices)}; number "
                "the rows of your dataset, e.g. with torch_molere.with_indices(dataset)"
            ) from error
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"indices must be integers, got a tensor of {indices.dtype}; give the rows' numbers as long")
    if indices.shape != (size,):
        raise ValueError(f"indices must be ({size},), one for each instance of the batch, got {tuple(indices.shape)}")
    return indices.long()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

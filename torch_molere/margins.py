"""Probabilistic margins: how clearly a classifier is right, and splits of a dataset by them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from torch_molere.calls import arguments_of, device_of, logits_of, move


def probabilistic_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """How clearly each instance is classified: ``p_target − max_{c ≠ target} p_c``.

    This is the margin that MOLERE (arXiv 2403.12236) calls an instance's hardness: hard instances have a small one. It
    is positive exactly where the prediction is right (ties aside) and does not change when a constant is added to the
    logits.

    Args:
        logits: ``(B, C)`` floating, C ≥ 2, unnormalised.
        targets: ``(B,)`` integer class indices in ``[0, C)``.

    Returns:
        ``(B,)`` in ``[-1, 1]``, of the dtype of ``logits`` (float32 for half precision).

    Raises:
        ValueError: for other shapes, a dtype that is not floating or not integer, or targets outside ``[0, C)``.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating (B, C) tensor with C ≥ 2, got {tuple(logits.shape)} of {logits.dtype}"
        )
    if targets.shape != logits.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets must be ({logits.shape[0]},) integer class indices, got {tuple(targets.shape)} of {targets.dtype}"
        )
    if targets.numel():
        lowest, highest = torch.stack(targets.aminmax()).tolist()
        if lowest < 0 or highest >= logits.shape[1]:
            raise ValueError(f"targets must lie in [0, {logits.shape[1]}), got values from {lowest} to {highest}")
    return margins_of(logits, targets.long())


def margins_of(outputs: Tensor, classes: Tensor) -> Tensor:
    """As :func:`probabilistic_margin`, unchecked and without reading the device.

    Args:
        outputs: ``(B, C)`` logits or log-probabilities, C ≥ 2.
        classes: ``(B,)`` long in ``[0, C)``, or -1 where the target is ignored.

    Returns:
        ``(B,)`` in ``[-1, 1]``, at least float32; 1 where the class is -1.
    """
    is_half = outputs.dtype in (torch.float16, torch.bfloat16)
    probabilities = (outputs.float() if is_half else outputs).softmax(dim=1)
    column = classes.clamp(min=0).unsqueeze(1)
    target = probabilities.gather(1, column)
    others = probabilities.scatter(1, column, -torch.inf).amax(dim=1, keepdim=True)
    return (target - others).squeeze(1).masked_fill_(classes < 0, 1.0)


@torch.no_grad()
def margins(model: nn.Module, loader: Iterable[Any]) -> Tensor:
    """The probabilistic margin of every instance a loader yields, with the model in evaluation mode.

    Args:
        model: any classifier whose outputs are ``(B, C)`` logits or an object with ``.logits``. Its training mode is
            put back afterwards.
        loader: yields ``(inputs, targets)`` or ``(inputs, targets, indices)``, **in the order of the dataset**
            (``shuffle=False``); batches are moved to the model's device.

    Returns:
        ``(N,)`` on the CPU, in ``[-1, 1]``, in the loader's order.

    Raises:
        ValueError: if the loader yields nothing.
    """
    device = device_of(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        parts = []
        for inputs, targets, *_ in loader:
            positional, named = arguments_of(move(inputs, device))
            outputs = model(*positional, **named)
            parts.append(probabilistic_margin(logits_of(outputs), move(targets, device)).cpu())
    finally:
        for module, training in modes:
            module.training = training
    if not parts:
        raise ValueError("loader yielded no batches: margins needs at least one instance")
    return torch.cat(parts)


def split_by_margin(
    dataset: Dataset[Any],
    margins: Tensor,
    side: Literal["hard", "easy"] = "hard",
    fraction: float = 0.1,
    trim: float = 0.0,
) -> tuple[Subset[Any], Subset[Any]]:
    """Put the hardest (or easiest) instances on the validation side: the train-twice heuristic of LRW-Hard.

    Args:
        dataset: a map-style dataset of N instances.
        margins: ``(N,)``, one for each row of ``dataset``, for instance from :func:`margins`.
        side: which end of the margins becomes validation: ``"hard"`` (smallest) or ``"easy"`` (largest).
        fraction: the share of the N rows that becomes validation, in (0, 1).
        trim: the share of the N rows at the extreme of that end that stays in training, in [0, 1 − fraction):
            the very smallest margins are often wrong labels.

    Returns:
        ``(train, validation)``: disjoint subsets that cover the dataset, rows in ascending order. ``validation`` has
        ``round(fraction · N)`` rows (at least one, at most N − 1). Equal margins are kept in the dataset's order.

    Raises:
        ValueError: if an argument is out of its range or ``margins`` has another length than ``dataset``.
    """
    rows = len(dataset)  # type: ignore[arg-type]
    if margins.shape != (rows,):
        raise ValueError(f"margins must be ({rows},), one for each row of dataset, got {tuple(margins.shape)}")
    if not bool(torch.isfinite(margins).all()):
        raise ValueError("margins must be finite, got NaN or infinite values")
    if side not in ("hard", "easy"):
        raise ValueError(f"side must be 'hard' or 'easy', got {side!r}")
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if not 0.0 <= trim < 1.0 - fraction:
        raise ValueError(f"trim must lie in [0, 1 − fraction) = [0, {1.0 - fraction:g}), got {trim}")
    if rows < 2:
        raise ValueError(f"dataset must have at least 2 rows to be split, got {rows}")
    order = torch.argsort(margins, descending=side == "easy", stable=True)
    first = round(trim * rows)
    count = min(max(1, round(fraction * rows)), rows - 1, rows - first)
    validation = torch.zeros(rows, dtype=torch.bool)
    validation[order[first : first + count]] = True
    return (
        Subset(dataset, (~validation).nonzero().squeeze(1).tolist()),
        Subset(dataset, validation.nonzero().squeeze(1).tolist()),
    )

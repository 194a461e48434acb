"""The memory order of images in the meta-gradient: channels last, in which the CPU's convolutions take less time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_molere.evaluation import (
    Arguments,
    LossFn,
    RandomState,
    device_of,
    evaluate,
    map_tensors,
    per_sample_losses,
    preserved_randomness,
)
from torch_molere.sharded import is_sharded

SAME = 1e-3
"""How closely the losses must agree in both orders: oneDNN's algorithms for them round differently."""


def channels_last(tree: Any) -> Any:
    """``tree`` with its floating ``(·, C, H, W)`` tensors in channels-last order: the same values, laid out anew."""

    def ordered(tensor: Tensor) -> Tensor:
        images = tensor.ndim == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    return map_tensors(ordered, tree)


class ChannelsLast:
    """Whether the meta-gradient's forwards and backward are to run in channels-last order, found out once for a model.

    It is where a float32 model on the CPU has two-dimensional convolutions, and its losses come out the same: a model
    that takes views of contiguous memory fails in the other order, and one with dropout draws other masks. A change
    between training and evaluation mode, in any part of the model, asks anew.
    """

    def __init__(self) -> None:
        self.chosen: bool | None = None
        self.modes: list[bool] | None = None  # in which that was found out; None after loading

    def serves(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batch: tuple[Arguments, Any],
        parameters: Mapping[str, Tensor],
        random_state: RandomState | int,
    ) -> bool:
        """Whether it serves the model, tried on a batch at ``parameters`` the first time."""
        if not _concerned(model):
            return False
        modes = [module.training for module in model.modules()]
        if self.chosen is None or self.modes not in (None, modes):
            self.chosen = _same(model, loss_fn, batch, parameters, random_state)
        self.modes = modes
        return self.chosen

    def state_dict(self) -> dict[str, bool | None]:
        """What was found out."""
        return {"chosen": self.chosen}

    def load_state_dict(self, state: dict[str, bool | None]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is neither a bool nor None.
        """
        if not (state["chosen"] is None or isinstance(state["chosen"], bool)):
            raise ValueError(f"channels_last must be True, False or None, got {state['chosen']!r:.60}")
        self.chosen, self.modes = state["chosen"], None


def _concerned(model: nn.Module) -> bool:
    return (
        device_of(model).type == "cpu"
        and torch.backends.mkldnn.is_available()
        and not is_sharded(model)
        and any(isinstance(m, nn.Conv2d) and m.weight.dtype == torch.float32 for m in model.modules())
    )


def _same(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Arguments, Any],
    parameters: Mapping[str, Tensor],
    random_state: RandomState | int,
) -> bool:
    def losses(arguments: Arguments, parameters: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), preserved_randomness(device_of(model), random_state):
            outputs = evaluate(model, arguments, parameters, dict(model.named_buffers()))
            return per_sample_losses(loss_fn, outputs, batch[1])

    usual = losses(batch[0], parameters)
    try:
        other = losses(channels_last(batch[0]), channels_last(dict(parameters)))
    except RuntimeError:
        return False
    return bool(((other - usual).abs() <= SAME * (1.0 + usual.abs())).all())

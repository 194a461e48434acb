"""The precision that operations run in: PyTorch's autocast, and the one that Accelerate puts around a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast. Where none is on nothing is entered: an interrupt while PyTorch enters or leaves autocast would
    make it keep its reduced weights for the rest of the process."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@dataclass(frozen=True)
class Autocast:
    """Whether operations run in reduced precision, and in which."""

    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        return cls(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def on(self, device: torch.device, wanted: bool) -> AbstractContextManager[Any]:
        """A context with this precision, or with full precision where it is not ``wanted``."""
        if wanted and self.enabled:
            return torch.autocast(device.type, self.dtype, cache_enabled=False)
        return full_precision(device)


ACCELERATE = "_original_forward"
"""The attribute of a model that Accelerate (and so the Trainer) has put autocast around: its own forward."""


@contextmanager
def own_forward(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Without the autocast that Accelerate puts around a model's forward; in :func:`run_apart`, which puts it back."""
    own = vars(model).get(ACCELERATE) if wanted else None
    if own is None:
        yield
        return
    around = model.forward
    model.forward = own
    try:
        yield
    finally:
        model.forward = around

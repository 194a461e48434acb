"""Samples of a made-up batch, for weightings and splitters; and how many tensor operations something takes."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torch_molere.margins import margins_of
from torch_molere.samples import Samples


def some_samples(size=8, num_classes=3, seed=0, dtype=torch.float, **changed):
    """A classifier's batch whose memory is that of a first encounter; regression if ``num_classes`` is None."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(size, num_classes or 1, generator=generator, dtype=dtype)
    if num_classes is None:
        targets = torch.randn(size, 1, generator=generator, dtype=dtype)
        labels = margins = None
        losses = (outputs - targets).square().squeeze(1)
        correct = losses <= losses.median()
    else:
        labels = targets = torch.randint(num_classes, (size,), generator=generator)
        losses = F.cross_entropy(outputs, targets, reduction="none")
        margins = margins_of(outputs, targets)
        correct = outputs.argmax(dim=1) == targets
    fields = dict(
        arguments=((outputs,), {}),
        targets=targets,
        outputs=outputs,
        losses=losses,
        correct=correct,
        classes=labels,
        margins=margins,
        running_losses=losses,
        running_margins=margins,
        meta_gradients=torch.zeros_like(losses),
        has_meta_gradient=torch.zeros_like(correct),
        indices=None,
    )
    return Samples(**{**fields, **changed})


class Operations(TorchDispatchMode):
    """Counts the tensor operations within its block."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))

"""How often a step waits for the device: each value that Python reads there stops until all work queued is done."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torch_molere import LearnedSplitter, MetaReweighter, SignalWeighting

READINGS = {
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist")
} | {torch.nonzero, torch.masked_select, torch.unique}


class Readings(TorchFunctionMode):
    """Collects what reads values of tensors, by whatever name."""

    def __init__(self):
        self.found = []

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function in READINGS:
            self.found.append(function.__name__)
        return function(*arguments, **(named or {}))


def batch(first, size=32):
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(4, (size,), generator=generator), torch.arange(first, first + size)


def readings(warmup_steps, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reweighter = MetaReweighter(model, optimizer, every=4, warmup_steps=warmup_steps, **options)
    for number in range(2):
        reweighter.step(batch(32 * number))
    with Readings() as counted:
        result = reweighter.step(batch(64))
    assert result.val_loss is None  # no meta-update
    assert bool(result.val_mask.any()) == ("validation" not in options)
    return counted.found


def test_what_is_counted():
    with Readings() as counted:
        x = torch.tensor([1.0, 0.0])
        bool(x[0]), int(x[0]), float(x[0]), x.tolist(), x[0].item(), x.nonzero(), torch.nonzero(x), x.cpu(), x.numpy()
        x + x, x.sum(), torch.stack([x, x])
    assert len(counted.found) == 9


@pytest.mark.parametrize("hold_out", [True, False, "auto"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_step_without_meta_update_reads_once(warmup_steps, hold_out):
    assert readings(warmup_steps, hold_out=hold_out) == ["tolist"]


@pytest.mark.parametrize("hold_out", [True, False, "auto"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_signals_of_classes_are_checked_first(warmup_steps, hold_out):
    signals = {
        "weighting": SignalWeighting(("loss", "margin", "probabilities", "label"), num_classes=4),
        "splitter": LearnedSplitter(("loss", "margin", "probabilities", "label"), num_classes=4),
    }
    looked_at = warmup_steps == 0
    assert readings(warmup_steps, hold_out=hold_out, **signals) == ["tolist"] * (1 + looked_at)


def test_with_fixed_validation_a_step_reads_once():
    x, y, _ = batch(1000)
    assert readings(0, validation=[(x, y)]) == ["tolist"]

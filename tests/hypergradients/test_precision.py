"""Full precision where autocast is on, and nothing where it is not."""

import pytest
import torch
from torch import nn

from torch_molere import MetaReweighter, ValidationBuffer, hypergradient
from torch_molere.hypergradients.precision import Autocast, full_precision

CPU = torch.device("cpu")


def dtype_of_a_product():
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_full_precision_within_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert dtype_of_a_product() == torch.bfloat16
        with full_precision(CPU):
            assert dtype_of_a_product() == torch.float32
        assert dtype_of_a_product() == torch.bfloat16


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_the_precision_of_a_call(enabled, wanted, around):
    with torch.autocast("cpu", torch.bfloat16, enabled=around), Autocast(enabled, torch.bfloat16).on(CPU, wanted):
        assert dtype_of_a_product() == (torch.bfloat16 if enabled and wanted else torch.float32)


def test_autocast_is_entered_only_where_it_is_on(monkeypatch):
    """Interrupted there, PyTorch would keep weights in reduced precision until the process ends."""

    def entered(self):
        raise AssertionError("autocast was entered")

    monkeypatch.setattr(torch.autocast, "__enter__", entered)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(10, 3), torch.randint(2, (10,))
    reweighter = MetaReweighter(
        model, optimizer, every=1, warmup_steps=3, validation=ValidationBuffer(batch_size=4, fraction=0.5)
    )
    for _ in range(5):
        reweighter.step((*batch, torch.arange(10)))
    assert reweighter.meta_updates
    for engine in ("finite", "forward", "unrolled"):
        hypergradient(model, optimizer, batch, batch, torch.ones(10), engine=engine)

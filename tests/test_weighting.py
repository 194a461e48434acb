"""The range of the weightings' weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_molere import FreeWeighting, InputWeighting, MetaReweighter, Samples, SignalWeighting

KINDS = {
    "signals": lambda **options: SignalWeighting(("loss", "label"), num_classes=3, hidden=6, **options),
    "inputs": lambda **options: InputWeighting(nn.Linear(4, 1), **options),
    "classifier": lambda **options: InputWeighting.from_classifier(nn.Linear(4, 3), 3, **options),
    "free": lambda **options: FreeWeighting(30, **options),
}


def samples(size=30):
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(size, width, generator=generator) for width in (4, 3))
    targets = torch.arange(size) % 3
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return Samples(((inputs,), {}), targets, outputs, losses, outputs.argmax(1) == targets, torch.arange(size))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_lie_between_the_floor_and_one(kind):
    torch.manual_seed(5)
    free, floored = KINDS[kind](floor=0.0), KINDS[kind](floor=0.25)
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.copy_(5.0 * torch.randn_like(parameter))
    floored.load_state_dict(free.state_dict())
    batch = samples()
    plain, weights = free(batch), floored(batch)
    assert plain.min() < 0.05 and plain.max() > 0.95
    torch.testing.assert_close(weights, 0.25 + 0.75 * plain)
    assert weights.max() / weights.min() <= 4.0
    (gradient,) = torch.autograd.grad(weights.sum(), list(floored.parameters())[:1])
    (reference,) = torch.autograd.grad(plain.sum(), list(free.parameters())[:1])
    torch.testing.assert_close(gradient.to_dense(), 0.75 * reference.to_dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [-0.1, 1.0, float("nan")])
def test_refuses_a_floor_outside_its_range(kind, floor):
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\), got"):
        KINDS[kind](floor=floor)


def test_no_instance_weighs_more_than_the_floor_allows_in_training():
    """A weighting that learns much too fast puts the batch's weight on few; the floor bounds the ratio."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(64, 4, generator=generator), torch.randint(3, (64,), generator=generator)
    largest = {}
    for floor in (0.0, 0.5):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        reweighter = MetaReweighter(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            weighting=SignalWeighting(("loss", "label"), num_classes=3, floor=floor),
            validation=[(inputs[:16], targets[:16])],
            weighting_lr=1.0,
            warmup_steps=0,
            every=1,
        )
        weights = torch.stack([reweighter.step((inputs, targets)).weights for _ in range(20)])
        torch.testing.assert_close(weights.mean(dim=1), torch.ones(20))
        largest[floor] = (weights.amax(dim=1) / weights.amin(dim=1)).max().item()
    assert largest[0.5] <= 2.0001 < 10.0 < largest[0.0]

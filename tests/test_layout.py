"""Channels-last order in the meta-update: where it serves, that the values stay, and that the choice is kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter
from torch_molere.hypergradients import validation_gradient
from torch_molere.layout import ChannelsLast, channels_last

pytestmark = pytest.mark.usefixtures("one_thread")
per_sample = partial(F.cross_entropy, reduction="none")


class Viewing(nn.Module):
    """Fails in channels-last order, whose memory it cannot view."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, images):
        features = self.features(images)
        return self.head(features.view(len(features), -1))


def conv_net(*extra):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), *extra, nn.Flatten(), nn.Linear(128, 5)
    )


def images(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def batch_of(model, seed=0):
    inputs, targets = images(seed=seed)
    return ((inputs.to(next(model.parameters()).dtype),), {}), targets


def serves(model):
    return ChannelsLast().serves(model, per_sample, batch_of(model), dict(model.named_parameters()), seed=1)


def test_orders_images_and_keeps_values():
    pixels, rows, labels = torch.randn(2, 3, 4, 5), torch.randn(2, 3), torch.ones(2, 3, 4, 5, dtype=torch.long)
    ordered = channels_last({"a": (pixels, rows), "b": [labels]})
    assert ordered["a"][0].is_contiguous(memory_format=torch.channels_last)
    assert_same(ordered, {"a": (pixels, rows), "b": [labels]})
    assert ordered["a"][1] is rows and ordered["b"][0] is labels


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (conv_net, True),
        (Viewing, False),
        (lambda: conv_net(nn.Dropout()), False),  # its masks follow the order
        (lambda: conv_net().double(), False),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), False),
    ],
    ids=["conv-net", "views", "dropout", "float64", "linear"],
)
def test_serves_where_the_losses_stay(model, expected):
    torch.manual_seed(0)
    assert serves(model()) is expected


def test_the_gradient_is_the_same():
    torch.manual_seed(0)
    model = conv_net()
    parameters = dict(model.named_parameters())
    usual, other = (
        validation_gradient(model, per_sample, batch_of(model), parameters, seed=1, in_channels_last=order)
        for order in (False, True)
    )
    assert_same(vars(usual), vars(other), rtol=1e-4, atol=1e-5)
    exact = validation_gradient(
        model.double(), per_sample, batch_of(model), {n: p.double() for n, p in parameters.items()}, seed=1
    )
    for gradient, reference in zip(other.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-5)


def reweighter_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return MetaReweighter(model, optimizer, warmup_steps=0, every=1, buffer_size=64, val_fraction=0.5, seed=3)


@pytest.mark.parametrize(("kind", "expected"), [(conv_net, True), (Viewing, False)])
def test_the_choice_is_made_once_and_kept(kind, expected):
    torch.manual_seed(0)
    reweighter = reweighter_of(kind())
    assert reweighter.state_dict()["channels_last"] == {"chosen": None}
    for seed in range(4):
        reweighter.step((*images(seed=seed), torch.arange(12)))
    assert reweighter.state_dict()["channels_last"] == {"chosen": expected}

    other = reweighter_of(kind())
    other.load_state_dict(reweighter.state_dict())
    assert other.state_dict()["channels_last"] == {"chosen": expected}
    with pytest.raises(ValueError, match="channels_last"):
        other.load_state_dict({**reweighter.state_dict(), "channels_last": {"chosen": 2}})
    assert other.state_dict()["channels_last"] == {"chosen": expected}


def test_the_users_model_and_images_keep_their_order():
    torch.manual_seed(0)
    model = conv_net()
    reweighter = reweighter_of(model)
    inputs, targets = images()
    for _ in range(3):
        reweighter.step((inputs, targets, torch.arange(12)))
    assert reweighter.state_dict()["channels_last"]["chosen"]
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert all(parameter.grad.is_contiguous() for parameter in model.parameters())
    assert inputs.is_contiguous()

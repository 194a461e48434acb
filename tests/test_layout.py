"""Channels-last order in the meta-update: where it serves, that the values stay, and that the choice is kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter, hypergradient
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


class Seen(nn.Identity):
    """Notes the order of the images that a model is called with."""

    def __init__(self):
        super().__init__()
        self.in_channels_last = []

    def forward(self, images):
        self.in_channels_last.append(images.is_contiguous(memory_format=torch.channels_last))
        return images


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
    return ChannelsLast().serves(model, per_sample, batch_of(model), dict(model.named_parameters()), 1)


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


def test_a_change_of_mode_asks_anew():
    torch.manual_seed(0)
    model = conv_net(nn.Dropout())
    asked = ChannelsLast()

    def serves():
        return asked.serves(model, per_sample, batch_of(model), dict(model.named_parameters()), 1)

    assert not serves()
    model[4].eval()  # the dropout
    assert serves()
    other = ChannelsLast()
    other.load_state_dict(asked.state_dict())
    asked = other
    assert serves()
    model.train()
    assert not serves()
    model.double()[4].eval()
    assert not serves()


@pytest.mark.parametrize("engine", ["finite", "forward"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [(conv_net, True), (Viewing, False), (lambda: conv_net(nn.Dropout()), False)],
    ids=["conv-net", "views", "dropout"],
)
def test_all_of_a_meta_gradient_runs_in_the_order_that_serves(kind, expected, engine, monkeypatch):
    torch.manual_seed(0)
    seen = Seen()
    model = nn.Sequential(seen, kind())
    setting = (model, torch.optim.SGD(model.parameters(), lr=0.05), images(), images(seed=1), torch.ones(12))
    found = hypergradient(*setting, engine=engine)
    assert seen.in_channels_last == [False, True] + 3 * [expected]  # tried in both orders first
    seen.in_channels_last.clear()
    hypergradient(*setting, engine=engine)
    assert seen.in_channels_last == 3 * [expected]
    assert all(parameter.is_contiguous() for parameter in model.parameters())

    monkeypatch.setattr("torch_molere.layout._concerned", lambda model: False)
    usual = hypergradient(*setting, engine=engine)
    assert (found - usual).norm() < (0.02 if engine == "finite" else 1e-4) * usual.norm()


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


@pytest.mark.parametrize("engine", ["finite", "forward"])
def test_only_the_users_own_forward_keeps_its_order_in_training(engine):
    torch.manual_seed(0)
    seen = Seen()
    model = nn.Sequential(seen, conv_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    validation = [images(seed=9)]
    reweighter = MetaReweighter(
        model, optimizer, validation=validation, warmup_steps=0, every=2, hypergradient=engine, seed=3
    )
    reweighter.step(images())
    seen.in_channels_last.clear()
    reweighter.step(images(seed=1))
    assert seen.in_channels_last == [False]  # no meta-update
    seen.in_channels_last.clear()
    reweighter.step(images(seed=2))
    assert seen.in_channels_last == [False, True, True]  # training, validation, the derivative


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

"""The classifiers: sizes known from elsewhere, and what they refuse."""

import pytest
import torch
import typer
from torch import nn

from benchmarks import models


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, shape, classes, count",
    [
        ("mlp", (1, 14, 14), 10, 196 * 256 + 256 + 256 * 257 + 257 * 10),
        ("conv", (3, 16, 16), 10, 9 * (48 + 256 + 512 + 1024 + 2048 + 4096) + 448 + 650),
        ("resnet20", (3, 32, 32), 10, 269_722),
        ("resnet32", (3, 32, 32), 10, 464_154),
        ("wrn-28-10", (3, 32, 32), 10, 36_479_194),
        ("lenet", (1, 28, 28), 2, 416 + 12_832 + 51_264 + 102_500 + 101),
    ],
)
def test_sizes(name, shape, classes, count):
    model = models.build(name, shape, classes)
    assert parameters(model) == count
    if name != "wrn-28-10":
        assert model(torch.randn(2, *shape)).shape == (2, classes)


def test_the_one_logit_of_lenet_makes_cross_entropy_the_binary_one():
    model = models.build("lenet", (1, 28, 28), 2)
    inputs, labels = torch.randn(8, 1, 28, 28), torch.arange(8) % 2
    outputs = model(inputs)
    binary = nn.functional.binary_cross_entropy_with_logits(outputs[:, 1], labels.float())
    torch.testing.assert_close(nn.functional.cross_entropy(outputs, labels), binary)
    assert not outputs[:, 0].any() and model[0].weight.abs().max() <= 0.2


def test_torchvision_s_models_by_name():
    assert models.build("resnet18", (3, 32, 32), 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_pretrained_models_get_a_new_last_layer(monkeypatch):
    get_model = models.torchvision.models.get_model
    asked = []
    monkeypatch.setattr(
        models.torchvision.models, "get_model", lambda name, weights: asked.append(weights) or get_model(name)
    )
    for name, last in (("resnet18", "fc"), ("vit_b_16", "heads.head")):
        model = models.build(name, (3, 224, 224), 7, pretrained=True)
        assert model.get_submodule(last).out_features == 7
    assert asked == ["DEFAULT", "DEFAULT"]


def test_what_is_refused():
    with pytest.raises(typer.BadParameter, match="'resnet19' is unknown; take one of mlp"):
        models.build("resnet19", (3, 32, 32), 10)
    with pytest.raises(typer.BadParameter, match="no pretrained weights"):
        models.build("conv", (3, 32, 32), 10, pretrained=True)

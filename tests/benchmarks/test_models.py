"""Shapes and parameter counts of the classifiers."""

import pytest
import torch
import typer

from benchmarks import models


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (1, 8, 8)),
        ("mlp", (3, 32, 32)),
        ("conv", (1, 8, 8)),
        ("conv", (3, 32, 32)),
        ("conv", (3, 64, 64)),
        ("resnet20", (3, 32, 32)),
        ("resnet32", (3, 64, 64)),
        ("resnet18", (3, 32, 32)),
        ("vit", (3, 16, 16)),
        ("vit", (3, 32, 32)),
    ],
)
def test_outputs(name, shape):
    outputs = models.build(name, shape, 7)(torch.randn(2, *shape))
    assert outputs.shape == (2, 7)
    outputs.sum().backward()


def test_known_parameter_counts():
    # He et al. 2015, table 6: 0.27 M and 0.46 M; Zagoruyko and Komodakis 2016, table 4: 36.5 M. With projections (B)
    # in place of option A's free shortcuts the ResNets would have 2,752 more: 16·32 + 32·64 and two batch norms.
    assert parameters(models.build("resnet20", (3, 32, 32), 10)) == 269_722
    assert parameters(models.build("resnet32", (3, 32, 32), 10)) == 464_154
    assert parameters(models.build("wrn-28-10", (3, 32, 32), 10)) == 36_479_194


def test_resnet_halves_the_resolution_twice():
    model = models.build("resnet20", (3, 32, 32), 10)
    layers = list(model)
    pooling = next(i for i, layer in enumerate(layers) if isinstance(layer, torch.nn.AdaptiveAvgPool2d))
    before_pooling = torch.nn.Sequential(*layers[:pooling])
    assert before_pooling(torch.randn(1, 3, 32, 32)).shape == (1, 64, 8, 8)


def test_a_small_wide_resnet_and_its_dropout():
    model = models.WideResNet(10, 2, 3, 5, dropout=0.3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.3] * 3


def test_unknown_model():
    with pytest.raises(typer.BadParameter, match="'resnet-9000' is unknown"):
        models.check_name("resnet-9000")
    models.check_name("resnet18")


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "googlenet"])
def test_a_model_that_does_not_fit_the_images(name):
    with pytest.raises(typer.BadParameter, match="take another model"):
        models.check_fits(name, (1, 8, 8) if name == "resnet18" else (3, 32, 32), 10)

"""The classifiers of the comparisons, built by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
import typer
from torch import Tensor, nn
from torchvision.models import VisionTransformer


class MLP(nn.Sequential):
    """Two hidden layers on the flattened image: ``(B, C, H, W) -> (B, num_classes)``."""

    def __init__(self, inputs: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )


class ConvNet(nn.Sequential):
    """Six 3×3 convolutions with batch norm, a pool after every second, then a global average: ``(B, C, H, W)``,
    H and W at least 4, ``-> (B, num_classes)``."""

    def __init__(self, channels: int, num_classes: int, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for stage in range(3):
            wide = width * 2**stage
            layers += [_conv_bn(channels, wide), nn.ReLU(), _conv_bn(wide, wide), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if stage < 2 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            channels = wide
        super().__init__(*layers, nn.Linear(channels, num_classes))


def _conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut: every second pixel, padded with zero channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(inputs, outputs, stride)
        self.second = _conv_bn(outputs, outputs)
        self.stride = stride
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(self.second(F.relu(self.first(x))) + shortcut)


class ResNet(nn.Sequential):
    """CIFAR's ResNet of 6n + 2 layers (He et al. 2015, section 4.2): ``(B, C, H, W) -> (B, num_classes)``."""

    def __init__(self, depth: int, channels: int, num_classes: int) -> None:
        blocks: list[nn.Module] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if index == 0 and outputs > 16 else 1))
                inputs = outputs
        super().__init__(
            _conv_bn(channels, 16),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, num_classes),
        )
        _initialise_convolutions(self)


class WideBlock(nn.Module):
    """A pre-activation block; the shortcut is a 1×1 convolution where the width or the resolution changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        same = inputs == outputs and stride == 1
        self.projection = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm(x))
        shortcut = x if self.projection is None else self.projection(activated)
        return self.residual(activated) + shortcut


class WideResNet(nn.Sequential):
    """WRN-depth-k (Zagoruyko and Komodakis 2016): ``(B, C, H, W) -> (B, num_classes)``."""

    def __init__(self, depth: int, widen: int, channels: int, num_classes: int, dropout: float = 0.0) -> None:
        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * widen * 2**stage
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if index == 0 and stage > 0 else 1, dropout))
                inputs = outputs
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            *blocks,
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, num_classes),
        )
        _initialise_convolutions(self)


def _small_vit(side: int, num_classes: int) -> nn.Module:
    """A pre-norm ViT (Dosovitskiy et al. 2021) of four layers on patches of 4×4 pixels: ``(B, 3, H, H) -> (B, C)``."""
    return VisionTransformer(
        image_size=side,
        patch_size=4,
        num_layers=4,
        num_heads=3,
        hidden_dim=96,
        mlp_dim=192,
        num_classes=num_classes,
    )


def _initialise_convolutions(model: nn.Module) -> None:
    """He initialisation by fan-out, as both ResNet papers' own code does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@dataclass(frozen=True)
class Defaults:
    """How a model is trained unless the command line says otherwise.

    Attributes:
        epochs, batch_size, lr, weight_decay: of SGD.
        seeds: runs of each method.
        threads: CPU threads; None for PyTorch's own choice.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seeds: int = 5
    threads: int | None = None


_BUILDERS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "mlp": lambda shape, classes: MLP(math.prod(shape), classes),
    "conv": lambda shape, classes: ConvNet(shape[0], classes),
    "resnet20": lambda shape, classes: ResNet(20, shape[0], classes),
    "resnet32": lambda shape, classes: ResNet(32, shape[0], classes),
    "vit": lambda shape, classes: _small_vit(shape[1], classes),
    "wrn-28-10": lambda shape, classes: WideResNet(28, 10, shape[0], classes),
}

_DEFAULTS = {
    # Its steps are too small to be shared between threads, which would mostly wait for each other.
    "mlp": Defaults(epochs=40, batch_size=64, lr=0.05, weight_decay=1e-4, seeds=10, threads=1),
    "conv": Defaults(epochs=20, batch_size=128, lr=0.1, weight_decay=5e-4),
    "resnet20": Defaults(epochs=100, batch_size=128, lr=0.1, weight_decay=1e-4),
    "resnet32": Defaults(epochs=100, batch_size=128, lr=0.1, weight_decay=1e-4),
    "wrn-28-10": Defaults(epochs=100, batch_size=128, lr=0.1, weight_decay=5e-4),
}


def default_training(name: str) -> Defaults:
    """A model's own training defaults; torchvision's classifiers get those it trains its ResNets with."""
    return _DEFAULTS.get(name, Defaults(epochs=90, batch_size=128, lr=0.1, weight_decay=1e-4))


def check_name(name: str) -> None:
    """Raise ``typer.BadParameter`` for a name that is no model's."""
    if name not in _BUILDERS and name not in torchvision.models.list_models(module=torchvision.models):
        raise typer.BadParameter(
            f"{name!r} is unknown; take one of {', '.join(_BUILDERS)} or a torchvision classifier such as resnet18",
            param_hint="--model",
        )


def build(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A freshly initialised classifier of ``(B, *image_shape)`` images, on the CPU."""
    if name in _BUILDERS:
        return _BUILDERS[name](image_shape, num_classes)
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def check_fits(name: str, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise ``typer.BadParameter`` if the model cannot classify such images, tried on two empty ones."""
    shown = "×".join(map(str, image_shape))
    try:
        outputs = build(name, image_shape, num_classes)(torch.zeros(2, *image_shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise typer.BadParameter(
            f"{name} does not take {shown} images ({str(error).splitlines()[0]}); take another model, or another "
            "--image-size where the data has that option",
            param_hint="--model",
        ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (2, num_classes):
        raise typer.BadParameter(
            f"{name} does not put out one tensor of logits; take another model", param_hint="--model"
        )

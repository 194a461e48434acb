"""The classifiers of the studies, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
import torchvision
import typer
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Two hidden layers on the flattened input: ``(B, …) -> (B, num_classes)``."""

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


class LeNet(nn.Sequential):
    """The net of Learning to Reweight's MNIST experiment (Ren et al. 2018), in its sizes and initialisation:
    ``(B, C, 28, 28) -> (B, 2)``. Its one logit z stands as (0, z), so that cross-entropy is the binary one."""

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = []
        for wide, pool in ((16, {"ceil_mode": True}), (32, {"ceil_mode": True}), (64, {"padding": 1})):
            layers += [nn.Conv2d(channels, wide, 5, padding=2), nn.MaxPool2d(3, 2, **pool), nn.ReLU()]
            channels = wide
        super().__init__(*layers, nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 1), _ZeroBefore())
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


class _ZeroBefore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 0))


def _conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


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
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
        super().__init__(_conv_bn(channels, 16), nn.ReLU(), *blocks, *head)
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
        head = (
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, num_classes),
        )
        super().__init__(nn.Conv2d(channels, 16, 3, padding=1, bias=False), *blocks, *head)
        _initialise_convolutions(self)


def _initialise_convolutions(model: nn.Module) -> None:
    """He initialisation by fan-out, as both ResNet papers' own code does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


Shape = tuple[int, ...]

_BUILDERS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": lambda shape, classes: MLP(math.prod(shape), classes),
    "conv": lambda shape, classes: ConvNet(shape[0], classes),
    "lenet": lambda shape, classes: LeNet(shape[0]),
    "resnet20": lambda shape, classes: ResNet(20, shape[0], classes),
    "resnet32": lambda shape, classes: ResNet(32, shape[0], classes),
    "wrn-28-10": lambda shape, classes: WideResNet(28, 10, shape[0], classes),
}


def build(name: str, shape: Shape, num_classes: int, pretrained: bool = False) -> nn.Module:
    """A classifier of ``(B, *shape)`` inputs, on the CPU.

    Args:
        name: one of the above, or a torchvision classifier such as ``resnet50`` or ``vit_b_16``.
        shape: of one input.
        num_classes: C.
        pretrained: torchvision's default weights (a download), the last layer made anew.

    Raises:
        typer.BadParameter: for a name that is no model's, or one that has no pretrained weights.
    """
    if name in _BUILDERS:
        if pretrained:
            raise typer.BadParameter(f"{name} has no pretrained weights; leave it out", param_hint="--pretrained")
        return _BUILDERS[name](shape, num_classes)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise typer.BadParameter(
            f"{name!r} is unknown; take one of {', '.join(_BUILDERS)} or a torchvision classifier such as resnet50",
            param_hint="--model",
        )
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    model = torchvision.models.get_model(name, weights="DEFAULT")
    last, layer = [(key, module) for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent = model.get_submodule(last.rpartition(".")[0])
    setattr(parent, last.rpartition(".")[2], nn.Linear(layer.in_features, num_classes))
    return model

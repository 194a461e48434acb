"""How often a step waits for the device: each value that Python reads there stops until all work queued is done.

Tensors only say that they are on a device; so the code takes the ways that it takes there, and reads can be counted.
"""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torch_molere import (
    FreeWeighting,
    InputWeighting,
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    OnlineWeighting,
    RandomSplitter,
    RandomWeighting,
    SignalWeighting,
    ValidationBuffer,
)

DEVICE, HOST = torch.device("mps"), torch.device("cpu")
READINGS = {
    getattr(torch.Tensor, name)
    for name in (
        "__bool__",
        "__float__",
        "__index__",
        "__int__",
        "allclose",
        "cpu",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "numpy",
        "tolist",
        "unique",
    )
} | {torch.allclose, torch.equal, torch.is_nonzero, torch.masked_select, torch.nonzero, torch.unique}


def tensors_in(*trees):
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            yield tree
        elif isinstance(tree, (list, tuple)):
            yield from tensors_in(*tree)


class Readings(TorchFunctionMode):
    """Tensors are on the device, unless given here or made inside of numbers alone; collects what reads their values.

    Args:
        on_host: tensors that are on the CPU.
    """

    def __init__(self, *on_host):
        super().__init__()
        self.found = []
        self.on_host = {id(tensor): tensor for tensor in on_host}

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        given = list(tensors_in(arguments, list(named.values())))
        on_host = all(id(tensor) in self.on_host for tensor in given)
        if function == torch.Tensor.device.__get__:
            return HOST if on_host else DEVICE
        if function == torch.Tensor.data.__set__ and id(arguments[1]) not in self.on_host:
            self.on_host.pop(id(arguments[0]), None)  # a module is moved
        targets = [each for each in (*arguments[1:], *named.values()) if isinstance(each, (str, torch.device))]
        if not on_host and (function in READINGS or HOST in targets or is_masked(function, arguments)):
            self.found.append(function.__name__)
        on_host = DEVICE not in targets and on_host
        arguments = [HOST if isinstance(each, torch.device) else each for each in arguments]
        named = {name: HOST if isinstance(each, torch.device) else each for name, each in named.items()}
        result = function(*arguments, **named)
        if isinstance(result, torch.Tensor):
            if on_host:
                self.on_host[id(result)] = result
            elif id(result) in self.on_host:
                result = result.clone()
        return result


def is_masked(function, arguments):
    """Whether it picks elements by a mask, of which the device must be asked how many there are."""
    if function is not torch.Tensor.__getitem__:
        return False
    return any(index.dtype == torch.bool for index in tensors_in(arguments[1:]))


def test_what_is_counted():
    x, host = torch.tensor([1.0, 0.0]), torch.tensor([3, 4])
    with Readings(host) as counted:
        bool(x[0]), int(x[0]), float(x[0]), x.tolist(), x[0].item(), x.nonzero(), torch.nonzero(x), x.cpu(), x.numpy()
        x.to(HOST), x[x > 0], torch.equal(x, x)
    assert len(counted.found) == 12
    with Readings(host) as counted:
        assert (
            x.device == (x + 1).device == host.to(x.device).device == torch.zeros(2, device=x.device).device == DEVICE
        )
        assert host.device == (host + 1).device == torch.tensor([5.0]).device == HOST
        x + x, x.sum(), torch.stack([x, x]), host.tolist(), host[host > 3], torch.tensor([1]).item(), x.to(x.device)
    assert counted.found == []


def batch(first, size=32):
    generator = torch.Generator().manual_seed(first)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(4, (size,), generator=generator), torch.arange(first, first + size)


def readings(warmup_steps, indexed=True, again=False, **options):
    """What reads the device in the third step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [batch(0), batch(32), batch(0 if again else 64)]
    with Readings(*(rows for _, _, rows in batches)) as counted:
        reweighter = MetaReweighter(model, optimizer, every=4, warmup_steps=warmup_steps, **options)
        for given in batches:
            counted.found.clear()
            result = reweighter.step(given[: 2 + indexed])
    assert result.val_loss is None  # no meta-update
    assert bool(result.val_mask.any()) == (not reweighter.validation.trusted)
    return counted.found


@pytest.mark.parametrize("again", [False, True], ids=["new_rows", "rows_seen"])
@pytest.mark.parametrize("hold_out", [True, False])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_step_without_meta_update_reads_once(warmup_steps, hold_out, again):
    buffer = ValidationBuffer(fraction=0.3, hold_out=hold_out)
    assert readings(warmup_steps, validation=buffer, again=again) == ["tolist"]


def test_without_indices():
    assert readings(0, indexed=False) == ["tolist"]


@pytest.mark.parametrize("max_weight", [None, 1.5])
@pytest.mark.parametrize(
    "weighting",
    [
        lambda: SignalWeighting(("loss", "margin", "probabilities", "label"), num_classes=4),
        lambda: FreeWeighting(200),
        lambda: InputWeighting(nn.Linear(6, 1)),
        OnlineWeighting,
        RandomWeighting,
    ],
)
def test_with_every_weighting(weighting, max_weight):
    assert readings(0, weighting=weighting(), max_weight=max_weight) == ["tolist"]


@pytest.mark.parametrize(
    "splitter",
    [
        lambda: MarginSplitter(float("inf"), trim=0.1),
        lambda: MarginSplitter(-1.0),
        RandomSplitter,
        lambda: LearnedSplitter(("loss", "margin", "probabilities", "label"), num_classes=4),
        lambda: LearnedSplitter(network=nn.Linear(6, 4)),
    ],
)
def test_with_every_splitter(splitter):
    assert readings(0, validation=ValidationBuffer(splitter=splitter(), fraction=0.3)) == ["tolist"]


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(ignore_index=2), nn.CrossEntropyLoss(torch.ones(4))])
def test_with_a_criterion(loss_fn):
    assert readings(0, loss_fn=loss_fn) == ["tolist"]


def test_with_fixed_validation():
    x, y, _ = batch(1000)
    assert readings(0, validation=[(x, y)]) == ["tolist"]

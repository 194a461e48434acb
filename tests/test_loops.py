"""Loops of one's own: what people do around optimizer and model changes nothing of what the reweighter computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()


def batches(count, size=16):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.double),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def trained(make_optimizer, around=lambda model, optimizer: optimizer.step(), to_none=True):
    """A model after eight steps of a loop of one's own, four of them with a meta-update; and the reweighter."""
    model = classifier()
    optimizer = make_optimizer(model.parameters())
    reweighter = MetaReweighter(model, optimizer, warmup_steps=1, every=2, val_fraction=0.2)
    torch.manual_seed(2)
    learned = 0
    for x, y in batches(8):
        optimizer.zero_grad(set_to_none=to_none)
        reweighter.loss(model(x), y).backward()
        around(model, optimizer)
        learned += reweighter.result.val_loss is not None
    assert reweighter.steps == 8
    assert learned == 4
    return model.state_dict(), reweighter.state_dict()


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.01, **options)


def test_gradients_may_be_zeroed_or_dropped():
    assert_same(trained(adamw(), to_none=True), trained(adamw(), to_none=False))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_the_implementation_of_the_optimizer_does_not_matter(options):
    reference = {name: value for name, value in options.items() if name == "amsgrad"}
    assert_same(trained(adamw(**options)), trained(adamw(**reference)), rtol=1e-6, atol=1e-9)


def test_a_compiled_optimizer():
    """Hooks run between its graphs. It corrects Adam's bias in float32, so SGD is the one that keeps every bit."""

    def compiled(model, optimizer):
        torch.compile(optimizer.step, backend="eager")()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    assert_same(trained(sgd, compiled), trained(sgd))
    torch._dynamo.reset()
    assert_same(trained(adamw(), compiled), trained(adamw()), rtol=1e-4, atol=1e-5)


def test_averaged_models_follow():
    average = []

    def averaging(model, optimizer):
        if not average:
            average.append(torch.optim.swa_utils.AveragedModel(model))
        optimizer.step()
        average[0].update_parameters(model)

    found, plain = trained(adamw(), averaging), trained(adamw())
    assert_same(found, plain)
    assert not torch.equal(average[0].module[0].weight, found[0]["0.weight"])


@pytest.mark.parametrize("kind", ["one cycle", "plateau"])
def test_schedulers_drive_the_look_ahead(kind):
    """A meta-update looks ahead at the rate of its own step: as with the rate set by hand."""
    schedulers, rates = [], []

    def scheduled(model, optimizer):
        if not schedulers:
            schedulers.append(
                torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
                if kind == "one cycle"
                else torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            )
        rates.append([(g["lr"], g["betas"]) for g in optimizer.param_groups])
        optimizer.step()
        schedulers[0].step(*([] if kind == "one cycle" else [len(rates)]))  # a loss that grows

    found = trained(adamw(), scheduled)
    by_hand = iter(copy.deepcopy(rates))

    def set_by_hand(model, optimizer):
        for group, (rate, betas) in zip(optimizer.param_groups, next(by_hand), strict=True):
            group["lr"], group["betas"] = rate, betas
        optimizer.step()

    assert_same(found, trained(adamw(), set_by_hand))
    assert len({rate for ((rate, _),) in rates}) > 3


class InsideAutocast(nn.Module):
    """Enters bfloat16 itself, and has an operation without a forward-mode rule."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.Rounded.apply(self.network(x)).float()


def test_no_engine_is_right_for_a_model_that_rounds_inside():
    """Forward mode is not there, and a difference of bfloat16 losses is noise: refused rather than learned from."""
    torch.manual_seed(0)
    model = InsideAutocast()
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=1, every=1)
    steps = [(x.float(), y) for x, y in batches(2, size=32)]
    reweighter.step(steps[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"finds no engine that is right.*enter it around the model instead"):
        reweighter.step(steps[1])
    assert_same(model.state_dict(), before)
    assert F.cross_entropy(model(steps[1][0]), steps[1][1]).isfinite()

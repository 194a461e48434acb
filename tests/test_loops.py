"""Loops of one's own: what people do around optimizer and model changes nothing of what the reweighter computes."""

import copy
import gc

import pytest
import torch
from oracle import NoForwardRule
from same import assert_same
from torch import nn

from torch_molere import LearnedSplitter, MetaReweighter, ValidationBuffer

pytestmark = pytest.mark.usefixtures("one_thread")


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()


def batches(count, size=16):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.double),
            torch.randint(3, (size,), generator=generator),
            torch.arange(size) + size * (number % 3),
        )
        for number in range(count)
    ]


def trained(make_optimizer, around=lambda model, optimizer: optimizer.step(), to_none=True):
    """A model after eight steps of a loop of one's own, four of them with a meta-update; and the reweighter."""
    model = classifier()
    optimizer = make_optimizer(model.parameters())
    reweighter = MetaReweighter(
        model, optimizer, warmup_steps=1, every=2, validation=ValidationBuffer(fraction=0.2, hold_out=True)
    )
    torch.manual_seed(2)
    learned = 0
    for x, y, rows in batches(8):
        optimizer.zero_grad(set_to_none=to_none)
        reweighter.loss(model(x), y, rows).backward()
        around(model, optimizer)
        learned += reweighter.result.val_loss is not None
    assert reweighter.steps == 8
    assert learned == reweighter.meta_updates == 4
    return model.state_dict(), reweighter.state_dict()


def adamw(**options):
    return lambda parameters: torch.optim.AdamW(parameters, lr=0.01, **options)


def test_gradients_may_be_zeroed_or_dropped():
    assert_same(trained(adamw(), to_none=True), trained(adamw(), to_none=False))


def test_the_criterion_is_a_module_in_its_place():
    """Assigned where a criterion stood, it gives what ``loss`` gives, and in an evaluation loop the plain loss."""

    def run(name):
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        reweighter = MetaReweighter(model, optimizer, warmup_steps=1, every=2)
        task = nn.Module()
        task.criterion = reweighter.criterion
        loss_of = {"loss": reweighter.loss, "criterion": task.criterion}[name]
        torch.manual_seed(2)
        for x, y, rows in batches(5):
            optimizer.zero_grad()
            loss_of(model(x), y, rows).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            outputs = model(x)
            assert_same(loss_of(outputs, y), nn.CrossEntropyLoss()(outputs, y))
        assert isinstance(task.criterion, nn.Module) and not list(task.parameters())
        return model.state_dict(), reweighter.state_dict()

    assert_same(run("criterion"), run("loss"))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_the_implementation_of_the_optimizer_does_not_matter(options):
    reference = {name: value for name, value in options.items() if name == "amsgrad"}
    found, expected = trained(adamw(**options)), trained(adamw(**reference))
    assert_same(found, expected, rtol=1e-5, atol=1e-6)  # finite differences make rounding larger


def test_a_compiled_optimizer():
    """Hooks run between its graphs. It corrects Adam's bias in float32, so SGD is the one that keeps every bit."""

    def compiled(model, optimizer):
        torch.compile(optimizer.step, backend="eager")()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    assert_same(trained(sgd, compiled), trained(sgd))
    torch._dynamo.reset()
    assert_same(trained(adamw(), compiled)[0], trained(adamw())[0], rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


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

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return NoForwardRule.apply(self.network(x)).float()


def test_a_model_that_rounds_inside_is_differentiated_in_reverse():
    """Forward mode is not there, and a difference of bfloat16 losses is noise; backward itself is left."""
    torch.manual_seed(0)
    model = InsideAutocast()
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=1, every=1)
    for x, y, rows in batches(3, size=32):
        result = reweighter.step((x.float(), y, rows))
    assert torch.isfinite(result.val_loss)
    assert reweighter.engine == "reverse"


@pytest.mark.parametrize("order", ["after", "before"])
def test_nothing_grows_with_the_number_of_steps(order):
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    buffer = ValidationBuffer(splitter=LearnedSplitter(("loss",)), capacity=20)
    reweighter = MetaReweighter(model, optimizer, warmup_steps=1, every=2, order=order, validation=buffer)
    steps = batches(3)

    def counted():
        gc.collect()
        alive = gc.get_objects()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in alive)
        hooks = [model._forward_pre_hooks, model._forward_hooks, *vars(optimizer).values()]
        return tensors, len(alive), sum(len(each) for each in hooks if isinstance(each, dict))

    for number in range(30):
        reweighter.step(steps[number % 3])
    tensors, objects, hooks = counted()
    for number in range(90):
        if number % 10 == 3:  # of a loss that nothing follows
            reweighter.loss(model(steps[0][0]), steps[0][1])
        reweighter.step(steps[number % 3])
    later = counted()
    assert later[2] == hooks
    # Among the tensors that other tests of this process have left, a few may come or go; one a step would be 90.
    assert later[0] - tensors <= 20
    assert later[1] <= objects + 150

"""NaN, infinity, and batches and data sets of unusual sizes and labels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import LearnedSplitter, MetaReweighter, SignalWeighting

pytestmark = pytest.mark.usefixtures("one_thread")


def made(classes=3, model=None, **options):
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, classes)) if model is None else model
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return MetaReweighter(model, optimizer, **{"warmup_steps": 1, "every": 1} | options)


def batch(size=10, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator), torch.randint(classes, (size,), generator=generator)


def everything(reweighter):
    gradients = [parameter.grad for parameter in reweighter.model.parameters()]
    states = [thing.state_dict() for thing in (reweighter, reweighter.model, reweighter.optimizer)]
    return copy.deepcopy((states, gradients, torch.get_rng_state()))


def assert_refused(reweighter, given, error, message):
    before = everything(reweighter)
    with pytest.raises(error, match=message):
        reweighter.step(given)
    assert_same(everything(reweighter), before)


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_nonfinite_inputs_and_outputs_are_refused(order, value, where):
    reweighter = made(order=order)
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    x, y = batch()
    if where == "inputs":
        x[4, 2] = value
    else:
        spoil = reweighter.model.register_forward_hook(lambda m, i, o: o.index_fill(0, torch.tensor([4]), value))
    assert_refused(reweighter, (x, y), FloatingPointError, r"instances \[4\] of the batch")
    if where == "outputs":
        spoil.remove()
    assert reweighter.step(batch()).val_loss is not None


class Spoiled(nn.Module):
    """Its output is finite, its gradient is NaN once it is told to."""

    def __init__(self, network):
        super().__init__()
        self.network, self.spoil = network, False

    def forward(self, samples):
        found = self.network(samples)
        if self.spoil and found.requires_grad:
            found.register_hook(lambda gradient: gradient * torch.nan)
        return found


@pytest.mark.parametrize("order", ["after", "before"])
def test_nonfinite_gradients_of_the_networks_move_nothing(order, caplog):
    weighting, splitter = Spoiled(SignalWeighting()), Spoiled(LearnedSplitter())
    reweighter = made(weighting=weighting, splitter=splitter, order=order)
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    weighting.spoil = splitter.spoil = True
    before = copy.deepcopy((weighting.state_dict(), splitter.state_dict()))
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    assert_same((weighting.state_dict(), splitter.state_dict()), before)
    assert len([r for r in caplog.records if "weighting's gradient is not finite" in r.message]) == 1
    weighting.spoil = splitter.spoil = False
    reweighter.step(batch())
    assert not torch.equal(weighting.state_dict()["network.network.1.weight"], before[0]["network.network.1.weight"])


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("engine", ["auto", "forward", "finite"])
def test_a_nonfinite_gradient_of_training_skips_the_meta_update(order, engine):
    """The loss is finite, its gradient is not: what then becomes of θ is plain training's affair, φ stays."""

    def loss_fn(outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses + (losses - losses.detach()).abs().sqrt()  # slope ∞ · 0

    reweighter = made(loss_fn=loss_fn, order=order, hypergradient=engine, validation=[batch(seed=9)])
    reweighter.step(batch())
    phi = copy.deepcopy(reweighter.weighting.state_dict())
    reweighter = made(loss_fn=loss_fn, order=order, hypergradient=engine, validation=[batch(seed=9)], warmup_steps=0)
    reweighter.step(batch())
    assert_same(reweighter.weighting.state_dict(), phi)


@pytest.mark.parametrize("order", ["after", "before"])
def test_overflows_of_a_scaler_on_the_way(order):
    """Scales that halve and grow, with gradients zeroed either way; φ and Θ stay finite and learn."""
    reweighter = made(
        order=order, scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4))
    )
    model, optimizer = reweighter.model, reweighter.optimizer
    phi = copy.deepcopy(reweighter.weighting.state_dict())
    for step in range(40):
        x, y = batch(seed=step)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = reweighter.loss(model(x), y) * (torch.inf if step % 9 == 5 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert reweighter.steps == 40 - 4
    learned = reweighter.weighting.state_dict()
    assert all(torch.isfinite(value).all() for value in learned.values())
    assert not torch.equal(learned["network.1.weight"], phi["network.1.weight"])
    assert len(reweighter._weighted) <= 1


@pytest.mark.parametrize("indexed", [False, True])
def test_batches_of_one_between_others(indexed):
    reweighter = made(val_fraction=0.3)
    for step, size in enumerate([1, 4, 1, 1, 6, 1, 2, 1]):
        x, y = batch(size, step)
        result = reweighter.step((x, y, 10 * step + torch.arange(size)) if indexed else (x, y))
        assert (~result.val_mask).any()
        assert torch.isfinite(result.loss)
    assert result.val_loss is not None


@pytest.mark.parametrize("warmup", [0, 2])
def test_an_empty_batch_is_refused(warmup):
    reweighter = made(warmup_steps=warmup)
    reweighter.step(batch())
    assert_refused(reweighter, batch(0), ValueError, "batch must have at least one instance, got none")


def test_one_class_only():
    reweighter = made()
    for seed in range(10):
        x, y = batch(seed=seed)
        result = reweighter.step((x, torch.full_like(y, 2)))
    assert torch.isfinite(result.val_loss)
    assert reweighter.buffer.class_counts().keys() == {2}


@pytest.mark.parametrize("capacity", [2, 3, 7])
@pytest.mark.parametrize("indexed", [False, True])
def test_batches_larger_than_the_buffer(capacity, indexed):
    reweighter = made(buffer_size=capacity, val_fraction=0.5)
    for seed in range(8):
        x, y = batch(40, seed)
        result = reweighter.step((x, y, torch.arange(40) + seed) if indexed else (x, y))
        assert 2 <= len(reweighter.buffer) <= capacity
    assert torch.isfinite(result.val_loss)


def test_a_buffer_of_one_says_why_it_never_serves(caplog):
    reweighter = made(buffer_size=1)
    for seed in range(4):
        assert reweighter.step(batch(seed=seed)).val_loss is None
    assert len([r for r in caplog.records if "a buffer_size of at least 2" in r.message]) == 1


@pytest.mark.parametrize("label", [3, 99, -1])
def test_labels_outside_the_classes_change_nothing(label):
    reweighter = made()
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    x, y = batch()
    y[3] = label
    assert_refused(reweighter, (x, y), IndexError, f"Target {label} is out of bounds")


def test_a_dataset_smaller_than_the_buffer():
    reweighter = made(val_fraction=0.2)
    x, y = batch(12)
    shown = sent = 0
    for epoch in range(15):
        for rows in torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).split(5):
            result = reweighter.step((x[rows], y[rows], rows))
            shown, sent = shown + len(rows), sent + int(result.val_mask.sum())
            assert len(reweighter.buffer) <= 12
            assert sent <= 1.5 * 0.2 * shown + 1
    assert len(reweighter.history.table()["row"]) == 12
    assert torch.isfinite(reweighter.history.table()["weight"]).any()


def test_classes_that_appear_late():
    """A signal by label knows them from the start; the buffer's labels follow the stream's within its tolerance."""
    reweighter = made(
        5,
        weighting=SignalWeighting(("loss", "label"), num_classes=5),
        splitter=LearnedSplitter(("loss", "label"), num_classes=5),
        val_fraction=0.3,
        buffer_size=60,
    )
    for seed in range(30):
        reweighter.step(batch(20, seed))
    assert reweighter.buffer.class_counts().keys() <= {0, 1, 2}
    for seed in range(30, 120):
        result = reweighter.step(batch(20, seed, classes=5))
        assert torch.isfinite(result.val_loss)
    counts = reweighter.buffer.class_counts()
    assert counts.keys() == {0, 1, 2, 3, 4}
    stream = reweighter.buffer._seen
    for label, count in counts.items():
        share = stream[label] / sum(stream.values())
        assert count <= 1.35 * share * len(reweighter.buffer) + 2

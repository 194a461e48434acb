"""NaN, infinity, and batches and data sets of unusual sizes and labels."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import (
    LearnedSplitter,
    MetaReweighter,
    OnlineWeighting,
    SignalWeighting,
    ValidationBuffer,
)

pytestmark = pytest.mark.usefixtures("one_thread")
orders = pytest.mark.parametrize("order", ["after", "before"])


def made(classes=3, model=None, **options):
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return MetaReweighter(model, optimizer, **{"warmup_steps": 1, "every": 1} | options)


def batch(size=10, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator), torch.randint(classes, (size,), generator=generator)


def everything(reweighter):
    states = [thing.state_dict() for thing in (reweighter, reweighter.model, *reweighter.optimizers)]
    return copy.deepcopy((states, torch.get_rng_state()))


def assert_refused(reweighter, given, error, message):
    before = everything(reweighter)
    with pytest.raises(error, match=message):
        reweighter.step(given)
    assert_same(everything(reweighter), before)


# NaN and infinity


@orders
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
        spoil = reweighter.model[-1].register_forward_hook(lambda m, i, o: o.index_fill(0, torch.tensor([4]), value))
    assert_refused(reweighter, (x, y), FloatingPointError, r"instances \[4\] of the batch")
    if where == "outputs":
        spoil.remove()
    assert reweighter.step(batch()).val_loss is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("warmup", [0, 3])
def test_nonfinite_losses_are_refused_with_their_rows(value, warmup):
    spoilt = torch.tensor([], dtype=torch.long)

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none").index_fill(0, spoilt, value)

    reweighter = made(warmup_steps=warmup, loss_fn=loss_fn)
    for seed in range(2):
        reweighter.step(batch(seed=seed))
    spoilt = torch.tensor([2, 7])
    assert_refused(reweighter, batch(), FloatingPointError, re.escape("instances [2, 7] of the batch"))
    spoilt = torch.arange(29)
    assert_refused(reweighter, batch(29), FloatingPointError, r"19\] and 9 more")


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


@orders
def test_nonfinite_gradients_of_the_networks_move_nothing(order, caplog):
    weighting, splitter = Spoiled(SignalWeighting()), Spoiled(LearnedSplitter())
    reweighter = made(weighting=weighting, validation=ValidationBuffer(splitter=splitter), order=order)
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    weighting.spoil = splitter.spoil = True
    before = copy.deepcopy((weighting.state_dict(), splitter.state_dict()))
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    assert_same((weighting.state_dict(), splitter.state_dict()), before)
    assert len([r for r in caplog.records if "skipped a meta-update" in r.message]) == 1
    weighting.spoil = splitter.spoil = False
    reweighter.step(batch())
    assert any(not torch.equal(now, old) for now, old in zip(weighting.parameters(), before[0].values(), strict=True))


@orders
@pytest.mark.parametrize("engine", ["auto", "forward", "finite", "reverse"])
def test_a_nonfinite_gradient_of_training_teaches_nothing(order, engine):
    """The loss is finite, its gradient is not: what then becomes of θ is plain training's affair, φ stays."""

    def loss_fn(outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses + (losses - losses.detach()).abs().sqrt()  # slope ∞ · 0

    reweighter = made(loss_fn=loss_fn, order=order, hypergradient=engine, validation=[batch(seed=9)], warmup_steps=0)
    phi = copy.deepcopy(reweighter.weighting.state_dict())
    reweighter.step(batch())
    assert torch.isnan(reweighter.result.val_loss)
    assert_same(reweighter.weighting.state_dict(), phi)
    assert_refused(reweighter, batch(), FloatingPointError, "loss is NaN or infinite for instances")


def test_a_nonfinite_validation_loss_skips_the_meta_update(caplog):
    x, y = batch()
    reweighter = made(validation=[(x * torch.nan, y)], warmup_steps=0)
    phi = copy.deepcopy(reweighter.weighting.state_dict())
    for _ in range(3):
        assert torch.isnan(reweighter.step((x, y)).val_loss)
    assert_same(reweighter.weighting.state_dict(), phi)
    assert len([r for r in caplog.records if "skipped a meta-update" in r.message]) == 1


def test_overflows_of_a_scaler_on_the_way():
    """Scales that halve and grow, with gradients zeroed either way; φ stays finite and learns."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
    reweighter = made(scaler=scaler)
    model, (optimizer,) = reweighter.model, reweighter.optimizers
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
    assert not reweighter.attachment.active


# Sizes


@pytest.mark.parametrize("indexed", [False, True])
def test_batches_of_one_between_others(indexed):
    reweighter = made(validation=ValidationBuffer(fraction=0.3, hold_out=True))
    for step, size in enumerate([1, 4, 1, 1, 6, 1, 2, 1]):
        x, y = batch(size, step)
        result = reweighter.step((x, y, 10 * step + torch.arange(size)) if indexed else (x, y))
        assert (~result.held_out).any()
        assert torch.isfinite(result.loss)
    assert result.val_loss is not None


@pytest.mark.parametrize("warmup", [0, 2])
def test_an_empty_batch_is_refused(warmup):
    reweighter = made(warmup_steps=warmup)
    reweighter.step(batch())
    assert_refused(reweighter, batch(0), ValueError, "batch must have at least one instance, got none")


@pytest.mark.parametrize("capacity", [2, 3, 7])
@pytest.mark.parametrize("indexed", [False, True])
def test_batches_larger_than_the_buffer(capacity, indexed):
    buffer = ValidationBuffer(capacity=capacity, fraction=0.5)
    reweighter = made(validation=buffer)
    for seed in range(8):
        x, y = batch(40, seed)
        result = reweighter.step((x, y, torch.arange(40) + seed) if indexed else (x, y))
        assert 2 <= len(buffer) <= capacity
    assert torch.isfinite(result.val_loss)


@pytest.mark.parametrize("hold_out", [True, False])
def test_a_dataset_smaller_than_the_buffer(hold_out):
    buffer = ValidationBuffer(fraction=0.2, hold_out=hold_out)
    reweighter = made(validation=buffer)
    x, y = batch(12)
    shown = sent = 0
    for epoch in range(15):
        for rows in torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).split(5):
            result = reweighter.step((x[rows], y[rows], rows))
            shown, sent = shown + len(rows), sent + int(result.val_mask.sum())
            assert len(buffer) <= 12
            assert sent <= 1.5 * 0.2 * shown + 1
    table = reweighter.history.table()
    assert table["row"].tolist() == list(range(12))
    assert table["seen"].tolist() == [15] * 12
    assert torch.isfinite(table["weight"]).any()


# Labels


def test_one_class_only():
    buffer = ValidationBuffer(splitter=LearnedSplitter())
    reweighter = made(validation=buffer)
    for seed in range(10):
        x, y = batch(seed=seed)
        result = reweighter.step((x, torch.full_like(y, 2)))
    assert torch.isfinite(result.val_loss)
    assert buffer.store.class_counts().keys() == {2}


@pytest.mark.parametrize("label", [3, 99, -1])
def test_labels_outside_the_classes_change_nothing(label):
    reweighter = made()
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    x, y = batch()
    y[3] = label
    assert_refused(reweighter, (x, y), IndexError, f"Target {label} is out of bounds")


def test_classes_that_appear_late():
    """A signal by label knows them from the start; the buffer's labels follow the stream's within its tolerance."""
    splitter = LearnedSplitter(("loss", "label"), num_classes=5)
    buffer = ValidationBuffer(splitter=splitter, fraction=0.3, capacity=60)
    reweighter = made(5, weighting=SignalWeighting(("loss", "label"), num_classes=5), validation=buffer, every=2)
    seen = torch.zeros(5)
    for seed in range(90):
        x, y = batch(20, seed, classes=3 if seed < 30 else 5)
        result = reweighter.step((x, y))
        seen += y.bincount(minlength=5)
        if seed == 29:
            assert buffer.store.class_counts().keys() <= {0, 1, 2}
        assert result.val_loss is None or torch.isfinite(result.val_loss)
    counts = buffer.store.class_counts()
    assert counts.keys() == {0, 1, 2, 3, 4}
    for label, count in counts.items():
        assert count <= 1.35 * float(seen[label] / seen.sum()) * len(buffer) + 2


# Networks that are of no use


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_splitter_of_too_few_classes_changes_nothing(warmup):
    buffer = ValidationBuffer(splitter=LearnedSplitter(network=nn.Linear(5, 2)))
    reweighter = made(warmup_steps=warmup, validation=buffer)
    for _ in range(warmup):
        reweighter.step(batch())
    assert_refused(reweighter, batch(), RuntimeError, "out of bounds")
    assert not reweighter.attachment.active


def test_a_weighting_that_finds_nothing_takes_no_step():
    """Learning to Reweight, where no instance helps: weights of zero, a gradient of zero."""
    x, y = batch()
    weighting = OnlineWeighting(offset=0.0, decay=0.0)
    reweighter = made(weighting=weighting, order="before", validation=[(x, 0 * y)], warmup_steps=0)
    parameters = copy.deepcopy(reweighter.model.state_dict())
    result = reweighter.step((x, 0 * y + 1))  # the validation set says that all of it is wrong
    assert (result.meta_gradient > 0).all()
    assert not result.weights.any()
    assert result.loss == 0
    assert_same(reweighter.model.state_dict(), parameters)


# Precision


def test_reduced_precision_parameters_take_forward_mode():
    x, y = batch()
    model = nn.Linear(5, 3).to(torch.bfloat16)
    options = {"validation": [(x.bfloat16(), y)], "warmup_steps": 0}
    reweighter = made(model=model, **options)
    reweighter.step((x.bfloat16(), y))
    assert reweighter.engine == "forward"
    reweighter = made(model=model, hypergradient="finite", **options)
    with pytest.raises(RuntimeError, match=r"needs float32 or float64 parameters, got torch\.bfloat16"):
        reweighter.step((x.bfloat16(), y))

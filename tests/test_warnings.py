"""Three lines that silently do nothing, and other things that are said once, with the remedy."""

import gc
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_molere import (
    MarginSplitter,
    MetaReweighter,
    RandomSplitter,
    SignalWeighting,
    ValidationBuffer,
    with_indices,
)

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 10, 3


@pytest.fixture
def said(caplog):
    """The warnings so far that have this in them."""
    caplog.set_level(logging.WARNING, logger="torch_molere")
    return lambda part: [record.message for record in caplog.records if part in record.message]


def made(optimizer=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, C)
    make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    return MetaReweighter(model, make(model.parameters()), **options)


def batch(seed, rows=None):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.arange(B) + B * seed if rows is None else rows
    return torch.randn(B, 4, generator=generator), torch.randint(C, (B,), generator=generator), indices


def loader(rows=50):
    data = TensorDataset(torch.randn(rows, 4), torch.randint(C, (rows,)))
    return DataLoader(with_indices(data), batch_size=B, shuffle=True)


@pytest.mark.parametrize("end", ["closed", "collected", "left"])
def test_a_warm_up_longer_than_the_run(end, said):
    """27. Said when the reweighter ends without a meta-update."""
    reweighter = made(warmup_steps=100)
    for step in range(4):
        reweighter.step(batch(step))
    assert not said("did nothing")
    if end == "closed":
        reweighter.close()
        reweighter.close()
    elif end == "left":
        with reweighter:
            pass
    del reweighter
    gc.collect()
    (message,) = said("did nothing in 4 steps")
    assert "warmup_steps is longer than the run" in message


@pytest.mark.parametrize("case", ["with updates", "without a step", "resumed"])
def test_a_run_that_did_something_ends_in_silence(case, said):
    """27."""
    reweighter = made(warmup_steps=1, every=1, validation=ValidationBuffer(fraction=0.3))
    for step in range(0 if case == "without a step" else 4):
        reweighter.step(batch(step))
    if case == "resumed":  # between two meta-updates
        other = made(warmup_steps=1, every=1, validation=ValidationBuffer(fraction=0.3))
        other.load_state_dict(reweighter.state_dict())
        other.every = 100
        other.step(batch(9))
        assert other.result.val_loss is None
        other.close()
    reweighter.close()
    assert not said("did nothing")


def test_a_warm_up_longer_than_an_epoch(said):
    """27. Known by the rows that come again; once."""
    reweighter = made(warmup_steps=100)
    data = loader()
    steps = 0
    for _ in range(3):
        for inputs, targets, indices in data:
            reweighter.step((inputs, targets, indices))
            steps += 1
            if steps <= 5:
                assert not said("longer than an epoch")
    (message,) = said("warm-up is longer than an epoch")
    assert "lower warmup_steps" in message


@pytest.mark.parametrize("case", ["within the first epoch", "new rows always", "no indices"])
def test_a_warm_up_that_is_over_in_time(case, said):
    """27."""
    reweighter = made(warmup_steps=4 if "within" in case else 100)
    for epoch in range(3):
        for step, (inputs, targets, indices) in enumerate(loader()):
            if case == "new rows always":
                indices = indices + 50 * epoch
            reweighter.step((inputs, targets) if case == "no indices" else (inputs, targets, indices))
            assert step < 5
    assert not said("longer than an epoch")


def test_no_indices(said):
    """27. Once, with the remedy."""
    reweighter = made()
    for step in range(3):
        reweighter.step(batch(step)[:2])
    (message,) = said("batches come without indices")
    assert "with_indices(dataset)" in message
    assert len(reweighter.history) == 0


def test_indices_are_no_matter_of_a_warning(said):
    """27."""
    reweighter = made()
    for step in range(3):
        reweighter.step(batch(step))
    assert not said("indices")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_a_resume_without_the_state(kind, said):
    """27. The optimizer has taken steps, the reweighter is new: said once. Adagrad has state from the start."""
    torch.manual_seed(0)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model = nn.Linear(4, C)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    first = MetaReweighter(model, optimizer)
    for step in range(3):
        first.step(batch(step))
    states = [thing.state_dict() for thing in (model, optimizer, first)]
    first.close()
    assert not said("resumed run")
    for load in (False, True):
        model = nn.Linear(4, C)
        optimizer = kind(model.parameters(), lr=0.1, **options)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        second = MetaReweighter(model, optimizer)
        if load:
            second.load_state_dict(states[2])
        for step in range(2):
            second.step(batch(step))
        (message,) = said("resumed run")  # of the one that was not loaded
        assert "reweighter.state_dict()" in message


def test_an_empty_buffer(said):
    """Batches of one never fill it."""
    reweighter = made(warmup_steps=0, every=1)
    for step in range(3):
        x, y, rows = batch(step)
        result = reweighter.step((x[:1], y[:1], rows[:1]))
        assert result.val_loss is None
        assert result.weights.tolist() == [1.0]
    (message,) = said("fewer than two instances")
    assert "batches of one" in message
    assert "pass validation=" in message


def test_a_validation_loss_of_nan_skips_meta_updates(said):
    x, y, _ = batch(0)
    reweighter = made(warmup_steps=0, every=1, validation=[(x * torch.nan, y)], weighting=SignalWeighting())
    phi = [parameter.detach().clone() for parameter in reweighter.weighting.parameters()]
    for step in range(3):
        assert torch.isnan(reweighter.step(batch(step)).val_loss)
    assert all(torch.equal(a, b) for a, b in zip(phi, reweighter.weighting.parameters(), strict=True))
    assert len(said("skipped a meta-update")) == 1


def test_a_plain_run_says_nothing(said):
    """Defaults, indices, several epochs: no line but that of the warm-up, if that is long."""
    reweighter = made(warmup_steps=3)
    for _ in range(4):
        for each in loader():
            reweighter.step(each)
    assert reweighter.meta_updates > 0
    assert not said("")


@pytest.mark.parametrize("wrong", [0.0, 0.25])
@pytest.mark.parametrize("splitter", [MarginSplitter(), RandomSplitter(0.1, 0)], ids=["by hardness", "at random"])
def test_hard_rows_that_look_like_wrong_labels(wrong, splitter, said, monkeypatch):
    """Classes far apart, some rows with another label: those are what is hard."""
    monkeypatch.setattr("torch_molere.advice.LABELS_EVERY", 20)
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % C
    inputs = 8.0 * nn.functional.one_hot(targets, 4).float() + 0.1 * torch.randn(60, 4, generator=generator)
    labels = torch.where(torch.arange(60) < 60 * wrong, (targets + 1 + torch.arange(60) // 3 % 2) % C, targets)
    reweighter = made(validation=ValidationBuffer(splitter=splitter), every=1, warmup_steps=0)
    for _ in range(100):
        rows = torch.randperm(60, generator=generator)[:20]
        reweighter.step((inputs[rows], labels[rows], rows))
    running = reweighter.history.table()["running_margin"]
    assert reweighter.history.share_below(-0.5) == pytest.approx(float((running < -0.5).double().mean()))
    found = said("predicted as another class with certainty")
    assert len(found) == (1 if wrong and isinstance(splitter, MarginSplitter) else 0)
    assert not found or "Give trusted rows as validation=" in found[0]

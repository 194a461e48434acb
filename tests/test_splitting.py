"""Splitters and their losses against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from torch_molere import LearnedSplitter, MarginSplitter, MetaReweighter, RandomSplitter, Samples
from torch_molere.margins import probabilistic_margin
from torch_molere.splitting import gap_loss, label_penalty, ratio_penalty, splitter_loss

probabilities = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=30)


def double(values):
    return torch.tensor(values, dtype=torch.double)


def samples(size=8, classes=3, indices=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(size, classes, generator=generator)
    targets = torch.randint(classes, (size,), generator=generator)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return Samples(((outputs,), {}), targets, outputs, losses, outputs.argmax(1) == targets, indices)


@given(p=probabilities, seed=st.integers(0, 99))
def test_gap_loss_is_binary_cross_entropy(p, seed):
    p = double(p)
    correct = torch.rand(len(p), generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = -torch.where(correct, p.log(), (1 - p).log()).mean()
    torch.testing.assert_close(gap_loss(p, correct), expected)


@given(p=probabilities, delta=st.floats(0.01, 0.99))
def test_ratio_penalty_is_the_divergence_of_two_coins(p, delta):
    p = double(p)
    expected = kl_divergence(Bernoulli(double(delta)), Bernoulli((1 - p).mean()))
    torch.testing.assert_close(ratio_penalty(p, delta), expected, rtol=1e-9, atol=1e-12)
    assert ratio_penalty(torch.full((3,), 1 - delta, dtype=torch.double), delta).abs() < 1e-12


@given(p=probabilities, seed=st.integers(0, 99), classes=st.integers(1, 4))
def test_label_penalty_is_two_divergences_from_the_labels_of_the_batch(p, seed, classes):
    p = double(p)
    y = torch.randint(classes, (len(p),), generator=torch.Generator().manual_seed(seed))
    y[:classes] = torch.arange(classes)[: len(p)]  # every class there, or the reference has log 0
    present = y.unique()
    overall, train, validation = (
        Categorical(torch.stack([soft[y == c].sum() for c in present])) for soft in (torch.ones_like(p), p, 1 - p)
    )
    expected = kl_divergence(overall, train) + kl_divergence(overall, validation)
    torch.testing.assert_close(label_penalty(p, y, classes + 2), expected, rtol=1e-9, atol=1e-12)
    even = torch.full_like(p, 0.3)
    assert label_penalty(even, y, classes).abs() < 1e-12


def test_losses_are_differentiable_and_finite_at_the_edges():
    p = double([0.0, 1.0, 1.0]).requires_grad_()
    loss = gap_loss(p, torch.tensor([True, False, True])) + ratio_penalty(p, 0.1)
    loss = loss + label_penalty(p, torch.tensor([0, 1, 1]), 2) + ratio_penalty(torch.ones(2), 0.5)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: gap_loss(p[:0], torch.ones(0).bool()), "p_train must be a floating"),
        (lambda p: gap_loss(p, torch.ones(2).bool()), r"correct must be \(3,\) like p_train, got \(2,\)"),
        (lambda p: ratio_penalty(p, 1.0), r"delta must lie in \(0, 1\), got 1.0"),
        (lambda p: ratio_penalty(p.long(), 0.1), "p_train must be a floating"),
        (lambda p: label_penalty(p, torch.zeros(3), 2), "targets must be .* integer class indices"),
        (
            lambda p: label_penalty(p, torch.tensor([0, 1, 2]), 2),
            r"targets must lie in \[0, 2\), got values from 0 to 2",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.full((3,), 0.5))


def test_splitter_loss_is_the_sum_of_the_three():
    splitter = LearnedSplitter(("loss", "margin"))
    nn.init.normal_(splitter.network[-1].weight)
    validation, batch = samples(6, seed=1), samples(10, seed=2)
    loss, p = splitter_loss(splitter, validation, batch, 0.2)
    p_batch = splitter(batch)
    expected = gap_loss(splitter(validation), validation.correct) + ratio_penalty(p_batch, 0.2)
    torch.testing.assert_close(loss, expected + label_penalty(p_batch, batch.targets, 3))
    assert torch.equal(p, splitter(validation).detach())


@given(seed=st.integers(0, 2**40), rate=st.floats(0.05, 0.95))
@settings(max_examples=10)
def test_random_splitter_keeps_rows_on_their_side_at_its_rate(seed, rate):
    rows = torch.arange(20_000)
    splitter, same = RandomSplitter(rate, seed), RandomSplitter(rate, seed)
    held = splitter(samples(20_000, indices=rows)) < 0.5
    order = torch.randperm(20_000)
    assert torch.equal(same(samples(20_000, indices=rows[order])) < 0.5, held[order])
    deviation = math.sqrt(rate * (1 - rate) / 20_000)
    assert abs(held.double().mean() - rate) < 5 * deviation
    unindexed = splitter(samples(20_000)) < 0.5
    assert abs(unindexed.double().mean() - rate) < 5 * deviation
    other = RandomSplitter(rate, seed + 1)(samples(20_000, indices=rows)) < 0.5
    both = rate * rate
    assert abs((held & other).double().mean() - both) < 5 * math.sqrt(both * (1 - both) / 20_000)


def test_margin_splitter():
    batch = samples(20)
    margin = probabilistic_margin(batch.outputs, batch.targets)
    assert torch.equal(MarginSplitter()(batch) < 0.5, margin < 0)
    assert torch.equal(MarginSplitter("easy")(batch) < 0.5, margin > 0)
    with pytest.raises(ValueError, match="side must be 'hard' or 'easy', got 'soft'"):
        MarginSplitter("soft")


def test_learned_splitter_on_inputs():
    batch = samples(7)
    network = nn.Linear(3, 3)
    scores = network(batch.inputs)
    expected = torch.sigmoid(scores[torch.arange(7), batch.targets])
    torch.testing.assert_close(LearnedSplitter(network=network)(batch), expected)
    blind = nn.Linear(3, 1)
    torch.testing.assert_close(LearnedSplitter(network=blind)(batch), torch.sigmoid(blind(batch.inputs)[:, 0]))
    with pytest.raises(ValueError, match=r"network must return \(7,\)"):
        LearnedSplitter(network=nn.Sequential(nn.Flatten(0), nn.Linear(21, 5)))(batch)
    regression = Samples(batch.arguments, torch.randn(7, 3), batch.outputs, batch.losses, batch.correct)
    with pytest.raises(ValueError, match="several outputs needs class-index targets"):
        LearnedSplitter(network=network)(regression)


def test_the_learned_splitter_finds_the_hard_instances():
    """A third of the rows has random labels: after a while they are what is held out."""
    torch.manual_seed(0)
    x = torch.randn(600, 10)
    y = (x[:, 0] > 0).long()
    hard = torch.arange(600) % 3 == 0
    y[hard] = torch.randint(2, (200,))
    model = nn.Linear(10, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reweighter = MetaReweighter(
        model, optimizer, splitter=LearnedSplitter(("loss", "margin")), splitter_lr=0.01, warmup_steps=50, every=1
    )
    for _ in range(30):
        for rows in torch.randperm(600).chunk(10):
            reweighter.step((x[rows], y[rows], rows))
    held = torch.tensor(reweighter.buffer.rows)
    assert 10 <= len(held) <= 90
    assert hard[held].double().mean() > 0.7  # a third by chance

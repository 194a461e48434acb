"""Splitters and their losses against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_samples import Operations, some_samples
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from torch_molere.splitting import (
    LearnedSplitter,
    MarginSplitter,
    RandomSplitter,
    gap_loss,
    label_penalty,
    ratio_penalty,
    splitter_loss,
)

probabilities = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=30)


def double(values):
    return torch.tensor(values, dtype=torch.double)


def sent_rates(splitter, samples, draws=3000):
    """How often each instance is sent to validation; and how many at least and at most of a batch."""
    torch.manual_seed(0)
    sent = torch.stack([splitter(samples) < 0.5 for _ in range(draws)]).double()
    return sent.mean(dim=0), sent.sum(dim=1).min().item(), sent.sum(dim=1).max().item()


def assert_rates(found, expected, draws=3000):
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= 5 * deviation + 1e-12).all(), (found, expected)


MARGINS = torch.tensor([-1.0, -0.6, -0.2, 0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 1.0], dtype=torch.double)


def by_margin(margins=MARGINS):
    order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(0))
    shuffled = margins[order]
    return some_samples(len(margins), dtype=torch.double, running_margins=shuffled), shuffled


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 1.0, 2.0, -1.0, -2.0])
def test_instances_are_drawn_in_proportion_to_their_hardness(sharpness):
    samples, margins = by_margin()
    splitter = MarginSplitter(sharpness)
    sign = 1 if sharpness >= 0 else -1
    hardness = torch.stack([((1 - sign * m) / 2 + 0.02) ** abs(sharpness) for m in margins])
    rates, _, _ = sent_rates(splitter, samples)
    assert_rates(rates, (0.1 * hardness / hardness.mean()).clamp_max(1.0))


def test_the_mean_hardness_is_that_of_the_stream():
    splitter = MarginSplitter()
    total = factors = 0.0
    for number in range(5):
        batch = some_samples(6, seed=number)
        splitter.observe(batch)
        mean = ((1 - batch.running_margins) / 2 + 0.02).mean().item()
        total, factors = 0.9 * total + mean, 0.9 * factors + 1.0
        assert splitter.stream[0].item() == pytest.approx(total / factors, rel=1e-6)
    easy, _ = by_margin(torch.full((10,), 0.9, dtype=torch.double))  # a batch of easy instances sends fewer
    rates, _, _ = sent_rates(splitter, easy)
    assert_rates(rates, torch.full((10,), 0.1 * 0.07 / (total / factors), dtype=torch.double))
    other = MarginSplitter()
    other.load_state_dict(splitter.state_dict())
    assert torch.equal(other.stream, splitter.stream)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.33])
@pytest.mark.parametrize("sharpness", [math.inf, -math.inf])
def test_the_hardest_or_easiest_fraction_of_each_batch(sharpness, fraction):
    samples, margins = by_margin()
    splitter = MarginSplitter(sharpness)
    splitter.fraction = fraction
    rates, fewest, most = sent_rates(splitter, samples)
    quota = 10 * fraction
    place = margins.argsort(descending=sharpness < 0).argsort()
    assert_rates(rates, (quota - place).clamp(0.0, 1.0))
    assert (fewest, most) == (math.floor(quota), math.ceil(quota))
    p = splitter(samples)
    assert torch.equal(p.argsort(stable=True)[:2], place.argsort()[:2])  # the most extreme ones have the smallest p


@pytest.mark.parametrize("sharpness", [1.0, math.inf, 0.0, -math.inf])
@pytest.mark.parametrize("trim", [0.2, 0.25])
def test_the_hardest_of_the_batch_are_trimmed(sharpness, trim):
    samples, margins = by_margin()
    rates, _, _ = sent_rates(MarginSplitter(sharpness, trim), samples)
    place = margins.argsort().argsort().double()
    kept = (place + 1 - 10 * trim).clamp(0.0, 1.0)
    if math.isinf(sharpness):
        order = place if sharpness > 0 else 9 - place
        before = 10 * trim if sharpness > 0 else 0.0
        expected = (before + 1.0 - order).clamp(0.0, 1.0) - (before - order).clamp(0.0, 1.0)
    else:
        hardness = kept * ((1 - margins) / 2 + 0.02) ** sharpness
        expected = 0.1 * hardness / hardness.mean()
    assert_rates(rates, expected)
    assert not rates[place < 2].any()
    assert rates.sum().item() == pytest.approx(1.0, abs=0.1)  # the fraction is kept


def test_without_classes_the_rank_of_the_running_loss_stands_in():
    losses = torch.tensor([0.1, 5.0, 0.7, 300.0], dtype=torch.double)
    samples = some_samples(4, num_classes=None, dtype=torch.double, running_losses=losses)
    splitter = MarginSplitter()
    splitter.fraction = 0.3
    rates, _, _ = sent_rates(splitter, samples)
    hardness = double([0.125, 0.625, 0.375, 0.875]) + 0.02
    assert_rates(rates, 0.3 * hardness / hardness.mean())
    hardest, _, _ = sent_rates(MarginSplitter(math.inf), samples)
    assert hardest[3] > 0.3 and not hardest[:3].any()


def test_margin_splitters_stay_in_range_and_repeat_with_the_random_stream():
    for sharpness in (0.0, 1.0, 300.0, math.inf, -math.inf):
        for trim in (0.0, 0.9):
            for size in (1, 2, 50):
                splitter, batch = MarginSplitter(sharpness, trim), some_samples(size)
                torch.manual_seed(7)
                p = splitter(batch)
                assert p.shape == (size,) and (p >= 0).all() and (p <= 1).all()
                torch.manual_seed(7)
                assert torch.equal(splitter(batch), p)
                splitter.observe(batch)
    with pytest.raises(ValueError, match="sharpness must be a number"):
        MarginSplitter(math.nan)
    for trim in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"trim must lie in \[0, 1\), got"):
            MarginSplitter(trim=trim)


def test_few_operations():
    """A small network's step is a few hundred of them."""
    splitter, batch = MarginSplitter(), some_samples(128)
    splitter.observe(batch)
    with Operations() as forward:
        splitter(batch)
    with Operations() as observe:
        splitter.observe(batch)
    assert forward.count <= 13
    assert observe.count <= 10


@given(seed=st.integers(0, 2**40), rate=st.floats(0.05, 0.95))
@settings(max_examples=10)
def test_random_splitter_keeps_rows_on_their_side_at_its_rate(seed, rate):
    rows = torch.arange(20_000)
    splitter, same = RandomSplitter(rate, seed), RandomSplitter(rate, seed)
    held = splitter(some_samples(20_000, indices=rows)) < 0.5
    order = torch.randperm(20_000)
    assert torch.equal(same(some_samples(20_000, indices=rows[order])) < 0.5, held[order])
    deviation = math.sqrt(rate * (1 - rate) / 20_000)
    assert abs(held.double().mean() - rate) < 5 * deviation
    unindexed = splitter(some_samples(20_000)) < 0.5
    assert abs(unindexed.double().mean() - rate) < 5 * deviation
    other = RandomSplitter(rate, seed + 1)(some_samples(20_000, indices=rows)) < 0.5
    both = rate * rate
    assert abs((held & other).double().mean() - both) < 5 * math.sqrt(both * (1 - both) / 20_000)


@pytest.mark.parametrize("fraction", [0.0, 1.0, math.nan])
def test_random_splitter_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got"):
        RandomSplitter(fraction)


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


def learned(**options):
    torch.manual_seed(0)
    splitter = LearnedSplitter(("loss", "margin"), **options)
    nn.init.normal_(splitter.network[-1].weight)
    return splitter


def test_splitter_loss_is_the_sum_of_the_three():
    splitter = learned()
    validation, batch = some_samples(6, seed=1), some_samples(10, seed=2)
    loss, p = splitter_loss(splitter, validation, batch, 0.2)
    p_batch = splitter(batch)
    gap, ratio = gap_loss(splitter(validation), validation.correct), ratio_penalty(p_batch, 0.2)
    label = label_penalty(p_batch, batch.targets, 3)
    torch.testing.assert_close(loss, gap + ratio + label)
    assert torch.equal(p, splitter(validation).detach())
    for scaled in (
        splitter_loss(splitter, validation, batch, 0.2, as_in_ls=True),
        splitter_loss(learned(as_in_ls=True), validation, batch, 0.2),
    ):
        torch.testing.assert_close(scaled[0], gap + ratio / 2 + label / 3)
    regression = some_samples(10, num_classes=None, seed=3)
    blind = LearnedSplitter()
    loss, _ = splitter_loss(blind, regression, regression, 0.2)
    p = blind(regression)
    torch.testing.assert_close(loss, gap_loss(p, regression.correct) + ratio_penalty(p, 0.2))


def test_the_scale_of_learning_to_split_is_that_of_its_code():
    """``F.kl_div(log q, p, reduction="batchmean")`` of vectors divides by their length."""
    p = double([0.2, 0.9, 0.7, 0.4, 0.8, 0.6])
    found = torch.stack([(1 - p).mean(), p.mean()])
    theirs = nn.functional.kl_div(found.log(), double([0.2, 0.8]), reduction="batchmean")
    torch.testing.assert_close(theirs, ratio_penalty(p, 0.2) / 2)


def test_ignored_targets_take_no_part_in_the_label_penalty():
    splitter, batch = learned(), some_samples(10)
    classes = batch.classes.clone()
    classes[:4] = -1
    loss, _ = splitter_loss(splitter, batch, some_samples(10, classes=classes), 0.2)
    p = splitter(batch)
    expected = gap_loss(p, batch.correct) + ratio_penalty(p, 0.2) + label_penalty(p[4:], classes[4:], 3)
    torch.testing.assert_close(loss, expected)


def test_learned_splitter():
    batch = some_samples(7)
    torch.testing.assert_close(LearnedSplitter()(batch), torch.full((7,), 0.9))
    network = nn.Linear(3, 3)
    scores = network(batch.inputs)
    expected = torch.sigmoid(scores[torch.arange(7), batch.targets])
    torch.testing.assert_close(LearnedSplitter(network=network)(batch), expected)
    blind = nn.Linear(3, 1)
    torch.testing.assert_close(LearnedSplitter(network=blind)(batch), torch.sigmoid(blind(batch.inputs)[:, 0]))
    with pytest.raises(ValueError, match=r"network must return \(7,\)"):
        LearnedSplitter(network=nn.Sequential(nn.Flatten(0), nn.Linear(21, 5)))(batch)
    with pytest.raises(ValueError, match="several outputs needs class targets"):
        LearnedSplitter(network=network)(some_samples(7, classes=None))
    assert LearnedSplitter.balances_labels
    assert not MarginSplitter.balances_labels and not RandomSplitter.balances_labels


def test_the_learned_splitter_learns_where_the_classifier_fails():
    torch.manual_seed(0)
    splitter = LearnedSplitter(("loss",))
    optimizer = torch.optim.Adam(splitter.parameters(), lr=0.02)
    batch = some_samples(60)
    for _ in range(200):
        optimizer.zero_grad()
        splitter_loss(splitter, batch, batch, 0.3)[0].backward()
        optimizer.step()
    p = splitter(batch)
    assert p[batch.correct].mean() > p[~batch.correct].mean() + 0.2

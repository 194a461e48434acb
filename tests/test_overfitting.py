"""When validation instances are left out of training: the test for overfitting, and what the reweighter does by it."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import in_processes
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter, RandomSplitter, Samples
from torch_molere.overfitting import LEAST, OverfittingTest

CPU = torch.device("cpu")


def shown(passes, seed=0):
    """The test after passes (P, K) of losses, each in an order of its own; and in which pass it was found."""
    random = np.random.default_rng(seed)
    test, found = OverfittingTest(), None
    for number, losses in enumerate(passes):
        for row in random.permutation(len(losses)):
            test.observe(number, [int(row)], [float(losses[row])])
            if test.decide(CPU):
                assert found is None
                found = number
    return test, found


def expected(passes):
    """The first pass whose rise above the lowest so far has a paired t statistic of more than two."""
    lowest = passes[0]
    for number, losses in enumerate(passes[1:], start=1):
        if losses.mean() < lowest.mean():
            lowest = losses
        elif scipy.stats.ttest_rel(losses, lowest).statistic > 2.0:
            return number
    return None


@given(st.integers(0, 10**6), st.integers(LEAST, 60), st.floats(-0.3, 0.3))
def test_found_where_a_paired_t_test_finds_it(seed, rows, drift):
    random = np.random.default_rng(seed)
    passes = random.exponential(size=rows) + random.normal(drift, 1.0, size=(8, rows)).cumsum(axis=0)
    _, found = shown(passes, seed)
    wanted = expected(passes[:-1])  # a pass is over when the next one shows a row again
    assert found == (None if wanted is None else wanted + 1)


def test_both_outcomes_come_about():
    random = np.random.default_rng(0)
    level = random.exponential(size=40)
    falling = [level - 0.1 * number + random.normal(0, 0.05, 40) for number in range(6)]
    rising = [level + 0.1 * max(number - 2, 0) + random.normal(0, 0.05, 40) for number in range(6)]
    assert shown(falling)[1] is None
    assert shown(rising)[1] == 4
    assert shown([passed[: LEAST - 1] for passed in rising])[1] is None
    test, _ = shown(rising)
    test.observe(9, range(40), falling[-1].tolist())
    assert not test.decide(CPU) and test.found  # for good


def observed_in_parts(rank):
    random = np.random.default_rng(3)
    passes = random.exponential(size=30) + 0.2 * np.arange(5)[:, None] + random.normal(0, 0.1, size=(5, 30))
    test, told = OverfittingTest(), []
    for number, losses in enumerate(passes):
        rows = random.permutation(30)
        own = rows if rank is None else rows.reshape(2, 15)[rank]
        test.observe(number, own.tolist(), losses[own].tolist())
        told.append(test.decide(CPU))
    return test.state_dict(), told


def test_two_processes_decide_as_one():
    whole = observed_in_parts(None)
    assert any(whole[1])
    for part in in_processes(2, observed_in_parts):
        assert_same(part, whole)


@pytest.fixture(autouse=True)
def few_threads(one_thread):
    """These networks are too small to be shared."""


def trained(targets, epochs, lr=0.3, **options):
    """A network that can memorise, and the results of its steps, epoch by epoch."""
    torch.manual_seed(0)
    inputs = torch.randn(len(targets), 8)
    if targets.dtype != torch.long:
        targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    reweighter = MetaReweighter(model, optimizer, warmup_steps=20, val_fraction=0.4, **options)
    seen = []
    for epoch in range(epochs):
        for rows in torch.randperm(len(targets), generator=torch.Generator().manual_seed(epoch)).split(50):
            seen.append((rows, reweighter.step((inputs[rows], targets[rows], rows)), reweighter.holding_out))
    return reweighter, seen


def probed(rows, reweighter, seed=0):
    samples = Samples(((rows,), {}), rows, rows, rows.float(), rows > 0, rows)
    return RandomSplitter(0.2 * 0.4, seed)(samples) < 0.5


def test_what_is_left_out_of_training_before_and_after_it_overfits():
    random_labels = torch.randint(2, (500,), generator=torch.Generator().manual_seed(1))
    reweighter, seen = trained(random_labels, epochs=60)
    assert reweighter.holding_out
    apart = []
    for rows, result, held_out_next in seen:
        probe = probed(rows, reweighter)
        assert result.val_mask[probe].all() and not result.weights[probe].any()
        if not held_out_next:
            assert (result.weights[~probe] > 0).all()
        elif apart:
            assert torch.equal(result.weights == 0, result.val_mask)
        if held_out_next:
            apart.append(result.val_mask.float().mean())
    assert len(apart) > 50 and 0.19 < torch.stack(apart).mean() < 0.6


def test_nothing_but_the_probe_is_left_out_where_it_does_not_overfit():
    reweighter, seen = trained(torch.zeros(500), epochs=10, lr=0.02)
    assert not reweighter.holding_out
    left_out = torch.cat([rows[result.weights == 0] for rows, result, _ in seen]).unique()
    assert 10 < len(left_out) < 80  # 8 % of 500
    assert probed(left_out, reweighter).all()
    assert torch.cat([result.val_mask for *_, result, _ in seen]).float().mean() > 0.2


def test_always_and_never():
    random_labels = torch.randint(2, (500,), generator=torch.Generator().manual_seed(1))
    for rows, result, _ in trained(random_labels, epochs=4, hold_out=True)[1]:
        assert torch.equal(result.weights == 0, result.val_mask) and len(rows) == len(result.weights)
    reweighter, seen = trained(random_labels, epochs=30, hold_out=False)
    assert not reweighter.holding_out
    assert all((result.weights > 0).all() for _, result, _ in seen)


def test_without_indices_nothing_is_left_out():
    model = nn.Linear(3, 2)
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=2, every=1)
    for _ in range(20):
        result = reweighter.step((torch.randn(10, 3), torch.randint(2, (10,))))
        assert (result.weights > 0).all()
    assert len(reweighter.buffer) >= 2


def test_a_batch_of_probed_rows_keeps_one_to_train_on():
    model = nn.Linear(3, 2)
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), val_fraction=0.4)
    rows = torch.arange(400)
    rows = rows[probed(rows, reweighter)][:4]
    assert len(rows) == 4
    result = reweighter.step((torch.randn(4, 3), torch.randint(2, (4,)), rows))
    assert result.weights.tolist() == [0, 0, 0, 1]
    assert reweighter.step((torch.randn(1, 3), torch.randint(2, (1,)), rows[:1])).weights.tolist() == [1]

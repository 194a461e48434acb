"""The validation buffer: who is sent to it, what leaves it, what its splitter learns, under any stream."""

import copy
import io
import math
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from same import assert_same
from some_samples import some_samples
from torch import nn

from torch_molere.splitting import LearnedSplitter, MarginSplitter, RandomSplitter, splitter_loss
from torch_molere.validation import Sending, ValidationBuffer, buffer, store
from torch_molere.validation.buffer import LABEL_TOLERANCE, Learned, Quota

pytestmark = pytest.mark.usefixtures("one_thread")


class Given(nn.Module):
    """A splitter that says what it is told to."""

    balances_labels = False

    def __init__(self, p=()):
        super().__init__()
        self.p, self.observed = p, []

    def forward(self, samples):
        return torch.as_tensor(self.p, dtype=torch.float)

    def observe(self, samples):
        self.observed.append(samples)


def attached(seed=0, **options):
    found = ValidationBuffer(**options)
    found.attach(nn.Identity(), torch.device("cpu"), seed)
    return found


def stream_batch(size, number, classes=3, rows=None):
    """Samples whose inputs are (row, number of the batch)."""
    rows = list(range(size)) if rows is None else rows
    x = torch.stack([torch.tensor(rows, dtype=torch.float), torch.full((size,), float(number))], dim=1)
    indices = torch.tensor(rows)
    samples = some_samples(size, classes, seed=number)
    return some_samples(size, classes, seed=number, arguments=((x,), {}), indices=indices, targets=samples.targets)


def sending_of(samples, sent, held_out=False, others=((), ())):
    rows = None if samples.indices is None else samples.indices.tolist()
    own = set() if rows is None else {rows[i] for i in sent}
    trained = [] if rows is None else [row for i, row in enumerate(rows) if i not in sent]
    return Sending(
        samples.arguments,
        samples.targets,
        sent,
        None if samples.classes is None else samples.classes.tolist(),
        rows,
        frozenset(own) | frozenset(others[0]),
        frozenset(trained) | frozenset(others[1]),
        samples,
    )


def step(buffer, samples, warming_up=False, decided=None, seed=0):
    """What a training step without meta-update does with the buffer; returns the positions sent."""
    torch.manual_seed(seed)
    p = buffer.probabilities(samples, warming_up).tolist()
    rows = None if samples.indices is None else samples.indices.tolist()
    classes = None if samples.classes is None else samples.classes.tolist()
    sent = buffer.choose(samples, p, rows, classes, decided or {})
    buffer.commit([sending_of(samples, sent)], None, None)
    return sent


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"splitter": len}, TypeError, "splitter must be an nn.Module"),
        ({"fraction": 0.0}, ValueError, r"fraction must lie in \(0, 1\), got 0.0"),
        ({"fraction": math.nan}, ValueError, "fraction must lie in"),
        ({"padding": True}, TypeError, "padding must be a number, or numbers by the name of an input, got True"),
        ({"padding": {"targets": "-100"}}, TypeError, "padding must be a number"),
        ({"hold_out": "auto"}, ValueError, "hold_out must be True or False, got 'auto'"),
        ({"capacity": 1}, ValueError, "capacity must be an integer ≥ 2, got 1"),
        ({"max_bytes": 1.5}, ValueError, "max_bytes must be an integer"),
        ({"batch_size": 1}, ValueError, "batch_size must be an integer ≥ 2"),
        ({"lr": -1.0}, ValueError, "lr must be a finite number ≥ 0"),
        ({"optimizer": 3}, TypeError, "optimizer must make one from a list of parameters"),
    ],
)
def test_arguments_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        ValidationBuffer(**options)


def test_one_reweighter_only():
    found = attached()
    with pytest.raises(ValueError, match="this ValidationBuffer is used by a reweighter already"):
        found.attach(nn.Identity(), torch.device("cpu"), 0)
    splitter = LearnedSplitter()
    with pytest.raises(ValueError, match="splitter must not share parameters with the model"):
        ValidationBuffer(splitter=splitter).attach(splitter.network, torch.device("cpu"), 0)
    with pytest.raises(RuntimeError, match="not used by a reweighter yet"):
        ValidationBuffer().draw(8, 0)


def test_the_ranks_share_capacity_and_bytes(monkeypatch):
    monkeypatch.setattr(buffer, "ranks", lambda: 4)
    found = attached(capacity=10, max_bytes=1001)
    assert (found.store.capacity, found.store.max_bytes) == (3, 251)


def test_the_splitter_is_told_the_fraction():
    assert attached(fraction=0.3).splitter.fraction == 0.3
    assert not hasattr(attached(splitter=Given()).splitter, "fraction")


# Choosing


def test_the_smallest_p_below_one_half_go():
    p = [0.9, 0.4, 0.6, 0.1, 0.3, 0.45, 0.2, 0.7] + [1.0] * 12
    found = attached(splitter=Given(p), fraction=0.1)  # at most 1.5 · 0.1 · 20 + 1
    samples = some_samples(20)
    assert found.choose(samples, p, None, None, {}) == [1, 3, 4, 6]
    high = [0.9 - 0.01 * i for i in range(20)]  # nobody wants to go: the least, the smallest p
    assert found.choose(samples, high, None, None, {}) == [18, 19]


def test_choosing_and_drawing_change_nothing():
    found = attached(splitter=LearnedSplitter(), fraction=0.3)
    for number in range(4):
        step(found, stream_batch(16, number))
    before = copy.deepcopy(found.state_dict())
    samples = stream_batch(16, 9)
    first = found.probabilities(samples, False)
    sent = found.choose(samples, first.tolist(), list(range(16)), samples.classes.tolist(), {})
    drawn = found.draw(16, 5)
    learned = found.differentiate(some_samples(len(drawn.slots)), samples, drawn)
    assert learned.gradients is not None
    assert_same(found.state_dict(), before)
    assert all(parameter.grad is None for parameter in found.splitter.parameters())
    assert found.choose(samples, first.tolist(), list(range(16)), samples.classes.tolist(), {}) == sent
    assert_same(found.draw(16, 5).arguments, drawn.arguments)


def test_rows_keep_the_side_that_another_loss_of_the_step_gave_them():
    p = [0.1] * 4 + [0.9] * 16
    found = attached(splitter=Given(p), fraction=0.1)
    rows = list(range(100, 120))
    decided = {100: False, 101: False, 119: True, 999: True}
    assert found.choose(some_samples(20), p, rows, None, decided) == [2, 3, 19]
    assert found.choose(some_samples(20), p, None, None, decided) == [0, 1, 2, 3]
    everyone = dict.fromkeys(rows, True)
    assert found.choose(some_samples(20), p, rows, None, everyone) == list(range(20))


@pytest.mark.parametrize("p", [[0.5, math.nan], [math.nan, 0.5], [0.5, 1.5], [-0.1, 0.5], [math.inf, 0.0]])
def test_what_are_no_probabilities_is_refused(p):
    found = attached(splitter=Given(p))
    with pytest.raises(ValueError, match=r"splitter must return probabilities in \[0, 1\]"):
        found.choose(some_samples(2), p, None, None, {})
    with pytest.raises(ValueError, match=r"splitter must return \(3,\) probabilities, got \(2,\)"):
        found.probabilities(some_samples(3), False)


def test_constants_on_a_device_are_compared_without_waiting_for_it(monkeypatch):
    monkeypatch.setattr(store, "_is_read_at_once", lambda tensor: False)
    found = attached(splitter=Given([0.1, 0.9]))

    def samples(lam):
        return some_samples(2, arguments=((torch.randn(2, 3), torch.tensor(lam)), {}))

    step(found, samples(0.3))
    step(found, samples(0.3))
    p = found.probabilities(samples(0.4), False)
    assert bool(p.isnan().all())
    with pytest.raises(ValueError, match=r"a tensor of the batch has no value for each instance"):
        found.choose(samples(0.4), p.tolist(), None, None, {})


def test_a_split_by_row_lasts_during_warm_up():
    found = attached(fraction=0.3, seed=4)
    wanted = RandomSplitter(0.3, 4)
    samples = stream_batch(40, 0)
    assert torch.equal(found.probabilities(samples, True), wanted(samples))
    assert not torch.equal(found.probabilities(samples, False), wanted(samples).float())


@given(
    fraction=st.floats(0.01, 0.6),
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=60),
    eager=st.booleans(),
)
def test_the_fraction_stays_in_its_band(fraction, sizes, eager):
    found = attached(fraction=fraction)
    shown = sent = 0
    for size in sizes:
        p = [0.0 if eager else 1.0] * size
        low, high = found._quota.bounds(size)
        chosen = found.choose(some_samples(size), p, None, None, {})
        assert 0 <= low <= high
        assert len(chosen) == (high if eager else low) < size
        found._quota.spend(size, len(chosen))
        shown, sent = shown + size, sent + len(chosen)
        assert sent <= 1.5 * fraction * shown + 1 + 1e-6
    if min(sizes) > 1 and fraction <= 0.5:
        assert sent >= 0.5 * fraction * shown - max(sizes)
    if sizes[0] > 1:
        assert sent >= 1


@given(
    fraction=st.floats(0.05, 0.5),
    size=st.integers(2, 16),
    losses=st.integers(2, 8),
)
def test_the_band_over_steps_of_several_losses(fraction, size, losses):
    """Every loss of a step is chosen by the same counts; what is too much is saved in later steps."""
    quota = Quota(fraction)
    shown = sent = 0
    for _ in range(40):
        high = quota.bounds(size)[1]
        for _ in range(losses):
            quota.spend(size, high)
            shown, sent = shown + size, sent + high
        assert sent <= 1.5 * fraction * shown + 1 + losses * (1 + 1.5 * fraction * size)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 999), shares=st.lists(st.floats(0.05, 1), min_size=2, max_size=6), capacity=st.integers(40, 80)
)
def test_labels_follow_the_stream_where_the_splitter_balances_them(seed, shares, capacity):
    generator = torch.Generator().manual_seed(seed)
    preferred = torch.rand(len(shares), generator=generator)
    found = attached(seed, splitter=LearnedSplitter(), fraction=0.2, capacity=capacity)
    seen, highest = Counter(), {}
    for number in range(60):
        labels = torch.multinomial(torch.tensor(shares), 32, replacement=True, generator=generator)
        seen.update(labels.tolist())
        for label in seen:
            highest[label] = max(highest.get(label, 0.0), seen[label] / seen.total())
        samples = some_samples(32, len(shares), seed=number, targets=labels, classes=labels)
        p = (preferred[labels] * torch.rand(32, generator=generator)).tolist()
        sent = found.choose(samples, p, None, labels.tolist(), {})
        found.commit([sending_of(samples, sent)], None, None)
    counts = found.store.class_counts()
    assert len(found) == capacity
    for label, most in highest.items():  # P(y) is what the stream has shown so far
        assert counts.get(label, 0) <= (1 + LABEL_TOLERANCE) * most * capacity + 2


def test_rows_already_held_go_first_where_labels_are_balanced():
    p = [0.1, 0.2, 0.3, 0.4] + [0.9] * 16
    rows = list(range(20))
    for splitter, wanted in ((LearnedSplitter(), [2, 3]), (Given(p), [0, 1])):
        found = attached(splitter=splitter, fraction=0.05)
        samples = some_samples(20, 2, classes=torch.zeros(20, dtype=torch.long))
        found.commit([sending_of(stream_batch(20, 0, rows=list(range(20))), [2, 3, 19])], None, None)
        found._quota = Quota(0.05)
        assert found.choose(samples, p, rows, [0] * 20, {}) == wanted


# Committing


def test_a_row_met_again_and_not_sent_leaves():
    found = attached(splitter=Given())
    found.commit([sending_of(stream_batch(8, 0), [0, 1, 2, 3])], None, None)
    found.commit([sending_of(stream_batch(3, 1, rows=[1, 2, 9]), [1])], None, None)
    assert sorted(found.store.rows) == [0, 2, 3]  # 1 was trained on
    ((x,), _), _ = found.store.draw(range(3))
    assert x.tolist() == [[float(row), 1.0 if row == 2 else 0.0] for row in found.store.state_dict()["rows"]]
    found.commit([sending_of(stream_batch(3, 2, rows=[0, 2, 3]), [])], None, None)
    assert len(found) == 2  # the fewest that make a batch stay


def test_rows_that_other_ranks_train_on_or_take_leave():
    found = attached(splitter=Given())
    found.commit([sending_of(stream_batch(8, 0), range(6))], None, None)
    others = ([1, 6], [3, 50])
    found.commit([sending_of(stream_batch(2, 1, rows=[6, 90]), [0], others=others)], None, None)
    assert sorted(found.store.rows) == [0, 2, 4, 5, 6]


def test_a_row_that_is_sent_at_one_position_and_trained_on_at_another_is_held():
    found = attached(splitter=Given())
    found.commit([sending_of(stream_batch(4, 0, rows=[5, 6, 5, 7]), [0, 3])], None, None)
    assert sorted(found.store.rows) == [5, 7]


def test_several_losses_of_one_step():
    found = attached(splitter=(splitter := Given()))
    first, second = stream_batch(4, 0), stream_batch(4, 1, rows=[2, 3, 8, 9])
    found.commit([sending_of(first, [0, 2]), sending_of(second, [0, 3])], None, None)
    assert sorted(found.store.rows) == [0, 2, 9]
    assert splitter.observed == [first, second]
    assert found.state_dict()["commits"] == 1


def test_without_rows_instances_stay_until_they_are_replaced():
    found = attached(splitter=Given(), capacity=6)
    for number in range(5):
        found.commit([sending_of(some_samples(8, seed=number), [0, 1])], None, None)
        assert len(found) == min(2 * number + 2, 6)
    numbers = found.metrics()
    assert (numbers["instances"], numbers["fill"]) == (6.0, 1.0)


def test_age_is_the_mean_number_of_steps_since_instances_were_sent():
    found = attached(splitter=Given(), capacity=6)
    assert found.metrics()["age"] == 0.0
    for rows in ([0, 9], [1, 9], [0, 2, 9]):  # row 0 is refreshed by the last of them; 9 is never sent
        found.commit([sending_of(stream_batch(len(rows), 0, rows=rows), range(len(rows) - 1))], None, None)
    assert found.metrics()["age"] == pytest.approx((1 + 2 + 1) / 3)
    assert found.store.loaded(found.store.state_dict()).mean_age(3) == found.store.mean_age(3)
    found.commit([sending_of(stream_batch(2, 0, rows=[8, 9]), [])], None, None)
    assert found.metrics()["age"] == pytest.approx((2 + 3 + 2) / 3)


@pytest.mark.parametrize("capacity", [2, 3, 7])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("classes", [3, None])
def test_batches_larger_than_the_buffer(capacity, indexed, classes):
    found = attached(capacity=capacity, fraction=0.5)
    for number in range(8):
        rows = list(range(number, number + 40))
        step(found, stream_batch(40, number, classes, rows) if indexed else some_samples(40, classes, seed=number))
        assert 2 <= len(found) <= capacity


def test_batches_of_one_between_others():
    found = attached(fraction=0.3)
    for number, size in enumerate([1, 4, 1, 1, 6, 1, 2, 1]):
        assert len(step(found, stream_batch(size, number, rows=list(range(10 * number, 10 * number + size))))) < size
    assert len(found) >= 2


# Drawing and learning


def test_drawing():
    found = attached(splitter=Given())
    assert found.draw(16, 0) is None
    found.commit([sending_of(stream_batch(2, 0), [0])], None, None)
    assert found.draw(16, 0) is None
    found.commit([sending_of(stream_batch(30, 1), range(1, 30))], None, None)
    drawn = found.draw(16, 3)
    ((x,), named), rows = drawn.arguments, found.store.state_dict()["rows"]
    assert (len(x), len(set(drawn.slots)), named) == (8, 8, {})
    assert x[:, 0].tolist() == [rows[slot] for slot in drawn.slots]
    assert found.draw(16, 3).slots == drawn.slots != found.draw(16, 4).slots
    assert len(found.draw(3, 0).slots) == 2
    assert len(found.draw(1000, 0).slots) == 29
    found.batch_size = 5
    assert len(found.draw(16, 0).slots) == 5
    counts = Counter(slot for seed in range(600) for slot in found.draw(16, seed).slots)
    assert all(abs(counts[slot] - 100) < 46 for slot in range(29))  # 103, with a standard deviation of 9.3


@pytest.mark.parametrize("factory", [None, lambda parameters: torch.optim.SGD(parameters, lr=0.1)])
def test_the_splitter_learns_as_by_a_plain_step(factory):
    found = attached(
        splitter=LearnedSplitter(("loss", "label"), num_classes=3), fraction=0.2, lr=0.01, optimizer=factory
    )
    twin = copy.deepcopy(found.splitter)
    optimizer = factory(twin.parameters()) if factory else torch.optim.Adam(twin.parameters(), lr=0.01)
    step(found, stream_batch(32, 0))
    for number in range(3):
        drawn = found.draw(16, number)
        validation, batch = some_samples(len(drawn.slots), seed=number), some_samples(32, seed=number + 1)
        learned = found.differentiate(validation, batch, drawn)
        found.commit([sending_of(batch, [])], drawn, learned)
        optimizer.zero_grad()
        splitter_loss(twin, validation, batch, 0.2)[0].backward()
        optimizer.step()
        assert_same(found.splitter.state_dict(), twin.state_dict())
    assert all(parameter.grad is None for parameter in found.splitter.parameters())


def test_without_a_learning_splitter_nothing_is_learned_and_nothing_is_easy():
    found = attached(splitter=MarginSplitter())
    step(found, stream_batch(64, 0))
    assert found.differentiate(some_samples(4), some_samples(8), found.draw(8, 0)) is None
    assert found.state_dict()["optimizer"] is None


def test_a_gradient_that_is_not_finite_moves_nothing():
    class Spoiled(LearnedSplitter):
        def forward(self, samples):
            p = super().forward(samples)
            if p.requires_grad:
                p.register_hook(lambda gradient: gradient * torch.nan)
            return p

    found = attached(splitter=Spoiled(), fraction=0.4)
    step(found, stream_batch(32, 0))
    before = copy.deepcopy((found.splitter.state_dict(), found._optimizer.state_dict()))
    drawn = found.draw(16, 0)
    learned = found.differentiate(some_samples(len(drawn.slots)), some_samples(32), drawn)
    assert learned.gradients is None
    found.commit([], drawn, learned)
    assert_same((found.splitter.state_dict(), found._optimizer.state_dict()), before)


def test_what_has_become_easy_leaves_but_never_the_last_batch():
    found = attached(splitter=LearnedSplitter(), fraction=0.5)  # starts from p = 0.9 for everyone
    step(found, stream_batch(40, 0))
    held = len(found)
    drawn = found.draw(12, 0)
    correct = torch.tensor([True, False] * 3)
    learned = found.differentiate(some_samples(6, correct=correct), some_samples(8), drawn)
    assert learned.easy == drawn.slots[::2]
    rows = [found.store.state_dict()["rows"][slot] for slot in learned.easy]
    found.commit([], drawn, learned)
    assert len(found) == held - 3
    assert not found.store.held_among(frozenset(rows))
    drawn = found.draw(2 * len(found), 1)
    found.commit([], drawn, Learned(None, drawn.slots, torch.tensor(0.5)))
    assert len(found) == held - 3


# Saving


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def meta_step(found, number, size=24):
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(number))[:size].tolist()
    samples = stream_batch(size, number, rows=rows)
    torch.manual_seed(number)
    p = found.probabilities(samples, number < 3)
    sent = found.choose(samples, p.tolist(), rows, samples.classes.tolist(), {})
    drawn = found.draw(size, number)
    learned = None
    if drawn is not None:
        validation = some_samples(len(drawn.slots), seed=number, arguments=drawn.arguments, targets=drawn.targets)
        learned = found.differentiate(validation, samples, drawn)
    found.commit([sending_of(samples, sent)], drawn, learned)
    return sent, drawn


@pytest.mark.parametrize("splitter", [LearnedSplitter, MarginSplitter, RandomSplitter])
def test_a_run_goes_on_bit_for_bit(splitter):
    options = {"fraction": 0.3, "capacity": 30}
    whole = attached(3, splitter=splitter(), **options)
    for number in range(9):
        meta_step(whole, number)
    resumed = attached(99, splitter=splitter(), **options)
    resumed.load_state_dict(saved_and_read(whole.state_dict()))
    for number in range(9, 20):
        (a, x), (b, y) = meta_step(whole, number), meta_step(resumed, number)
        assert a == b
        assert_same((x.arguments, x.targets, x.slots), (y.arguments, y.targets, y.slots))
    assert_same(resumed.state_dict(), whole.state_dict())


def changed(state, path, change):
    found = copy.deepcopy(state)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]])
    return found


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("quota",), lambda q: [-1.0, q[1]]),
        (("quota",), lambda q: [q[0], math.nan]),
        (("commits",), lambda n: -1),
        (("seed",), lambda n: 0.5),
        (("seen", 0), lambda n: -3),
        (("store", "rows"), lambda rows: rows[1:]),
        (("optimizer",), lambda s: None),
        (("optimizer", "param_groups", 0, "lr"), lambda lr: -lr),
        (("optimizer", "param_groups", 0, "lr"), lambda lr: math.nan),
        (("optimizer", "state", 0, "exp_avg"), lambda m: m * math.inf),
        (("optimizer", "state", 0, "exp_avg"), lambda m: m.repeat(2, 1)),
        (("splitter", "network.1.weight"), lambda w: w.fill_(math.nan)),
        (("splitter", "network.1.weight"), lambda w: w[:1]),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(path, change):
    found = attached(splitter=LearnedSplitter(), fraction=0.3)
    for number in range(6):
        meta_step(found, number)
    before = copy.deepcopy(found.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        found.load_state_dict(changed(before, path, change))
    assert_same(found.state_dict(), before)
    meta_step(found, 7)
    found.load_state_dict(before)
    assert_same(found.state_dict(), before)

"""The validation buffer and its quota under any stream."""

from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from same import assert_same

from torch_molere.buffer import LABEL_TOLERANCE, Quota, ValidationBuffer


def instances(ids):
    """Instances that carry their number, so that what comes back can be recognised."""
    ids = torch.tensor(ids)
    return {"x": ids[:, None].repeat(1, 3).double(), "y": ids}


class Stream(RuleBasedStateMachine):
    """A model of what must hold: which rows are held, each with the instance that came last."""

    def __init__(self):
        super().__init__()
        self.buffer = ValidationBuffer(capacity=6, max_bytes=10**6, seed=1)
        self.latest = {}
        self.next_id = 0

    @rule(rows=st.lists(st.integers(0, 12), min_size=1, max_size=8), indexed=st.booleans())
    def insert(self, rows, indexed):
        ids = list(range(self.next_id, self.next_id + len(rows)))
        self.next_id += len(rows)
        classes = [row % 3 for row in rows]
        self.buffer.observe(classes)
        self.buffer.insert(instances(ids), list(range(len(rows))), classes, rows if indexed else None)
        if indexed:
            self.latest.update(zip(rows, ids, strict=True))

    @precondition(lambda self: len(self.buffer))
    @rule(data=st.data(), keep=st.integers(0, 3))
    def draw_and_release(self, data, keep):
        held = len(self.buffer)
        count = data.draw(st.integers(1, 8))
        batch, slots = self.buffer.draw(count)
        assert len(slots) == len(set(slots)) == len(batch["y"]) == min(count, held)
        assert torch.equal(batch["x"][:, 0], batch["y"].double())
        released = self.buffer.release(slots[::2], keep)
        assert len(self.buffer) == held - released
        assert released == min(len(slots[::2]), max(held - keep, 0))

    @rule(rows=st.lists(st.integers(0, 12), max_size=5))
    def release_rows(self, rows):
        there = {row for row in rows if row in self.buffer}
        held = len(self.buffer)
        self.buffer.release_rows(rows, keep=0)
        assert len(self.buffer) == held - len(there)
        assert not any(row in self.buffer for row in rows)

    @rule()
    def save_and_load(self):
        fresh = ValidationBuffer(capacity=6, max_bytes=10**6)
        fresh.load_state_dict(self.buffer.state_dict(), torch.device("cpu"))
        assert_same(fresh.state_dict(), self.buffer.state_dict())
        self.buffer = fresh

    @invariant()
    def holds(self):
        assert len(self.buffer) <= self.buffer.capacity
        if len(self.buffer):
            state = self.buffer.state_dict()
            for row, number in zip(state["rows"], state["held"]["y"].tolist(), strict=True):
                assert row is None or self.latest[row] == number
            counts = Counter(state["classes"])
            assert self.buffer.class_counts() == dict(counts)
            assert all(c == r % 3 for c, r in zip(state["classes"], state["rows"], strict=True) if r is not None)
        assert sorted(self.buffer.rows) == sorted({r for r in self.buffer.rows})


TestStream = Stream.TestCase
TestStream.settings = settings(max_examples=40, stateful_step_count=25)


def test_bytes_bound_the_capacity():
    buffer = ValidationBuffer(capacity=1000, max_bytes=320)  # an instance takes 3·8 + 8 bytes
    buffer.insert(instances(range(30)), list(range(30)), [0] * 30, None)
    assert len(buffer) == buffer.capacity == 10
    assert buffer.nbytes == 320
    with pytest.raises(ValueError, match="buffer_bytes=31 is less than one instance takes"):
        ValidationBuffer(10, max_bytes=31).insert(instances([1]), [0], [0], None)


def test_drawing_from_an_empty_buffer():
    with pytest.raises(RuntimeError, match="the validation buffer is empty"):
        ValidationBuffer(3, 100).draw(1)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 999), shares=st.lists(st.floats(0.05, 1), min_size=2, max_size=6), capacity=st.integers(40, 80)
)
def test_labels_follow_the_stream(seed, shares, capacity):
    """Candidates of the classes come in any mixture; what ``accepts`` lets in keeps P(y) within the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.tensor(shares)
    bias = torch.rand(len(shares), generator=generator)  # the splitter prefers some classes
    buffer = ValidationBuffer(capacity, 10**9, seed)
    highest = {}
    for _ in range(60):
        labels = torch.multinomial(p, 32, replacement=True, generator=generator).tolist()
        share = buffer.shares(labels)
        highest = {label: max(highest.get(label, 0.0), share[label]) for label in share} | {
            label: most for label, most in highest.items() if label not in share
        }
        chosen, added = [], Counter()
        for i in sorted(range(32), key=lambda i: -bias[labels[i]].item()):
            label = labels[i]
            if len(chosen) < 6 and buffer.accepts(label, share[label], len(chosen), added[label]):
                chosen.append(i)
                added[label] += 1
        buffer.observe(labels)
        buffer.insert(instances(range(32)), chosen, [labels[i] for i in chosen], None)
    p = p / p.sum()
    counts = buffer.class_counts()
    for label, wanted in enumerate(p.tolist()):
        # P(y) is what the stream has shown so far: of a rare class, early on, its share may have been larger.
        most = max(highest.get(label, 0.0), wanted)
        assert counts.get(label, 0) <= (1 + LABEL_TOLERANCE) * most * capacity + 2


@given(
    delta=st.floats(0.01, 0.6),
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=60),
    eager=st.booleans(),
)
def test_the_quota_keeps_the_fraction_in_its_band(delta, sizes, eager):
    quota = Quota(delta)
    shown = sent = 0
    for size in sizes:
        low, high = quota.bounds(size)
        assert 0 <= low <= high <= size - 1 or high == 0
        count = high if eager else low
        quota.spend(size, count)
        shown, sent = shown + size, sent + count
        assert sent <= 1.5 * delta * shown + 1 + 1e-6
    if min(sizes) > 1 and delta <= 0.5:
        assert sent >= 0.5 * delta * shown - max(sizes)
    if sizes[0] > 1:
        assert sent >= 1

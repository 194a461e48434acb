"""The storage of the validation buffer: what goes in comes out, together with what belongs to it."""

import dataclasses
import io
from collections import Counter, UserDict, namedtuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from same import assert_same

from torch_molere.calls import leaves_of
from torch_molere.validation.store import InstanceStore, first_half, size_of


def numbered(ids):
    """A batch whose instances carry their number twice, so that what comes back can be recognised."""
    ids = torch.as_tensor(list(ids))
    return ((ids[:, None].repeat(1, 3).double(),), {}), ids


def put(store, ids, rows=None, classes=None, seed=0, **options):
    ids = list(ids)
    store.insert(*numbered(ids), len(ids), range(len(ids)), rows, classes, seed, **options)


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Stream(RuleBasedStateMachine):
    """A model of what must hold: which rows are held, each with the instance that came last."""

    def __init__(self):
        super().__init__()
        self.store = InstanceStore(capacity=6, max_bytes=10**6)
        self.latest = {}
        self.next_id = 0

    @rule(rows=st.lists(st.integers(0, 12), min_size=1, max_size=8), indexed=st.booleans())
    def insert(self, rows, indexed):
        ids = list(range(self.next_id, self.next_id + len(rows)))
        self.next_id += len(rows)
        put(self.store, ids, rows if indexed else None, [row % 3 for row in rows], seed=self.next_id)
        if indexed:
            self.latest.update(zip(rows, ids, strict=True))

    @precondition(lambda self: self.store.drawable)
    @rule(data=st.data(), keep=st.integers(0, 3))
    def draw_and_release(self, data, keep):
        held = len(self.store)
        places = data.draw(st.lists(st.integers(0, held - 1), min_size=1, unique=True))
        ((x,), named), y = self.store.draw(places)
        assert (len(y), named) == (len(places), {})
        assert torch.equal(x, y[:, None].repeat(1, 3).double())
        self.store.release(places[::2], keep)
        assert len(self.store) == max(held - len(places[::2]), min(keep, held))

    @rule(rows=st.frozensets(st.integers(0, 12), max_size=5))
    def release_rows(self, rows):
        there = {row for row in rows if row in self.store}
        assert self.store.held_among(rows) == there
        held = len(self.store)
        self.store.release_rows(rows, keep=0)
        assert len(self.store) == held - len(there)
        assert not self.store.held_among(rows)

    @rule()
    def save_and_load(self):
        fresh = InstanceStore(capacity=6, max_bytes=10**6).loaded(saved_and_read(self.store.state_dict()))
        assert_same(fresh.state_dict(), self.store.state_dict())
        assert fresh.drawable == 0
        if len(fresh):
            fresh.check(*numbered(range(4)), 4)
            places = range(len(fresh))
            assert_same(fresh.draw(places), self.store.draw(places))
        self.store = fresh

    @invariant()
    def holds(self):
        assert len(self.store) <= self.store.capacity
        state = self.store.state_dict()
        assert sorted(self.store.rows) == sorted({row for row in state["rows"] if row is not None})
        if len(self.store):
            for row, label, number in zip(state["rows"], state["classes"], state["columns"][1].tolist(), strict=True):
                assert row is None or (row % 3 == label and self.latest[row] == number)
        assert self.store.class_counts() == dict(Counter(state["classes"]))


TestStream = Stream.TestCase
TestStream.settings = settings(max_examples=30, stateful_step_count=25)


def test_every_row_is_held_with_its_latest_instance():
    store = InstanceStore(20, 10**6)
    for first in range(0, 60, 6):
        rows = [(first + i) % 17 for i in range(6)]
        put(store, range(first, first + 6), rows)
    assert len(store) == 17
    _, y = store.draw(range(17))
    assert [number % 60 % 17 for number in y.tolist()] == store.state_dict()["rows"]
    assert min(y.tolist()) >= 60 - 17


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    name: str = "g"


def kinds(ids):
    """One batch in each form that the inputs may come in; the numbers in it are those of its instances."""
    x = torch.tensor(ids, dtype=torch.double)
    return {
        "tensor": x[:, None],
        "half": x[:, None].bfloat16(),
        "graph": (x[:, None] * torch.ones(1, requires_grad=True)),
        "array": np.array(ids)[:, None].astype(np.float32),
        "strings": [f"text {i}" for i in ids],
        "tuple of strings": tuple(f"text {i}" for i in ids),
        "images": [torch.full((1, 2 + i % 3), float(i)) for i in ids],
        "dictionaries": [{"boxes": torch.full((i % 4, 4), float(i)), "id": torch.tensor(i)} for i in ids],
        "list of arrays": [np.full(1 + i % 2, i) for i in ids],
        "mapping": UserDict({"a": x, "b": [str(i) for i in ids], "padding": "right"}),
        "dataclass": Graph(x[:, None]),
        "named tuple": Pair(x, x[:, None]),
        "tuple": (x, x[:, None]),
        "list": [x, None],
    }


@pytest.mark.parametrize("form", kinds([0]))
@pytest.mark.parametrize("named", [False, True])
def test_inputs_of_every_form_stay_with_their_targets(form, named):
    """Of each form: other batches, sizes and releases in between; an instance comes out as it went in."""
    store = InstanceStore(12, 10**6)
    for step, size in enumerate([5, 7, 4, 6]):
        ids = [10 * step + i for i in range(size)]
        value = kinds(ids)[form]
        arguments = ((), {"value": value}) if named else ((value, None, "mode"), {"flag": True})
        store.check(arguments, torch.tensor(ids), size)
        store.insert(arguments, torch.tensor(ids), size, [0, 2, 3], ids, None, seed=step)
        if step == 2:
            store.release([1, 4], keep=2)
    for place in range(len(store)):
        arguments, targets = store.draw([place])
        number = int(targets)
        assert number in store
        value = arguments[1]["value"] if named else arguments[0][0]
        assert type(value) is type(kinds([number])[form])
        assert named or (arguments[0][1:] == (None, "mode") and arguments[1] == {"flag": True})
        for found, wanted in zip(leaves_of(value), leaves_of(kinds([number])[form]), strict=True):
            assert type(found) is type(wanted)
            if isinstance(wanted, (torch.Tensor, np.ndarray)):
                assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
                assert bool((found == wanted).all())
            else:
                assert found == wanted
    arguments, targets = store.draw(range(len(store)))
    assert len(targets) == len(store) == 10
    back = InstanceStore(12, 10**6).loaded(store.state_dict())
    back.check(
        ((), {"value": kinds([1, 2])[form]}) if named else ((kinds([1, 2])[form], None, "mode"), {"flag": True}),
        torch.tensor([1, 2]),
        2,
    )
    assert str(back.draw(range(10))) == str((arguments, targets))


def test_a_batch_encoding():
    transformers = pytest.importorskip("transformers")
    store = InstanceStore(8, 10**6)
    for step in range(2):
        ids = torch.arange(4) + 4 * step
        encoding = transformers.BatchEncoding({"input_ids": ids[:, None].repeat(1, 5), "attention_mask": ids[:, None]})
        store.insert(((encoding,), {}), ids, 4, [1, 3])
    ((drawn,), _), targets = store.draw(range(4))
    assert isinstance(drawn, transformers.BatchEncoding)
    assert targets.tolist() == [1, 3, 5, 7] == drawn["attention_mask"].flatten().tolist()


def test_instances_are_copied_in_and_out():
    store = InstanceStore(8, 10**6)
    x, items, mask = torch.zeros(3, 2), [{"a": torch.zeros(2)} for _ in range(3)], torch.ones(5, 5)
    store.insert(((x, items), {"mask": mask}), torch.arange(3), 3, [0, 1, 2])
    for _ in range(2):
        x.add_(1), items[0]["a"].add_(1), mask.add_(1)
        arguments, targets = store.draw([0, 1, 2])
        assert torch.equal(arguments[0][0], torch.zeros(3, 2))
        assert torch.equal(arguments[0][1][0]["a"], torch.zeros(2))
        assert torch.equal(arguments[1]["mask"], torch.ones(5, 5))
        arguments[0][0].add_(1), arguments[0][1][0]["a"].add_(1), arguments[1]["mask"].add_(1), targets.add_(1)


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), np.float64(0.3)])
def test_one_mixup_factor_for_the_batch_is_refused(lam):
    """Held instances would be given the factor of a later batch."""
    store = InstanceStore(8, 10**6)
    x, y = torch.randn(4, 2), torch.arange(4)
    store.insert(((x,), {"lam": lam}), (y, y), 4, [0])
    store.check(((x,), {"lam": lam * 1}), (y, y), 4)
    with pytest.raises(ValueError, match=r"inputs\['lam'\].*give it by instance .*, or pass validation="):
        store.check(((x,), {"lam": lam + 0.1}), (y, y), 4)
    store = InstanceStore(8, 10**6)
    store.insert(((x,), {}), (y, y, lam), 4, [0])
    with pytest.raises(ValueError, match=r"targets\[2\]"):
        store.check(((x,), {}), (y, y, lam + 0.1), 4)
    store = InstanceStore(8, 10**6)
    for step in range(2):
        store.insert(((x, torch.full((4,), 0.1 * step)), {}), (y, y), 4, [step])
    assert store.draw([0, 1])[0][0][1].tolist() == pytest.approx([0.0, 0.1])


def test_time_first_inputs_and_square_masks():
    store = InstanceStore(8, 10**6)
    x, mask = torch.randn(4, 3), torch.ones(6, 6)
    store.insert(((x, mask), {}), torch.arange(4), 4, [0, 1])
    store.insert(((torch.randn(6, 3), mask), {}), torch.arange(6), 6, [2])  # B = T: the first batch decided
    assert store.draw([0, 2])[0][0][1].shape == (6, 6)
    time_first = ((torch.randn(5, 4, 3), torch.randn(4)), {})
    store = InstanceStore(8, 10**6)
    store.insert(time_first, torch.arange(4), 4, [0])
    with pytest.raises(ValueError, match=r"inputs\[0\], Tensor \(5, 4, 3\), has no value for each instance"):
        store.check(((torch.randn(5, 4, 3), torch.randn(4)), {}), torch.arange(4), 4)
    with pytest.raises(ValueError, match="no input has a value for each of the 4 instances"):
        InstanceStore(8, 10**6).check(((torch.randn(5, 4, 3),), {}), torch.arange(4), 4)


def test_inputs_that_are_no_tensors_are_never_paired_with_other_targets():
    class Opaque:
        pass

    with pytest.raises(ValueError, match="no input has a value for each of the 3 instances"):
        InstanceStore(8, 10**6).check(((Opaque(),), {}), torch.arange(3), 3)
    store = InstanceStore(8, 10**6)
    store.insert(((torch.randn(3), Opaque()), {}), torch.arange(3), 3, [0])
    with pytest.raises(ValueError, match=r"inputs\[1\], .* is another than in earlier batches"):
        store.check(((torch.randn(3), Opaque()), {}), torch.arange(3), 3)


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("arguments", "targets", "message"),
    [
        (((torch.randn(3, 5),), {}), torch.arange(3), r"ValidationBuffer\(padding=\.\.\.\)"),
        (((X.double(),), {}), torch.arange(3), "pad inputs to one length"),
        (((X, None), {}), torch.arange(3), "inputs must be nested as in earlier batches"),
        (((), {"x": X}), torch.arange(3), "inputs must be nested as in earlier batches"),
        (((X,), {}), [0, 1, 2], "targets must be a Tensor with a value for each of the 3 instances"),
        (((X.sum(),), {}), torch.arange(3), r"inputs\[0\] must be a Tensor"),
        (((X[:2],), {}), torch.arange(3), r"inputs\[0\] must be a Tensor .*got Tensor \(2, 4\)"),
    ],
)
def test_a_batch_of_another_kind_is_refused_and_changes_nothing(arguments, targets, message):
    store = InstanceStore(8, 10**6)
    store.insert(((X,), {}), torch.arange(3), 3, [0, 1], [5, 6, 7])
    before = store.state_dict()
    for refused in (store.check, lambda *batch: store.insert(*batch, [2])):
        with pytest.raises(ValueError, match=message):
            refused(arguments, targets, 3)
    assert_same(store.state_dict(), before)
    store.check(((X,), {}), torch.arange(3), 3)


def test_a_batch_that_was_only_checked_decides_nothing():
    store = InstanceStore(8, 10**6)
    store.check(((X, None), {}), torch.arange(3), 3)
    store.check(((X.double(),), {}), [torch.arange(3)], 3)
    store.insert(((X,), {}), torch.arange(3), 3, [0, 1])
    assert len(store) == 2


def test_bytes_bound_the_capacity():
    store = InstanceStore(1000, 320)  # an instance takes 3·8 + 8 bytes
    put(store, range(30))
    assert len(store) == store.capacity == 10
    assert store.nbytes == 320
    with pytest.raises(ValueError, match="max_bytes=63 is less than 2 instances of 32 bytes take"):
        InstanceStore(10, 63).check(*numbered([1]), 1)


def test_bytes_bound_what_lists_hold():
    store = InstanceStore(1000, 10_000)
    for step in range(30):
        sizes = [(7 * step + i) % 20 + 1 for i in range(5)]
        images = [torch.zeros(size, 10) for size in sizes]  # 40 bytes for each unit of size
        store.insert(((images,), {}), torch.tensor(sizes), 5, range(5), [5 * step + i for i in range(5)], None, step)
        (kept, _), targets = store.draw(range(len(store)))
        assert [len(image) for image in kept[0]] == targets.tolist()
        assert sum(image.nbytes for image in kept[0]) + 8 * store.capacity == store.nbytes <= 10_000
    assert len(store) > 2
    assert store.capacity == 10_000 // 2 // 8
    huge = [torch.zeros(5000, 10) for _ in range(5)]
    store.insert(((huge,), {}), torch.full((5,), 5000), 5, range(5))
    assert store.nbytes <= 10_000 or len(store) == 2


def test_when_full_every_instance_is_replaced_equally_often():
    counts = Counter()
    for seed in range(600):
        store = InstanceStore(5, 10**6)
        put(store, range(5))
        put(store, [9], seed=seed)
        assert len(store) == 5
        counts.update(store.draw(range(5))[1].tolist())
    assert counts[9] == 600
    for number in range(5):  # each stays in 4 of 5 cases: 480, with a standard deviation of 9.8
        assert abs(counts[number] - 480) < 40


def test_when_full_a_class_that_has_its_share_gives_way_to_itself():
    shares = {0: 0.5, 1: 0.5}
    for seed in range(40):
        store = InstanceStore(8, 10**6)
        put(store, range(8), None, [0] * 6 + [1] * 2)
        put(store, [9], None, [0], seed, shares=shares)
        assert store.class_counts() == {0: 6, 1: 2}
        put(store, [10], None, [1], seed, shares=shares)
        assert store.class_counts()[1] in (2, 3)


def broken(name, change):
    return pytest.param(name, change, id=f"{name}-{change.__code__.co_firstlineno}")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        broken("rows", lambda rows: rows[:-1]),
        broken("rows", lambda rows: [3] * len(rows)),
        broken("rows", lambda rows: [0.5, *rows[1:]]),
        broken("classes", lambda classes: [*classes, 0]),
        broken("classes", lambda classes: ["a", *classes[1:]]),
        broken("times", lambda times: times[:-1]),
        broken("times", lambda times: ["a", *times[1:]]),
        broken("columns", lambda columns: []),
        broken("columns", lambda columns: [columns[0][:-1], columns[1]]),
        broken("columns", lambda columns: [columns[0].repeat(1, 10**4), columns[1]]),
    ],
)
def test_states_whose_parts_do_not_fit(name, change):
    store = InstanceStore(8, 10**4)
    put(store, range(4), [5, 6, 7, 8], [0, 1, 0, 1])
    state = store.state_dict()
    with pytest.raises(ValueError, match=r"the buffer|max_bytes"):
        store.loaded(state | {name: change(state[name])})
    with pytest.raises(ValueError, match="holds 4 instances, but its bounds allow 3"):
        InstanceStore(3, 10**4).loaded(state)
    assert_same(store.loaded(state).state_dict(), state)


def test_loaded_instances_of_another_shape_than_the_stream():
    store = InstanceStore(8, 10**4)
    put(store, range(4))
    loaded = store.loaded(store.state_dict())
    with pytest.raises(ValueError, match="pad inputs to one length"):
        loaded.check(((X,), {}), torch.arange(3), 3)


def test_the_first_half_of_a_batch():
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    mask = torch.ones(7, 7)
    (positional, named), targets = first_half(((x, list("abcde")), {"mask": mask, "mode": "train"}), y)
    assert torch.equal(positional[0], x[:2])
    assert positional[1] == ["a", "b"]
    assert torch.equal(named["mask"], mask)
    assert named["mode"] == "train"
    assert targets.tolist() == [0, 1]
    time_first = torch.randn(4, 4, 3)  # (T, B, F) with T = B: half of the time, which the losses will show
    ((half,), _), targets = first_half(((time_first,), {}), torch.arange(4))
    assert torch.equal(half, time_first[:2])
    assert len(targets) == 2
    assert first_half(((x[:1],), {}), y[:1])[1].tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "targets", "size"),
    [
        (((), {}), torch.zeros(3, 2), 3),
        (((), {}), np.zeros(4), 4),
        (((), {}), {"weight": 1.0, "y": torch.zeros(5)}, 5),
        (((), {}), [{"boxes": torch.zeros(7, 4)}, {"boxes": torch.zeros(2, 4)}], 2),
        (((torch.zeros(6, 2),), {}), None, 6),
    ],
)
def test_the_number_of_instances(arguments, targets, size):
    assert size_of(arguments, targets) == size
    with pytest.raises(ValueError, match="the targets must have a first dimension"):
        size_of(((), {}), torch.tensor(1.0))


def texts(length, first):
    """Three rows of ``length`` numbers, with a mask, as a model is called with them."""
    ids = torch.arange(first, first + 3 * length).reshape(3, length)
    return ((), {"ids": ids, "mask": torch.ones(3, length, dtype=torch.bool)}), ids % 7


def test_shorter_instances_are_filled_up_to_the_longest_drawn():
    store = InstanceStore(8, 10**6, {"ids": -1, "mask": 0, "targets": -100})
    for number, length in enumerate((4, 2, 5)):
        arguments, targets = texts(length, 100 * number)
        store.insert(arguments, targets, 3, [0, 2], [10 * number + i for i in range(3)])
    place = {row: number for number, row in enumerate(store._rows)}
    (_, named), targets = store.draw([place[0], place[12]])
    assert named["ids"].tolist() == [[0, 1, 2, 3], [104, 105, -1, -1]]
    assert named["mask"].dtype == torch.bool and named["mask"].sum(dim=1).tolist() == [4, 2]
    assert targets.tolist() == [[0, 1, 2, 3], [104 % 7, 105 % 7, -100, -100]]
    (_, named), _ = store.draw([place[12], place[10]])
    assert named["ids"].shape == (2, 2)

    loaded = store.loaded(saved_and_read(store.state_dict()))
    assert loaded.drawable == 0
    loaded.check(*texts(3, 0), 3)
    assert_same(loaded.draw([1, 3, 5]), store.draw([1, 3, 5]))
    assert store.nbytes == sum(2 * (2 * 8 * length + length) for length in (4, 2, 5))


def test_one_number_fills_every_tensor_up_in_all_its_dimensions():
    store = InstanceStore(8, 10**6, 0.5)
    for height, width in ((2, 3), (3, 1)):
        store.insert(((torch.ones(2, height, width),), {}), torch.arange(2), 2, [1])
    ((images,), _), targets = store.draw([0, 1])
    assert images.shape == (2, 3, 3) and targets.tolist() == [1, 1]
    assert torch.equal(images[0], torch.nn.functional.pad(torch.ones(2, 3), (0, 0, 0, 1), value=0.5))
    assert torch.equal(images[1], torch.nn.functional.pad(torch.ones(3, 1), (0, 2), value=0.5))


def test_padding_is_of_inputs_that_are_there_and_of_one_kind():
    arguments, targets = texts(4, 0)
    with pytest.raises(ValueError, match=r"padding names \['input_ids'\], .* is \['ids', 'mask', 'targets'\]"):
        InstanceStore(8, 10**6, {"input_ids": 0}).check(arguments, targets, 3)
    with pytest.raises(ValueError, match=r"padding names \[1\]"):
        InstanceStore(8, 10**6, {0: 0, 1: 0}).check(((X, torch.arange(3)), {}), torch.arange(3), 3)
    store = InstanceStore(8, 10**6, {"ids": 0})
    store.insert(arguments, targets, 3, [0])
    with pytest.raises(ValueError, match=r"ValidationBuffer\(padding=\.\.\.\)"):
        store.check(*texts(5, 0), 3)  # the mask has no number
    arguments[1]["ids"] = arguments[1]["ids"].float()
    with pytest.raises(ValueError, match=r"inputs\['ids'\] must be a tensor of 2 dimensions and torch.int64"):
        store.check(arguments, targets, 3)


@pytest.mark.parametrize("padding", [None, -1])
def test_what_was_loaded_goes_where_the_batches_are(padding):
    """Also tensors in lists: a state that was read on the CPU serves a model on another device."""
    store = InstanceStore(8, 10**6, padding)

    def batch(device):
        ids = torch.arange(6, device=device).reshape(3, 2)
        return ((ids, [torch.ones(n + 1, device=device) for n in range(3)]), {}), torch.arange(3, device=device)

    store.insert(*batch("cpu"), 3, [0, 2])
    loaded = store.loaded(store.state_dict())
    loaded.check(*batch("meta"), 3, wait=False)
    arguments, targets = loaded.draw([0, 1])
    assert {leaf.device.type for leaf in leaves_of((arguments, targets))} == {"meta"}

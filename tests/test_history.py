"""What is remembered of each row, against counts by hand."""

import io

import pytest
import torch
from same import assert_same
from some_samples import Operations, some_samples

from torch_molere import history as module
from torch_molere.history import SampleHistory, indices_of


def stream(batches=40, size=6, rows=15, seed=0, again=False, dtype=torch.float):
    """Batches of (rows, samples, weights, held_out, val_mask, weighed)."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(batches):
        drawn = (
            torch.randint(rows, (size,), generator=generator) if again else torch.randperm(rows, generator=generator)
        )
        held, sent = (torch.rand(size, generator=generator) < rate for rate in (0.2, 0.4))
        weights = torch.where(held, 0.0, torch.rand(size, generator=generator))
        samples = some_samples(size, seed=1000 * seed + number, dtype=dtype)
        yield drawn[:size].tolist(), samples, weights, held, sent, number >= 10


def running(values, decay=0.9):
    factors = [decay ** (len(values) - 1 - place) for place in range(len(values))]
    return sum(f * v for f, v in zip(factors, values, strict=True)) / sum(factors)


def mean(values):
    return sum(values) / len(values) if values else float("nan")


@pytest.mark.parametrize("again", [False, True])
def test_everything_equals_a_count_by_hand(again):
    """``again``: rows come several times in a batch, each time as one more encounter."""
    history = SampleHistory()
    met = {row: [] for row in range(15)}
    for rows, samples, weights, held, sent, weighed in stream(again=again, dtype=torch.double):
        memory = history.recall(rows, samples.losses, samples.margins)
        for i, row in enumerate(rows):  # as if the present encounter were the next one
            torch.testing.assert_close(
                memory.running_losses[i].item(), running([e[0] for e in met[row]] + [samples.losses[i].item()])
            )
            torch.testing.assert_close(
                memory.running_margins[i].item(), running([e[1] for e in met[row]] + [samples.margins[i].item()])
            )
        history.record(rows, samples, weights, held, sent, weighed)
        for i, row in enumerate(rows):
            weight = weights[i].item() if weighed and not held[i] else None
            labels = samples.targets[i].item(), samples.outputs[i].argmax().item()
            flags = (float(samples.correct[i]), float(held[i]), float(sent[i]))
            met[row].append((samples.losses[i].item(), samples.margins[i].item(), *flags, weight, *labels))
    table = history.table()
    assert table["row"].tolist() == list(range(15))
    assert len(history) == 15
    for row, encounters in met.items():
        losses, margins, correct, held, sent, weights, targets, predictions = zip(*encounters, strict=True)
        expected = {
            "seen": len(encounters),
            "loss": mean(losses),
            "running_loss": running(losses),
            "margin": mean(margins),
            "running_margin": running(margins),
            "correct": mean(correct),
            "weight": mean([weight for weight in weights if weight is not None]),
            "held_out": mean(held),
            "sent": mean(sent),
            "target": targets[-1],
            "prediction": predictions[-1],
        }
        for name, value in expected.items():
            assert table[name][row].item() == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    assert table["meta_gradient"].isnan().all()


def test_a_first_encounter_is_the_present_exactly_and_so_is_everything_without_rows():
    samples = some_samples()
    for rows in (list(range(8)), None):
        memory = SampleHistory().recall(rows, samples.losses, samples.margins)
        assert torch.equal(memory.running_losses, samples.losses)
        assert torch.equal(memory.running_margins, samples.margins)
        assert memory.meta_gradients.tolist() == [0.0] * 8
        assert not memory.has_meta_gradient.any()
        now = torch.randn(8)
        memory = SampleHistory().recall(rows, samples.losses, None, now)
        assert memory.running_margins is None
        assert torch.equal(memory.meta_gradients, now)
        assert memory.has_meta_gradient.all()


@pytest.mark.parametrize("decay", [0.8, 0.5, 0.0])
def test_meta_gradients_are_averaged_by_row(decay):
    generator = torch.Generator().manual_seed(0)
    history = SampleHistory(meta_decay=decay)
    met = {row: [] for row in range(9)}
    losses = torch.zeros(6, dtype=torch.double)
    for step in range(25):
        rows = torch.randperm(9, generator=generator)[:6].tolist()
        now = torch.randn(6, generator=generator, dtype=torch.double)
        before, included = history.recall(rows, losses, None), history.recall(rows, losses, None, now)
        for i, row in enumerate(rows):
            known = met[row] if decay else []  # at a decay of 0 nothing is remembered
            expected = running(known, decay) if known else 0.0
            assert before.meta_gradients[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert before.has_meta_gradient[i].item() == bool(known)
            assert included.meta_gradients[i].item() == pytest.approx(running([*known, now[i].item()], decay), rel=1e-9)
            assert included.has_meta_gradient[i]
        if step % 3 == 0:  # there is a meta-gradient at some steps only, for some of the rows
            history.record_meta_gradients(rows[:4], now[:4])
            for row, value in zip(rows[:4], now.tolist(), strict=False):
                met[row].append(value)
    table = history.table()
    for row, seen, value in zip(*(table[name].tolist() for name in ("row", "meta_seen", "meta_gradient")), strict=True):
        assert seen == len(met[row])
        assert value == pytest.approx(running(met[row], decay) if met[row] else float("nan"), rel=1e-9, nan_ok=True)


def test_recall_changes_nothing_and_a_repeated_row_is_recalled_alike():
    history = SampleHistory()
    for rows, *rest in stream(5):
        history.record(rows, *rest)
    before = history.state_dict()
    samples = some_samples(3, seed=99)
    memory = history.recall([7, 7, 100], samples.losses[[0, 0, 1]], samples.margins[[0, 0, 1]])
    assert memory.running_losses[0] == memory.running_losses[1] != samples.losses[0]
    assert_same(history.state_dict(), before)


def test_batches_wait_without_being_seen_to_wait(monkeypatch):
    """Written together or one by one, and whatever becomes of the tensors that were recorded: the same, bit for bit."""
    together, one_by_one = SampleHistory(), SampleHistory()
    for rows, samples, weights, held, sent, weighed in stream(60, rows=2000):
        before = [history.recall(rows, samples.losses, samples.margins) for history in (together, one_by_one)]
        assert_same(*before)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_WAIT", 1)
            one_by_one.record(rows, samples, weights, held, sent, weighed)
        together.record(rows, samples, weights, held, sent, weighed)
        for tensor in (samples.losses, samples.margins, weights, held, sent, samples.correct, samples.targets):
            tensor.zero_()
    assert together._waiting and not one_by_one._waiting
    assert_same(together.state_dict(), one_by_one.state_dict())


def test_without_classes_there_are_no_margins_and_without_rows_no_trace():
    history, samples = SampleHistory(), some_samples(4, num_classes=None)
    history.record(None, samples, torch.ones(4))
    history.record_meta_gradients(None, torch.ones(4))
    assert_same([len(column) for column in history.table().values()], [0] * 14)
    history.record([3, 1, 2, 0], samples, torch.ones(4), weighed=False)
    table = history.table()
    assert table["margin"].isnan().all() and table["running_margin"].isnan().all() and table["weight"].isnan().all()
    assert table["target"].tolist() == table["prediction"].tolist() == [-1] * 4
    assert torch.equal(table["loss"], samples.losses[[3, 1, 2, 0]])
    history.record([0, 1, 2, 3], some_samples(4), torch.ones(4))  # margins count from when there are some
    torch.testing.assert_close(history.table()["running_margin"], some_samples(4).margins)
    assert history.recall([0], samples.losses[:1], None).running_margins is None


def test_rows_are_exact_and_memory_follows_how_many_there_are():
    history = SampleHistory()
    large = [2**63 - 1, 2**63 - 2, 2**53 + 1, 2**53, 0]
    assert indices_of(torch.tensor(large), 5).tolist() == indices_of(large, 5).tolist() == large
    history.record(large, some_samples(5), torch.arange(5.0))
    table = history.table()
    assert table["row"].tolist() == sorted(large)
    assert table["weight"].tolist() == [4.0, 3.0, 2.0, 1.0, 0.0]
    for number in range(200):
        history.record([10**12 * number + i for i in range(8)], some_samples(), torch.ones(8))
    assert len(history) == 1600 + 4
    assert len(history._sums) <= 2 * (1600 + 4 + 8)
    with pytest.raises(ValueError, match="indices must not be negative, got -3"):
        history.recall([5, -3], torch.zeros(2), None)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (["a", "b"], TypeError, r"indices must be integers from 0 .* got \['a', 'b'\]; number the rows"),
        ([0.5, 1.0], TypeError, "indices must be integers"),
        ([2**63, 1], TypeError, "indices must be integers"),
        (3, TypeError, "indices must be integers"),
        (torch.tensor([1.0, 2.0]), TypeError, "got a tensor of torch.float32"),
        (torch.tensor([True, False]), TypeError, "got a tensor of torch.bool"),
        ([1, 2, 3], ValueError, r"indices must be \(2,\), one for each instance of the batch, got \(3,\)"),
        (torch.tensor([[1, 2]]), ValueError, r"got \(1, 2\)"),
    ],
)
def test_what_is_no_index_is_refused(indices, error, message):
    with pytest.raises(error, match=message):
        indices_of(indices, 2)


def test_a_loaded_history_goes_on_bit_for_bit():
    history = SampleHistory()
    batches = list(stream(30))
    for rows, samples, *rest in batches[:20]:
        history.record(rows, samples, *rest)
        history.record_meta_gradients(rows[:3], samples.losses[:3])
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    other = SampleHistory()
    other.load_state_dict(torch.load(file, weights_only=True))
    for rows, samples, *rest in batches[20:]:
        assert_same(
            tuple(other.recall(rows, samples.losses, samples.margins)),
            tuple(history.recall(rows, samples.losses, samples.margins)),
        )
        for each in (history, other):
            each.record(rows, samples, *rest)
            each.record_meta_gradients(rows[:3], samples.losses[:3])
    assert_same(other.state_dict(), history.state_dict())
    empty = SampleHistory()
    empty.load_state_dict(SampleHistory().state_dict())
    assert len(empty) == 0
    assert empty.recall([1], torch.ones(1), None).running_losses == 1.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("rows"), "rows must be a .* tensor of long, got None"),
        (lambda state: state.update(rows=state["rows"].float()), "rows must be a"),
        (lambda state: state.update(sums=state["sums"][:, 1:]), r"sums must be float or double \(15, 11\)"),
        (lambda state: state.update(running=None), "running must be float or double"),
        (lambda state: state["sums"].fill_(torch.nan), "sums must be finite"),
        (lambda state: state["running"].__setitem__((2, 0), torch.inf), "running must be finite"),
        (lambda state: state["rows"].__setitem__(1, 0), "different and not negative"),
        (lambda state: state["rows"].__setitem__(0, -1), "different and not negative"),
        (lambda state: state["sums"].__setitem__((0, 0), -1.0), "counts must not be negative"),
        (lambda state: state["running"].__setitem__((0, 1), 0.0), "shares lie in"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    history = SampleHistory()
    for rows, *rest in stream(9):
        history.record(rows, *rest)
    before, damaged = history.state_dict(), history.state_dict()
    damage(damaged)
    with pytest.raises(ValueError, match=message):
        history.load_state_dict(damaged)
    assert_same(history.state_dict(), before)


def test_what_is_not_finite_does_not_stay():
    history, samples = SampleHistory(), some_samples(3)
    samples.losses[:] = torch.tensor([torch.inf, torch.nan, 1.0])
    for _ in range(5):
        history.record([0, 1, 2], samples, torch.ones(3))
    history.record_meta_gradients([0, 1, 2], samples.losses)
    assert samples.losses.isnan().tolist() == [False, True, False]  # what was given stays as it is
    other = SampleHistory()
    other.load_state_dict(history.state_dict())
    memory = other.recall([0, 1, 2], torch.ones(3), None)
    assert memory.running_losses.isfinite().all() and memory.meta_gradients.isfinite().all()
    assert memory.running_losses[2] == 1.0


def test_precision_follows_the_losses():
    history = SampleHistory()
    history.record([0, 1], some_samples(2, dtype=torch.bfloat16), torch.ones(2))
    assert history.recall([0, 2], torch.ones(2, dtype=torch.bfloat16), None).running_losses.dtype == torch.float
    history.record([0, 1], some_samples(2, dtype=torch.double), torch.ones(2))
    assert history.recall([0, 2], torch.ones(2), None).running_losses.dtype == torch.double
    assert history.table()["seen"].tolist() == [2, 2]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"meta_decay must lie in \[0, 1\), got"):
        SampleHistory(decay)


def test_as_a_data_frame():
    pytest.importorskip("pandas")
    history = SampleHistory()
    history.record([5, 3], some_samples(2), torch.tensor([0.5, 1.5]))
    frame = history.to_pandas()
    assert frame.index.tolist() == [3, 5]
    assert frame.loc[5, "weight"] == 0.5
    assert frame.columns.tolist() == [name for name in history.table() if name != "row"]


def test_few_operations():
    """A small network's step is a few hundred of them."""
    history, rows = SampleHistory(), list(range(128))
    samples = some_samples(128)
    history.record(rows, samples, torch.ones(128), samples.correct, samples.correct)
    history.table()
    with Operations() as recall:
        history.recall(rows, samples.losses, samples.margins)
    with Operations() as record:
        history.record(rows, samples, torch.ones(128), samples.correct, samples.correct)
    with Operations() as write:
        history.table()
    assert recall.count <= 9
    assert record.count <= 9
    assert write.count <= 16 * 8  # for sixteen batches

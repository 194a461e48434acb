"""Which rows are validated on and which are trained on: the right ones, whatever the inputs are and the loop does."""

import dataclasses
import logging
from collections import Counter, UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_molere import MetaReweighter, SignalWeighting, ValidationBuffer
from torch_molere.validation import held_out

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 8, 3
CALLS: list[list[int]] = []  # the instances of each call of the model


class Named(nn.Module):
    """Reads an instance's number, and makes its features of that, whatever the inputs come as."""

    def __init__(self, read):
        super().__init__()
        self.read, self.layer, self.numbers = read, nn.Linear(4, C), []
        Named.latest = self

    def forward(self, *positional, **named):
        numbers = torch.as_tensor([int(number) for number in self.read(*positional, **named)])
        self.numbers = numbers.tolist()
        CALLS.append(self.numbers)
        return self.layer(torch.stack([(numbers * k).sin() for k in range(1, 5)], dim=1))


def paired(outputs, targets):
    """Cross-entropy that says whose targets these are: an instance's number times C, plus its class."""
    assert Named.latest.numbers == (targets // C).tolist(), "targets of other instances than the inputs"
    return F.cross_entropy(outputs, targets % C, reduction="none")


def targets_of(numbers):
    return torch.tensor([number * C + number % C for number in numbers])


def encoding(numbers):
    transformers = pytest.importorskip("transformers")
    data = {"input_ids": torch.tensor(numbers)[:, None].expand(-1, 5).clone(), "attention_mask": torch.ones(B, 5)}
    return transformers.BatchEncoding(data)


@dataclasses.dataclass
class Inputs:
    numbers: torch.Tensor
    scale: float


KINDS = {
    "encoding": (encoding, lambda input_ids, attention_mask: input_ids[:, 0]),
    "encoding as one": (lambda n: (encoding(n),), lambda e: e["input_ids"][:, 0]),
    "mapping": (lambda n: UserDict(ids=torch.tensor(n)), lambda ids: ids),
    "NumPy": (np.array, lambda x: x),
    "NumPy in a dict": (lambda n: {"x": np.array(n)[:, None]}, lambda x: x[:, 0]),
    "strings": (lambda n: [str(number) for number in n], lambda x: x),
    "strings in a tuple": (lambda n: (tuple(map(str, n)), None), lambda x, _: x),
    "lists": (lambda n: {"x": list(n), "mask": torch.ones(B)}, lambda x, mask: x),
    "a dataclass": (lambda n: Inputs(torch.tensor(n), 2.0), lambda x: x.numbers),
    "images of many sizes": (
        lambda n: ([torch.full((1, 2 + i % 3, 2), float(i)) for i in n],),
        lambda x: [i.max() for i in x],
    ),
}


def stream(steps, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        yield generator.choice(40, size=B, replace=False).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hypergradient", ["finite", "forward"])
def test_inputs_of_any_kind_stay_with_their_targets(kind, hypergradient):
    """14. ``paired`` raises where a batch of the buffer has other inputs than targets."""
    make, read = KINDS[kind]
    torch.manual_seed(0)
    model = Named(read)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = ValidationBuffer(fraction=0.3, capacity=12)
    options = {"warmup_steps": 2, "every": 1, "hypergradient": hypergradient}
    reweighter = MetaReweighter(model, optimizer, loss_fn=paired, validation=validation, **options)
    for numbers in stream(8):
        reweighter.step((make(numbers), targets_of(numbers), torch.tensor(numbers)))
    assert reweighter.meta_updates >= 5
    assert len(validation) > 5


@pytest.mark.parametrize("with_indices", [True, False])
def test_the_validation_loss_is_that_of_rows_held(with_indices):
    """14. By hand: the mean loss at θ⁺ of the very instances drawn."""
    torch.manual_seed(0)
    model = Named(lambda x: x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = ValidationBuffer(fraction=0.3, capacity=12)
    options = {"warmup_steps": 2, "every": 1, "hypergradient": "finite"}
    reweighter = MetaReweighter(model, optimizer, loss_fn=paired, validation=validation, **options)
    for numbers in stream(6):
        before = len(CALLS)
        indices = [torch.tensor(numbers)] if with_indices else []
        result = reweighter.step((np.array(numbers), targets_of(numbers), *indices))
        if result.val_loss is not None:
            drawn = next(call for call in CALLS[before + 1 :] if call not in (numbers, numbers[: B // 2]))
            assert set(drawn) <= {number for call in CALLS[:before] for number in call}
            expected = F.cross_entropy(model(drawn), targets_of(drawn) % C)
            torch.testing.assert_close(result.val_loss, expected.detach())


def test_inputs_written_to_before_the_step_are_refused():
    """14. One tensor for all micro-batches: the rows of the first would be kept with the inputs of the second."""
    reweighter = plain_reweighter()
    x = torch.empty(B, 4)
    for number in range(2):
        x.copy_(batch_of(range(B * number, B * number + B))[0])
        reweighter.loss(reweighter.model(x.clone() if number == 0 else x), *batch_of(range(B))[1:]).backward()
    reweighter.optimizers[0].step()
    reweighter.optimizers[0].zero_grad()
    for number in range(2):
        with torch.no_grad():
            x.copy_(batch_of(range(B * number, B * number + B))[0])
        reweighter.loss(reweighter.model(x), *batch_of(range(B))[1:]).backward()
    before = [parameter.clone() for parameter in reweighter.model.parameters()]
    with pytest.raises(RuntimeError, match="inputs were written to between the model's forward and the optimizer's"):
        reweighter.optimizers[0].step()
    assert all(torch.equal(a, b) for a, b in zip(before, reweighter.model.parameters(), strict=True))
    assert reweighter.steps == 1


@pytest.mark.parametrize("step", [0, 2])
def test_micro_batches_of_other_shapes_are_refused_before_the_step(step):
    """14. Also in the first step, when no batch has decided yet what the buffer holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, C))
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=1, every=1)
    for number in range(step):
        reweighter.step((torch.randn(B, 6), torch.arange(B) % C, torch.arange(B) + B * number))
    before = [parameter.clone() for parameter in model.parameters()]
    reweighter.optimizers[0].zero_grad()
    with pytest.raises(ValueError, match="pad inputs to one length"):
        for length in (6, 7):
            reweighter.loss(model(torch.randn(B, length)), torch.arange(B) % C).backward()
        reweighter.optimizers[0].step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert reweighter.steps == step


# 15. MixUp.


def mixed_loss(outputs, targets):
    first, second, lam = targets
    one, two = (F.cross_entropy(outputs, t, reduction="none") for t in (first, second))
    return lam * one + (1 - lam) * two


def mixed(seed, lam_of):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(B, 4, generator=generator), torch.randint(C, (B,), generator=generator)
    lam = float(torch.rand((), generator=generator))
    return lam * x + (1 - lam) * x.flip(0), (y, y.flip(0), lam_of(lam)), torch.arange(B) + B * seed


def mixing(loss_fn=mixed_loss, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, C)
    options = {"warmup_steps": 1, "every": 1, **options}
    return MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn, **options)


@pytest.mark.parametrize("lam_of", [float, torch.tensor, np.float64])
def test_one_lam_for_the_batch_is_refused(lam_of):
    """15. A float, a 0-dim tensor or a NumPy number among the targets."""
    reweighter = mixing()
    reweighter.step(mixed(0, lam_of))
    before = [parameter.clone() for parameter in reweighter.model.parameters()]
    with pytest.raises(ValueError, match=r"targets\[2\].*give it by instance \(a tensor with the batch first"):
        reweighter.step(mixed(1, lam_of))
    assert all(torch.equal(a, b) for a, b in zip(before, reweighter.model.parameters(), strict=True))


def test_a_lam_for_each_instance_stays_with_it():
    """15."""
    validation = ValidationBuffer(fraction=0.4, capacity=16)
    reweighter = mixing(validation=validation)
    batches = [mixed(seed, lambda lam: torch.full((B,), lam)) for seed in range(6)]
    for batch in batches:
        reweighter.step(batch)
    (x,), (first, second, lam) = (lambda d: (d[0][0], d[1]))(validation.store.draw(range(len(validation))))
    whole = torch.cat([inputs for inputs, _, _ in batches])
    columns = [torch.cat(parts) for parts in zip(*(targets for _, targets, _ in batches), strict=True)]
    rows = (x[:, None] == whole).all(2).float().argmax(1)
    assert sorted(rows.tolist()) == sorted(validation.store.rows)
    for drawn, column in zip((x, first, second, lam), (whole, *columns), strict=True):
        assert torch.equal(drawn, column[rows])


class KeepsLam(nn.Module):
    def __init__(self):
        super().__init__()
        self.lam = 0.5

    def forward(self, outputs, targets):
        return mixed_loss(outputs, (*targets, self.lam))


@pytest.mark.parametrize("kept_in", ["module", "closure"])
def test_a_lam_kept_in_the_criterion_is_told(kept_in, caplog):
    """15. Nobody can know which batch it was of."""
    lam = 0.5
    criterion = KeepsLam()
    reweighter = mixing(criterion if kept_in == "module" else lambda o, t: mixed_loss(o, (*t, lam)))
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            x, (first, second, lam), indices = mixed(seed, float)
            criterion.lam = lam
            reweighter.step((x, (first, second), indices))
    found = [record.message for record in caplog.records if "loss_fn keeps numbers" in record.message]
    assert len(found) == 1
    assert "lam" in found[0]
    assert "(B,) tensor" in found[0]


@pytest.mark.parametrize("case", ["constant", "trusted"])
def test_a_lam_that_does_no_harm_is_not_told(case, caplog):
    """15. One that never changes, or where no rows are held."""
    criterion = KeepsLam()
    trusted = [(x, targets) for x, targets, _ in (mixed(9, float),)]
    trusted = [(x, targets[:2]) for x, targets in trusted]
    reweighter = mixing(criterion, **({"validation": trusted} if case == "trusted" else {}))
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            x, (first, second, lam), indices = mixed(seed, float)
            criterion.lam = lam if case == "trusted" else 0.5
            reweighter.step((x, (first, second), indices))
    assert not [record.message for record in caplog.records if "keeps numbers" in record.message]


# 16. Inputs whose first dimension is not the batch.


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 5), nn.Linear(5, C)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(0))


class Masked(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, C)

    def forward(self, x, mask):
        x = self.embed(x)
        return self.head(F.scaled_dot_product_attention(x, x, x, attn_mask=mask).mean(1))


@pytest.mark.parametrize("case", ["time first", "time as long as the batch", "mask", "mask as long as the batch"])
def test_other_dimensions_first_are_refused_at_the_first_step(case):
    """16. (T, B, F), also with T = B, and a (T, T) mask with T = B: what to do is said. Other masks are constants."""
    torch.manual_seed(0)
    length = B if "long" in case else 5
    if "time" in case:
        model, inputs = TimeMajor(), torch.randn(length, B, 4)
    else:
        model, inputs = Masked(length), (torch.randn(B, length, 4), torch.ones(length, length).tril().bool())
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=1, every=1)
    batch = inputs, torch.arange(B) % C, torch.arange(B)
    if case == "mask":
        for _ in range(4):
            reweighter.step(batch)
        assert reweighter.meta_updates > 0
        return
    with pytest.raises(ValueError, match="pass validation="):
        reweighter.step(batch)
    assert reweighter.steps == 0
    trusted = MetaReweighter(
        model, torch.optim.SGD(model.parameters(), lr=0.1), validation=[batch[:2]], warmup_steps=0, every=1
    )
    assert trusted.step(batch).val_loss is not None


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, C)

    def forward(self, nodes, edges, graphs):
        hidden = self.layer(nodes).tanh()
        hidden = hidden.index_add(0, edges[1], hidden[edges[0]])
        return self.head(hidden.new_zeros(int(graphs.max()) + 1, 5).index_add(0, graphs, hidden))


def test_graphs_need_a_validation_set_of_their_own():
    """16. A batch of graphs is one tensor of all their nodes, which a buffer cannot take apart."""
    torch.manual_seed(0)
    graphs = torch.arange(B).repeat_interleave(3)
    edges = torch.stack([torch.arange(3 * B), torch.arange(3 * B).roll(1)])
    inputs = {"nodes": torch.randn(3 * B, 4), "edges": edges, "graphs": graphs}
    batch = inputs, torch.arange(B) % C, torch.arange(B)
    model = GraphNet()
    options = {"warmup_steps": 1, "every": 1}
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with pytest.raises(ValueError, match=r"no input has a value for each of the 8 instances .*pass validation="):
        reweighter.step(batch)
    trusted = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), validation=[batch[:2]], **options)
    for _ in range(3):
        result = trusted.step(batch)
    torch.testing.assert_close(result.val_loss, F.cross_entropy(model(**inputs), batch[1]).detach())


# 17. Losses that no step is made of.


def plain_reweighter(seed=0, fraction=0.3, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"validation": ValidationBuffer(fraction=fraction), "warmup_steps": 1, "every": 2, **options}
    return MetaReweighter(model, optimizer, **options)


def batch_of(rows):
    rows = torch.as_tensor(rows)
    x = torch.stack([(rows * k).double().sin().float() for k in range(1, 5)], dim=1)
    return x, rows % C, rows


@pytest.mark.parametrize("order", ["after", "before"])
def test_evaluation_with_gradients_on_leaves_no_row(order):
    """17. Test rows are numbered from 100."""
    reweighter = plain_reweighter(order=order)
    twin = plain_reweighter(order=order)
    for step, rows in enumerate(stream(8)):
        x, y, indices = batch_of(rows)
        for each in (reweighter, twin):
            each.optimizers[0].zero_grad()
            each.loss(each.model(x), y, indices).backward()
            each.optimizers[0].step()
        x, y, indices = batch_of(range(100 + B * step, 100 + B * step + B))
        total = reweighter.loss(reweighter.model(x), y, indices).item()  # never backward
        assert total > 0
    assert set(reweighter.history.table()["row"].tolist()) < set(range(40))
    assert set(reweighter.validation.store.rows) < set(range(40))
    assert reweighter.steps == 8
    for a, b in zip(reweighter.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ["autograd.grad", "backward", "backward, zeroed in place"])
def test_adversarial_steps_leave_no_row(gradient):
    """17. PGD: three losses of each batch before the one that the optimizer steps on; 10 % of rows, not 38 %."""
    reweighter = plain_reweighter(fraction=0.25)
    model, optimizer = reweighter.model, reweighter.optimizers[0]
    seen = Counter()
    for rows in stream(12):
        x, y, indices = batch_of(rows)
        attacked = x.clone()
        for _ in range(3):
            attacked = attacked.detach().requires_grad_()
            loss = reweighter.loss(model(attacked), y, indices)
            if gradient == "autograd.grad":
                (g,) = torch.autograd.grad(loss, attacked)
            else:
                loss.backward()
                g = attacked.grad
            attacked = attacked + 0.01 * g.sign()
        optimizer.zero_grad(set_to_none="place" not in gradient)
        attacked = attacked.detach()
        reweighter.loss(model(attacked), y, indices).backward()
        optimizer.step()
        seen.update(rows)
        store, sent = reweighter.validation.store, reweighter.result.val_mask
        assert len(sent) == B
        assert set(indices[sent].tolist()) <= set(store.rows)
        (held,), _ = store.draw(range(len(store)))[0]
        assert all((held == instance).all(1).any() for instance in attacked[sent])  # as it was trained on
    table = reweighter.history.table()
    assert dict(zip(table["row"].tolist(), table["seen"].tolist(), strict=True)) == seen
    share = float((table["sent"] * table["seen"]).sum() / table["seen"].sum())
    assert 0.125 <= share <= 0.375
    assert reweighter.steps == 12


# 18. Rows that are held out.


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_row_held_out_is_trained_on_nowhere_in_its_step(order):
    """18. Twice in a batch; drawn with replacement from few rows."""
    validation = ValidationBuffer(fraction=0.3, hold_out=True, capacity=30)
    reweighter = plain_reweighter(validation=validation, order=order)
    generator = np.random.default_rng(0)
    twice = 0
    for _ in range(25):
        rows = generator.integers(0, 12, size=B).tolist()
        batch = batch_of(rows)
        before = [parameter.detach().clone() for parameter in reweighter.model.parameters()]
        result = reweighter.step(batch)
        held = result.held_out.tolist()
        sent = {row for row, flag in zip(rows, result.val_mask.tolist(), strict=True) if flag}
        trained = {row for row, flag in zip(rows, held, strict=True) if not flag}
        assert not sent & trained
        twice += any(rows.count(row) > 1 for row in sent)
        assert torch.equal(result.weights == 0, result.held_out)
        torch.testing.assert_close(result.weights[~result.held_out].mean(), torch.tensor(1.0))
        assert sent <= set(validation.store.rows)
        if len(validation) > 2:  # a row that was trained on is held no more
            assert not trained & set(validation.store.rows)
        assert not all(torch.equal(a, b) for a, b in zip(before, reweighter.model.parameters(), strict=True))
    assert twice > 3


def test_the_loss_is_of_the_training_side_alone():
    """18. The gradient at the inputs is zero where a row is held out, twice in the batch included."""
    validation = ValidationBuffer(fraction=0.4, hold_out=True)
    reweighter = plain_reweighter(validation=validation)
    for step in range(10):
        batch = batch_of([step, step + 1, step, step + 2, step + 3, step + 1, step + 4, step + 5])
        x, y, indices = batch
        x = x.clone().requires_grad_()
        loss = reweighter.loss(reweighter.model(x), y, indices)
        held = reweighter.result.held_out
        reweighter.optimizers[0].zero_grad()
        loss.backward()
        assert torch.equal(x.grad.abs().sum(1) == 0, held)
        reweighter.optimizers[0].step()


def test_rows_keep_their_side_through_accumulated_losses():
    """18. Sent in the first micro-batch, held out in the second, and the other way round."""
    validation = ValidationBuffer(fraction=0.4, hold_out=True)
    reweighter = plain_reweighter(validation=validation)
    for step in range(10):
        reweighter.optimizers[0].zero_grad()
        rows = [list(range(step, step + B)), list(range(step + 4, step + 4 + B))]
        for micro in rows:
            x, y, indices = batch_of(micro)
            (reweighter.loss(reweighter.model(x), y, indices) / 2).backward()
        reweighter.optimizers[0].step()
        side = {}
        for row, out in zip([*rows[0], *rows[1]], reweighter.result.held_out.tolist(), strict=True):
            assert side.setdefault(row, out) == out


def test_rows_of_all_ranks_are_held_out():
    """18. A row that a DistributedSampler pads with comes on two ranks: ``held_out`` is asked for all of them."""
    assert held_out([4, 5, 6, 4], [True, False, False, False]) == [True, False, False, True]
    assert held_out([4, 4, 4], [True, False, False]) == [True, False, True]  # one always stays
    assert held_out(None, [True, False]) == [True, False]


# 19. Indices.


@pytest.mark.parametrize("offset", [0, 2**31, 2**53, 2**63 - 64])
def test_large_indices_stay_different_rows(offset):
    """19. Through history and buffer; memory follows the number of rows."""
    reweighter = plain_reweighter(weighting=SignalWeighting(), warmup_steps=0)  # in warm-up the split is by row
    for rows in stream(6):
        x, y, _ = batch_of(rows)
        reweighter.step((x, y, torch.tensor(rows) + offset))
    table = reweighter.history.table()
    assert len(table["row"]) == len({row for rows in stream(6) for row in rows})
    assert {row - offset for row in table["row"].tolist()} == {row for rows in stream(6) for row in rows}
    assert {row - offset for row in reweighter.validation.store.rows} <= set(range(40))
    assert sum(part.nbytes for part in reweighter.history.state_dict().values() if hasattr(part, "nbytes")) < 40 * 200
    twin = plain_reweighter(weighting=SignalWeighting(), warmup_steps=0)
    for rows in stream(6):
        twin.step(batch_of(rows))
    for a, b in zip(reweighter.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("indices", [list(range(B)), np.arange(B), tuple(range(B)), torch.arange(B).int()])
def test_indices_of_other_kinds(indices):
    """19."""
    reweighter = plain_reweighter()
    x, y, _ = batch_of(range(B))
    reweighter.step((x, y, indices))
    assert reweighter.history.table()["row"].tolist() == list(range(B))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([f"img_{i}.png" for i in range(B)], TypeError, r"indices must be integers .*number the rows .*with_indices"),
        (torch.arange(B) / 2, TypeError, "indices must be integers"),
        (torch.arange(B) - 1, ValueError, "indices must not be negative, got -1"),
        (torch.arange(B - 1), ValueError, r"indices must be \(8,\), one for each instance"),
        ([2**63] * B, TypeError, r"from 0 to 2\*\*63 - 1"),
    ],
)
def test_what_is_no_index_is_refused(indices, error, message):
    """19. Before anything has changed."""
    reweighter = plain_reweighter()
    x, y, _ = batch_of(range(B))
    before = [parameter.clone() for parameter in reweighter.model.parameters()]
    with pytest.raises(error, match=message):
        reweighter.step((x, y, indices))
    assert all(torch.equal(a, b) for a, b in zip(before, reweighter.model.parameters(), strict=True))
    assert len(reweighter.history) == 0
    reweighter.step((x, y))

"""Two DDP ranks with half a batch each are one process with the whole batch (gloo on the CPU)."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from same import assert_same
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_molere import (
    FreeWeighting,
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    RandomSplitter,
    SignalWeighting,
    ValidationBuffer,
)
from torch_molere.distributed.collectives import anywhere, averaged, gathered, ranks, summed, summed_gradients
from torch_molere.samples import Samples
from torch_molere.splitting import splitter_loss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 5, generator=generator, dtype=torch.double), torch.randint(3, (size,), generator=generator)


def part(tensors, rank, cut):
    """What a rank has of a batch; ``cut`` rows go to the first, the others to the second. Rank None has everything."""
    rows = {None: slice(None), 0: slice(0, cut), 1: slice(cut, None)}[rank]
    return tuple(tensor[rows] for tensor in tensors)


def wrapped(rank, model):
    return model if rank is None else DistributedDataParallel(model)


def weighting_of(name, rank):
    """φ; ranks other than the first start from another one, which they must not keep."""
    torch.manual_seed(5 + (rank or 0))
    weighting = {"signals": SignalWeighting, "free": lambda: FreeWeighting(48)}[name]().double()
    for parameter in weighting.parameters():
        nn.init.normal_(parameter, std=0.3)
    return weighting


def train(rank, cut, phi="signals", accumulate=False, steps=9, **options):
    """Steps over 48 rows with a fixed validation set, the last batch of each pass with fewer rows."""
    model = classifier()
    network = wrapped(rank, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    weighting = weighting_of(phi, rank)
    validation = [part(batch(100 + i, 10), rank, 6) for i in range(2)]
    settings = {"weighting_lr": 0.05, "validation": validation, "warmup_steps": 2, "every": 2, **options}
    reweighter = MetaReweighter(network, optimizer, weighting=weighting, **settings)
    inputs, targets = batch(0, 48)
    found = []
    for step in range(steps):
        size = 10 if step % 3 == 2 else 16
        rows = torch.arange(size) + 16 * (step % 3)
        (own,) = part((rows,), rank, min(cut, size - 2))
        optimizer.zero_grad()
        halves = own.chunk(2) if accumulate else [own]
        for i, half in enumerate(halves):
            # In the whole batch, the first half of a step is the first halves of all ranks.
            if rank is None and accumulate:
                ranks_parts = [rows[: min(cut, size - 2)], rows[min(cut, size - 2) :]]
                half = torch.cat([rank_rows.chunk(2)[i] for rank_rows in ranks_parts])
            network.require_backward_grad_sync = i == len(halves) - 1  # what DDP's no_sync() sets
            (reweighter.loss(network(inputs[half]), targets[half], half) / len(halves)).backward()
        optimizer.step()
        result = reweighter.result
        found.append((result.weights, result.meta_gradient, result.val_loss))
    return {
        "model": model.state_dict(),
        "weighting": weighting.state_dict(),
        "history": reweighter.history.table(),
        "engine": reweighter.engine,
        "steps": found,
    }


@pytest.mark.parametrize(
    ("cut", "options"),
    [
        (8, {"hypergradient": "forward"}),
        (11, {"hypergradient": "finite"}),
        (5, {"hypergradient": "reverse", "shrinkage": None}),
        (8, {"hypergradient": "forward", "order": "before"}),
        (11, {"hypergradient": "forward", "order": "before", "phi": "free"}),
        (11, {"phi": "free", "max_weight": 1.5, "shrinkage": None}),
        (8, {"accumulate": True, "hypergradient": "forward"}),
    ],
    ids=str,
)
def test_two_parts_are_a_whole(cut, options):
    whole = train(None, cut, **options)
    first, second = in_ranks(2, train, cut, **options)
    assert_same(first["weighting"], second["weighting"])
    assert_same(first["history"], second["history"])
    exact = options.get("hypergradient") in ("forward", "reverse")
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for rank in (first, second):
        for name in ("model", "weighting", "history"):
            assert_same(rank[name], whole[name], **tolerance)
        assert rank["engine"] == whole["engine"]
    updates = 0
    for (weights, gradient, loss), (others, other, also), (all_weights, all_gradients, all_loss) in zip(
        first["steps"], second["steps"], whole["steps"], strict=True
    ):
        if not options.get("accumulate"):  # there the ranks' instances come in another order
            assert_same(torch.cat([weights, others]), all_weights, **tolerance)
        if all_loss is None:
            assert loss is also is None
            continue
        updates += 1
        assert_same((loss, also), (all_loss, all_loss), **tolerance)
        if not options.get("accumulate"):
            assert_same(torch.cat([gradient, other]), all_gradients, **tolerance)
    assert updates >= 3
    assert whole["history"]["meta_seen"].sum() > 20
    start = weighting_of(options.get("phi", "signals"), None).state_dict()
    assert any(not torch.allclose(value, start[name]) for name, value in whole["weighting"].items())


def plain(rank, wrap):
    """Equal weights: training as without a reweighter, ``wrap`` says whether there is one."""
    model = classifier()
    network = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = None
    if wrap:
        reweighter = MetaReweighter(network, optimizer, weighting=Equal(), validation=[batch(100, 4)], warmup_steps=1)
    for step in range(8):
        inputs, targets, rows = part((*batch(step), torch.arange(16)), rank, 8)
        if reweighter is not None:
            if step == 4:
                assert "reverse mode" in reweighter.check((inputs, targets, rows))
            reweighter.step((inputs, targets, rows))
            continue
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return model.state_dict(), optimizer.state_dict()


class Equal(nn.Module):
    def forward(self, samples):
        return torch.full_like(samples.losses, 0.3)


def test_equal_weights_are_plain_training_bit_for_bit():
    assert_same(in_ranks(2, plain, True), in_ranks(2, plain, False))


def stream(rank, sharpness, trim):
    """The margin splitter's stream, while nothing else depends on what it draws."""
    model = classifier()
    network = wrapped(rank, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    splitter = MarginSplitter(sharpness, trim)
    buffer = ValidationBuffer(splitter=splitter, fraction=0.3)
    reweighter = MetaReweighter(network, optimizer, validation=buffer, warmup_steps=0, every=1000)
    inputs, targets = batch(0, 48)
    for step in range(6):
        (rows,) = part((torch.arange(16) + 16 * (step % 3),), rank, 11)
        optimizer.zero_grad()
        reweighter.loss(network(inputs[rows]), targets[rows], rows).backward()
        optimizer.step()
    table = reweighter.history.table()
    rest = (
        splitter.state_dict(),
        model.state_dict(),
        {n: c for n, c in table.items() if n not in ("sent", "held_out")},
    )
    return rest, table["sent"], len(buffer)


@pytest.mark.parametrize(("sharpness", "trim"), [(1.0, 0.0), (2.0, 0.1)])
def test_the_margin_splitter_sees_the_whole_stream(sharpness, trim):
    whole, _, _ = stream(None, sharpness, trim)
    first, second = in_ranks(2, stream, sharpness, trim)
    assert_same(first[:2], second[:2])  # every rank knows what the other has sent
    assert_same(first[0], whole, rtol=1e-9, atol=1e-11)
    assert whole[0]["stream"][0] > 0
    assert min(first[2], second[2]) >= 2


def buffers(rank, splitter, hold_out):
    """MOLERE with a buffer for each rank."""
    network = DistributedDataParallel(classifier())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    buffer = ValidationBuffer(splitter=splitter(), fraction=0.25, hold_out=hold_out, lr=0.05)
    start = copy.deepcopy(buffer.splitter.state_dict())
    reweighter = MetaReweighter(network, optimizer, validation=buffer, warmup_steps=3, every=2)
    sent = [int(reweighter.step(part(batch(step, 40), rank, 20)).val_mask.sum()) for step in range(30)]
    networks = (network.state_dict(), reweighter.weighting.state_dict(), buffer.splitter.state_dict())
    moved = any(not torch.equal(value, start[name]) for name, value in networks[2].items())
    return networks, sent, buffer.store.class_counts(), reweighter.engine, moved, reweighter.meta_updates


@pytest.mark.parametrize(("splitter", "hold_out"), [(LearnedSplitter, True), (MarginSplitter, False)])
def test_networks_stay_the_same_on_all_ranks_with_buffers_of_their_own(splitter, hold_out):
    first, second = in_ranks(2, buffers, splitter, hold_out)
    assert_same(first[0], second[0])
    assert first[3:] == second[3:] == ("finite", True, 14)
    assert first[1] != second[1]
    # Together they keep to δ = 1/4 of 40 rows a step.
    assert 0.5 * 0.25 * 1200 - 40 <= sum(first[1]) + sum(second[1]) <= 1.5 * 0.25 * 1200 + 2
    if splitter is LearnedSplitter:  # ... and no class exceeds its share of the stream by much
        together = torch.tensor([first[2].get(label, 0) + second[2].get(label, 0) for label in range(3)])
        expected = torch.cat([batch(step, 40)[1] for step in range(30)]).bincount() / 1200
        assert together.sum() > 100
        assert (together / together.sum() < 1.3 * expected).all()


def passed_around(rank, padded):
    """Rows that change between ranks at every epoch: after each step, what each trained on, sent and holds."""
    number = dist.get_world_size()
    network = DistributedDataParallel(classifier())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    buffer = ValidationBuffer(splitter=RandomSplitter(0.2, seed=1), fraction=0.2, hold_out=True)
    reweighter = MetaReweighter(network, optimizer, validation=buffer, warmup_steps=4, every=2)
    inputs, targets = batch(0, 60)
    dataset = torch.utils.data.TensorDataset(inputs[: 59 if padded else 60])
    sampler = torch.utils.data.DistributedSampler(dataset, number, rank)
    steps = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler))
        # With the padding, the row that comes twice comes in the same step.
        for rows in [torch.cat([order[:5], order[-5:]]), *order[5:-5].split(10)]:
            result = reweighter.step((inputs[rows], targets[rows], rows))
            trained, sent = set(rows[~result.held_out].tolist()), set(rows[result.val_mask].tolist())
            steps.append((rows.tolist(), trained, sent, set(buffer.store.rows)))
            assert not bool((result.held_out & (result.weights != 0)).any())
    return steps, reweighter.history.table()


@pytest.mark.parametrize(("number", "padded"), [(2, False), (2, True), (3, False)])
def test_a_row_sent_by_one_rank_is_trained_on_by_none_in_that_step(number, padded):
    ranks_steps, tables = zip(*in_ranks(number, passed_around, padded), strict=True)
    moved = twice = 0
    holders, seen, sent_often, held_often = {}, {}, {}, {}
    for step in zip(*ranks_steps, strict=True):
        rows, trained, sent, held = zip(*step, strict=True)
        everyone = [row for own in rows for row in own]
        everyone_sent = set().union(*sent)
        assert not everyone_sent & set().union(*trained)
        doubles = {row for row in everyone if everyone.count(row) > 1}
        twice += len(doubles & everyone_sent)
        for own_rows, own_sent, own_trained in zip(rows, sent, trained, strict=True):
            for row in own_rows:
                seen[row] = seen.get(row, 0) + 1
                sent_often[row] = sent_often.get(row, 0) + (row in own_sent)
                held_often[row] = held_often.get(row, 0) + (row not in own_trained)
        for rank in range(number):
            assert sent[rank] - set().union(*sent[:rank]) <= held[rank]
            for row in held[rank]:
                moved += holders.get(row, rank) != rank
                holders[row] = rank
            # What another rank trains on or sends has left, unless fewer than two would have stayed; of several that
            # send a row the first keeps it.
            elsewhere = (set(everyone) - sent[rank]) | set().union(*sent[:rank])
            assert len(held[rank]) <= 2 or not held[rank] & elsewhere
    assert moved > 0
    assert bool(twice) == padded
    for table in tables:  # every rank has the history of all
        assert_same(table, tables[0])
        rows = table["row"].tolist()
        assert rows == sorted(seen)
        for name, counts in (("seen", seen), ("sent", sent_often), ("held_out", held_often)):
            expected = torch.tensor([counts[row] for row in rows]).float()
            found = table[name] if name == "seen" else table[name] * table["seen"]
            assert_same(found.float(), expected, rtol=1e-5, atol=1e-5)


def splitter_gradients(rank):
    """Of Θ, from validation instances and a batch that the ranks have parts of."""
    torch.manual_seed(3)
    splitter = LearnedSplitter(("loss", "margin")).double()
    for parameter in splitter.parameters():
        nn.init.normal_(parameter, std=0.5)
    validation, training = (samples_of(batch(i, size), rank, cut) for i, (size, cut) in enumerate([(9, 4), (14, 6)]))
    loss, p = splitter_loss(splitter, validation, training, 0.2)
    parameters = list(splitter.parameters())
    return loss.detach(), p, summed_gradients(torch.autograd.grad(loss, parameters))


def samples_of(whole, rank, cut):
    inputs, targets = part(whole, rank, cut)
    outputs = inputs[:, :3]
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    correct, margins = outputs.argmax(dim=1) == targets, torch.tanh(outputs[:, 0])
    memory = (losses, margins, torch.zeros_like(losses), torch.zeros_like(correct))
    return Samples(((inputs,), {}), targets, outputs, losses, correct, targets, margins, *memory)


def test_the_splitter_learns_from_the_instances_of_all_ranks():
    loss, p, gradients = splitter_gradients(None)
    first, second = in_ranks(2, splitter_gradients)
    for rank in (first, second):
        assert_same((rank[0], rank[2]), (loss, gradients), rtol=1e-9, atol=1e-12)
    assert_same(torch.cat([first[1], second[1]]), p, rtol=1e-9, atol=1e-12)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3


def refused(rank):
    """A loss or weight that is not finite on one rank is refused on both, which then go on."""
    network = DistributedDataParallel(classifier())
    weighting = Switched()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    reweighter = MetaReweighter(network, optimizer, weighting=weighting, warmup_steps=1, every=1)
    for step in range(3):
        reweighter.step(part((*batch(step, 40), torch.arange(40)), rank, 20))
    before = copy.deepcopy((network.state_dict(), reweighter.state_dict()))
    x, y, rows = part((*batch(3, 40), torch.arange(40)), rank, 20)
    x[3] = x[3] * torch.nan if rank == 1 else x[3]
    messages = []
    with pytest.raises(FloatingPointError) as error:
        reweighter.step((x, y, rows))
    messages.append(str(error.value))
    weighting.wrong = rank == 0
    with pytest.raises(ValueError, match="finite weights") as error:
        reweighter.step(part((*batch(3, 40), torch.arange(40)), rank, 20))
    messages.append(str(error.value))
    assert_same((network.state_dict(), reweighter.state_dict()), before)
    weighting.wrong = False
    reweighter.step(part((*batch(3, 40), torch.arange(40)), rank, 20))
    assert reweighter.meta_updates == 3
    return messages, network.state_dict(), weighting.state_dict()


class Switched(SignalWeighting):
    wrong = False

    def forward(self, samples):
        return super().forward(samples) * (-1.0 if self.wrong else 1.0)


def test_what_one_rank_refuses_all_refuse_and_can_go_on():
    first, second = in_ranks(2, refused)
    assert_same(first, second)
    assert "instances [3] of rank 1;" in first[0][0]


def fails(rank, when):
    """One rank ends in a step; the other one's step fails, and leaves its model and reweighter as they were."""
    model = classifier()
    network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = Ending([batch(100, 6)] * 4)
    reweighter = MetaReweighter(network, optimizer, validation=validation, warmup_steps=1, every=1)
    for step in range(2):
        reweighter.step(part((*batch(step), torch.arange(16)), rank, 8))
    before = copy.deepcopy((model.state_dict(), {**reweighter.state_dict(), "rank": None}, optimizer.state_dict()))
    parameters = list(model.parameters())
    validation.ends = rank == 1 and when == "meta-update"
    error = ""
    try:
        if rank == 1 and when == "forward":
            raise EndedError
        reweighter.step(part((*batch(2), torch.arange(16)), rank, 8))
    except Exception as raised:
        error = type(raised).__name__
    dist.destroy_process_group()  # what the end of a process does
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same((model.state_dict(), {**reweighter.state_dict(), "rank": None}, optimizer.state_dict()), before)
    return error


class EndedError(Exception):
    pass


class Ending(list):
    """Validation batches that cannot be read any more."""

    ends = False

    def __iter__(self):
        for item in super().__iter__():
            if self.ends:
                raise EndedError
            yield item


@pytest.mark.parametrize("when", ["forward", "meta-update"])
def test_a_rank_that_fails_leaves_the_others_unchanged(when):
    first, second = in_ranks(2, fails, when)
    assert first == "RuntimeError"  # "Connection closed by peer"
    assert second == "EndedError"


def foreign(rank):
    """The state of another rank, or of another number of ranks, is refused; one's own is taken."""
    network = DistributedDataParallel(classifier())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    reweighter = MetaReweighter(network, optimizer, warmup_steps=1, every=1)
    for step in range(4):
        reweighter.step(part((*batch(step, 40), torch.arange(40)), rank, 20))
    own = copy.deepcopy(reweighter.state_dict())
    states = [None, None]
    dist.all_gather_object(states, own)
    with pytest.raises(ValueError, match=r"each rank loads its own.*DistributedState"):
        reweighter.load_state_dict(states[1 - rank])
    with pytest.raises(ValueError, match=rf"\[{rank}, 3\].* here is rank {rank} of 2"):
        reweighter.load_state_dict({**own, "rank": [rank, 3]})
    assert_same(reweighter.state_dict(), own)
    reweighter.load_state_dict(states[rank])
    assert_same(reweighter.state_dict(), own)
    return own


def test_the_state_of_another_rank_is_refused():
    first, second = in_ranks(2, foreign)
    alone = classifier()
    reweighter = MetaReweighter(alone, torch.optim.SGD(alone.parameters(), lr=0.1), warmup_steps=1, every=1)
    for state in (first, second):
        with pytest.raises(ValueError, match="rank"):
            reweighter.load_state_dict(state)


def without_indices(rank):
    """The last batches have no rows of one rank's class; nothing is known by rows."""
    network = wrapped(rank, classifier())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    validation = [part(batch(100, 10), rank, 6)]
    weighting = weighting_of("signals", rank)
    options = {"hypergradient": "forward", "validation": validation, "weighting": weighting}
    reweighter = MetaReweighter(network, optimizer, warmup_steps=1, every=2, **options)
    for step in range(6):
        inputs, targets = part(batch(step, 11 if step == 5 else 16), rank, 3 + step)
        optimizer.zero_grad()
        reweighter.loss(network(inputs), targets).backward()
        optimizer.step()
    assert len(reweighter.history) == 0
    model = network if rank is None else network.module
    return model.state_dict(), weighting.state_dict()


def test_without_indices():
    whole = without_indices(None)
    first, second = in_ranks(2, without_indices)
    assert_same(first, second)
    assert_same(first, whole, rtol=1e-8, atol=1e-10)


def test_one_rank_sends_nothing():
    x = torch.arange(3.0)
    assert ranks() == 1
    assert gathered(x)[0] is x
    assert averaged([x, None], 1.0) == [x, None]
    assert summed([x]) == [x]
    assert anywhere(True, x.device)
    assert not anywhere(False, x.device)


def collectives(rank):
    x = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    whole, own = gathered(x)
    known, also = gathered(x, [1, 2])
    assert_same((known, also), (whole, own))
    whole.sum().backward()
    assert_same(x.grad, torch.ones(rank + 1, 2))
    mean = averaged([torch.tensor([float(rank)]), None, torch.tensor(2.0 * rank, dtype=torch.double)], rank + 1)
    total = summed([torch.tensor([rank]), torch.tensor(1.5)])
    assert anywhere(rank == 1, x.device)
    assert not anywhere(False, x.device)
    return whole.detach(), own, mean, total


def test_collectives():
    expected = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    for rank, (whole, own, mean, total) in enumerate(in_ranks(2, collectives)):
        assert_same(whole, expected)
        assert own == (slice(0, 1), slice(1, 3))[rank]
        # (1 · 0 + 2 · 1) / 3
        assert math.isclose(mean[0].item(), 2 / 3, rel_tol=1e-6)
        assert mean[1] is None
        assert math.isclose(mean[2].item(), 4 / 3, rel_tol=1e-12)
        assert_same(total, [torch.tensor([1]), torch.tensor(3.0)])

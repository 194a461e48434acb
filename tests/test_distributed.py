"""Two processes with half a batch each are one process with the whole batch (gloo on the CPU)."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes
from same import assert_same
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_molere import FreeWeighting, MetaReweighter, SignalWeighting

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 5, generator=generator, dtype=torch.double), torch.randint(3, (size,), generator=generator)


def part(tensors, rank, cut):
    """What a rank has of a batch; ``cut`` rows go to the first, the others to the second."""
    rows = {None: slice(None), 0: slice(0, cut), 1: slice(cut, None)}[rank]
    return tuple(tensor[rows] for tensor in tensors)


def reweighted(network, optimizer, weighting, rank, **options):
    """A reweighter with a fixed validation set; ranks other than the first start from other weightings than its."""
    torch.manual_seed(5 + (rank or 0))
    for parameter in weighting.parameters():
        nn.init.normal_(parameter)
    validation = [part(batch(100 + i, 10), rank, 6) for i in range(2)]
    settings = {"weighting_lr": 0.05, "validation": validation, "warmup_steps": 2, "every": 2, **options}
    return MetaReweighter(network, optimizer, weighting=weighting, **settings)


def train(rank, cut, **options):
    """Seven steps with a fixed validation set; rank None is one process with everything."""
    model = classifier()
    network = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    weighting = {"signals": lambda: SignalWeighting(("loss", "margin")), "free": lambda: FreeWeighting(16)}[
        options.pop("phi")
    ]().double()
    reweighter = reweighted(network, optimizer, weighting, rank, **options)
    weights = []
    for step in range(7):
        x, y, rows = part((*batch(step), torch.arange(16)), rank, cut)
        if rank is None or cut == 8:
            weights.append(reweighter.step((x, y, rows)).weights)
        else:  # uneven parts: DDP's mean of the ranks is what ``loss`` is made for, too
            optimizer.zero_grad()
            reweighter.loss(network(x), y, rows).backward()
            optimizer.step()
            weights.append(reweighter.result.weights)
    return model.state_dict(), weighting.state_dict(), weights, reweighter.result.val_loss, reweighter.engine


def held_out(rank):
    """MOLERE with a buffer for each rank."""
    network = DistributedDataParallel(classifier())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    options = {"warmup_steps": 3, "every": 2, "val_fraction": 0.25, "splitter_lr": 0.05, "hold_out": True}
    reweighter = MetaReweighter(network, optimizer, **options)
    sent = []
    for step in range(40):
        result = reweighter.step(part(batch(step, 40), rank, 20))
        sent.append(int(result.val_mask.sum()))
    networks = (network.state_dict(), reweighter.weighting.state_dict(), reweighter.splitter.state_dict())
    return networks, sent, reweighter.buffer.class_counts(), reweighter.engine


def passed_around(rank, buffer_size):
    """Rows that change between processes at every epoch: after each step, what each trained on and holds."""
    network = DistributedDataParallel(classifier())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    options = {"warmup_steps": 4, "every": 2, "val_fraction": 0.2, "splitter_lr": 0.05, "hold_out": True}
    reweighter = MetaReweighter(network, optimizer, buffer_size=buffer_size, **options)
    inputs, targets = batch(0, 60)
    steps, seen, sent = [], {}, {}
    for epoch in range(6):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        for rows in order[rank :: dist.get_world_size()].split(10):
            reweighter.optimizer.zero_grad()
            reweighter.loss(network(inputs[rows]), targets[rows], rows).backward()
            held = set(reweighter.buffer.rows)  # before this step's meta-update releases some
            elsewhere = {row for row in range(60) if row in reweighter.holdout.elsewhere}
            optimizer.step()
            mask = reweighter.result.val_mask
            for row, held_out in zip(rows.tolist(), mask.tolist(), strict=True):
                seen[row] = seen.get(row, 0) + 1
                sent[row] = sent.get(row, 0) + held_out
            steps.append((set(rows[~mask].tolist()), set(rows[mask].tolist()), held, elsewhere))
    table = reweighter.history.together().table()
    return steps, seen, sent, table


def refused(rank):
    """A loss that is not finite on one rank is refused on both."""
    network = DistributedDataParallel(classifier())
    reweighter = MetaReweighter(network, torch.optim.SGD(network.parameters(), lr=0.1), warmup_steps=0)
    before = copy.deepcopy(network.state_dict())
    x, y = part(batch(0), rank, 8)
    if rank == 1:
        x = x * torch.nan
    with pytest.raises(FloatingPointError, match="instances"):
        reweighter.step((x, y))
    assert_same(network.state_dict(), before)
    return True


@pytest.mark.parametrize(
    ("order", "engine", "phi", "cut"),
    [
        ("after", "forward", "signals", 8),
        ("after", "finite", "signals", 11),
        ("before", "forward", "free", 8),
        ("before", "auto", "signals", 8),
        ("after", "auto", "free", 8),
    ],
)
def test_two_halves_are_a_whole(order, engine, phi, cut):
    options = {"order": order, "hypergradient": engine, "phi": phi}
    whole = train(None, cut, **options)
    first, second = in_processes(2, train, cut, **options)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if engine == "forward" else {"rtol": 1e-5, "atol": 1e-7}
    for rank in (first, second):
        assert_same(rank[:2], whole[:2], **tolerance)
        assert_same(rank[3], whole[3], **tolerance)
        assert rank[4] == whole[4]
    assert_same(first[1], second[1])
    for a, b, both in zip(first[2], second[2], whole[2], strict=True):
        assert_same(torch.cat([a, b]), both, **tolerance)


def test_networks_stay_the_same_on_all_ranks_with_buffers_of_their_own():
    (first, sent, held, engine), (second, also_sent, also_held, also_engine) = in_processes(2, held_out)
    assert_same(first, second)
    assert engine == also_engine == "finite"
    # Together they keep to δ = 1/4 of 40 rows a step, and to the classes of the stream.
    assert 0.5 * 0.25 * 1600 - 40 <= sum(sent) + sum(also_sent) <= 1.5 * 0.25 * 1600 + 2
    together = torch.tensor([held[label] + also_held[label] for label in range(3)])
    stream = torch.cat([batch(step, 40)[1] for step in range(40)]).bincount() / 1600
    assert together.sum() > 100
    assert ((together / together.sum() - stream).abs() < 0.3 * stream).all()


@pytest.mark.parametrize(("number", "buffer_size"), [(2, 2048), (3, 2048), (2, 7)])
def test_a_row_held_by_one_process_is_trained_on_by_none(number, buffer_size):
    """... and held by none but that one, whichever of them the sampler hands it to."""
    ranks, seen, held_out, tables = zip(*in_processes(number, passed_around, buffer_size), strict=True)
    moved = 0
    holders = {}
    for step in zip(*ranks, strict=True):
        trained, sent, held, elsewhere = zip(*step, strict=True)
        union = set().union(*held)
        assert not union & set().union(*trained)
        assert len(union) == sum(map(len, held)) <= buffer_size + number
        for rank in range(number):
            assert sent[rank] <= held[rank] or buffer_size < 60
            assert elsewhere[rank] == union - held[rank]
            for row in held[rank]:
                moved += holders.get(row, rank) != rank
                holders[row] = rank
        # Some are held that were not in this step's batches: membership survives epochs.
    assert moved > 0
    assert any(step[2] - step[1] for step in ranks[0])
    for table in tables:  # what the history tells of all processes
        assert table["row"].tolist() == list(range(60))
        assert table["seen"].tolist() == [sum(own.get(row, 0) for own in seen) for row in range(60)]
        often = [sum(own.get(row, 0) for own in held_out) for row in range(60)]
        assert_same(table["held_out"] * table["seen"], torch.tensor(often).float(), rtol=1e-6, atol=0)


def test_a_loss_refused_by_one_rank_is_refused_by_all():
    assert in_processes(2, refused) == [True, True]


def test_one_process_divides_and_gathers_nothing():
    from torch_molere.distributed import anywhere, averaged, gathered, processes

    x = torch.arange(3.0)
    assert processes() == 1
    assert gathered(x)[0] is x
    assert averaged([x, None], 1.0) == [x, None]
    assert anywhere(True, x.device)
    assert not anywhere(False, x.device)

"""Models sharded by FSDP2 over two ranks (gloo on the CPU): two halves are a whole here too."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from same import assert_same
from test_ddp import Equal, batch, part, weighting_of
from torch import nn

from torch_molere import LearnedSplitter, MetaReweighter, ValidationBuffer, hypergradient
from torch_molere.distributed import fsdp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
}


def classifier(norm=nn.LayerNorm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), norm(8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3)).double()


def sharded(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def values(model):
    """The full parameters and the buffers."""
    return {name: fsdp.full(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def train(rank, cut, name, engine="finite", clip=None, accumulate=False, steps=7):
    """Steps with a fixed validation set; rank None is one process with everything."""
    model = classifier()  # batch norm's statistics are those of a rank
    if rank is not None:
        sharded(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    weighting = weighting_of("signals", rank)
    validation = [part(batch(100 + i, 10), rank, 6) for i in range(2)]
    options = {"weighting_lr": 0.05, "validation": validation, "warmup_steps": 2, "every": 2, "hypergradient": engine}
    reweighter = MetaReweighter(model, optimizer, weighting=weighting, **options)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2 if accumulate else 1):
            size = 12 if step % 3 == 2 else 16
            inputs, targets = batch(step + 100 * micro, size)
            rows = torch.arange(size) + 16 * (step % 3)
            inputs, targets, rows = part((inputs, targets, rows), rank, min(cut, size - 3))
            reweighter.loss(model(inputs), targets, rows).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        result = reweighter.result
        found.append((result.weights, result.meta_gradient, result.val_loss))
    return {
        "model": values(model),
        "weighting": weighting.state_dict(),
        "history": reweighter.history.table(),
        "engine": reweighter.engine,
        "steps": found,
        "error": reweighter.engines.found.error,
        "repeats": reweighter.engines.found.repeats,
    }


@pytest.mark.parametrize(
    ("name", "cut", "options"),
    [
        ("sgd", 8, {"engine": "auto"}),
        ("sgd", 11, {}),
        ("adam", 8, {}),
        ("adamw", 8, {"clip": 0.05}),
        ("nadam", 8, {}),
        ("sgd", 5, {"accumulate": True}),
    ],
    ids=str,
)
def test_two_halves_are_a_whole(name, cut, options):
    whole = train(None, cut, name, **{**options, "engine": "finite"})
    first, second = in_ranks(2, train, cut, name, **options)
    assert_same(first["weighting"], second["weighting"])
    assert_same(first["history"], second["history"])
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    for rank in (first, second):
        for part_of in ("model", "weighting", "history"):
            assert_same(rank[part_of], whole[part_of], **tolerance)
        assert rank["engine"] == "finite"
        assert 0.0 < rank["error"] < 1e-3  # against the gradients that backward left
        assert rank["repeats"]
    for mine, yours, both in zip(first["steps"], second["steps"], whole["steps"], strict=True):
        assert_same((mine[2], yours[2]), (both[2], both[2]), **tolerance)
        if not options.get("accumulate"):  # there the ranks' instances come in another order
            assert_same(torch.cat([mine[0], yours[0]]), both[0], **tolerance)
            if both[1] is not None:
                assert_same(torch.cat([mine[1], yours[1]]), both[1], **tolerance)


def undisturbed(rank):
    """A meta-update leaves parameters, batch-norm statistics, gradients and the random stream as they were: with equal
    weights training is bit-equal to FSDP2 without a reweighter."""
    found = []
    for wrapped in (False, True):
        model = sharded(classifier(nn.BatchNorm1d))
        model[3].p = 0.3
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        torch.manual_seed(rank)
        validation = [part(batch(100, 10), rank, 6)]
        reweighter = MetaReweighter(model, optimizer, weighting=Equal(), validation=validation, warmup_steps=1, every=1)
        if not wrapped:
            reweighter.close()
        for step in range(5):
            inputs, targets = part(batch(step), rank, 8)
            if wrapped:
                if step == 2:
                    assert "engine: 'finite'" in reweighter.check((inputs, targets))
                assert reweighter.step((inputs, targets)).val_loss is not None or step == 0
            else:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        gradients = {name: p.grad.to_local() for name, p in model.named_parameters()}
        state = [entry["exp_avg"].to_local() for entry in optimizer.state.values()]
        found.append((values(model), gradients, state, torch.get_rng_state()))
    assert_same(found[0], found[1])
    return True


hidden = torch.Generator()


class Noisy(nn.Module):
    """Draws from a generator that no replay can know of."""

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=hidden, dtype=x.dtype) > 0.3)


class Reversed(torch.autograd.Function):
    """The same forward, another backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


class Reversal(nn.Module):
    def forward(self, x):
        return Reversed.apply(x)


def wrong(rank, kind):
    """A replay that is not the training forward is found by the gradients that backward leaves; nothing has changed."""
    model = classifier()
    model[2] = nn.Sequential(nn.Tanh(), kind())
    sharded(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    reweighter = MetaReweighter(model, optimizer, validation=[part(batch(100, 10), rank, 6)], warmup_steps=1, every=1)
    reweighter.step(part(batch(0), rank, 8))
    before = copy.deepcopy((values(model), {n: p.detach().clone() for n, p in reweighter.weighting.named_parameters()}))
    with pytest.raises(RuntimeError, match=r"finds no engine that agrees with the model's own backward") as error:
        reweighter.step(part(batch(1), rank, 8))
    assert_same((values(model), dict(reweighter.weighting.named_parameters())), before)
    return str(error.value)


@pytest.mark.parametrize(("kind", "cause"), [(Noisy, "does not repeat"), (Reversal, "'finite' is")])
def test_the_reverse_mode_check_finds_a_wrong_replay(kind, cause):
    for message in in_ranks(2, wrong, kind):
        assert cause in message


class Steep(nn.Module):
    def forward(self, x):
        return torch.exp(250 * x)


def curved(rank):
    """Where a one-sided difference is too rough in single precision, one from both sides takes its place."""
    model = classifier().float()
    model[1], model[2] = nn.Identity(), Steep()
    with torch.no_grad():
        for parameter, size in zip(model.parameters(), (0.02, 0.02, 0.1, 1.0), strict=True):
            parameter.mul_(size)
    sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    inputs, targets = part(batch(0), rank, 8)
    inputs = inputs.float()
    reweighter = MetaReweighter(model, optimizer, validation=[(inputs, targets)], warmup_steps=0, every=1)
    assert reweighter.step((inputs, targets)).meta_gradient is not None
    return reweighter.engines.found.repeats, reweighter.engines.found.error


def test_a_difference_from_both_sides_where_it_has_to_be():
    for repeats, error in in_ranks(2, curved):
        assert not repeats
        assert error < 0.01


def refused(rank):
    """What cannot be right is refused, and says what to do."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded(classifier())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for engine in ("forward", "reverse"):
        with pytest.raises(ValueError, match=rf"hypergradient='{engine}' cannot serve.*use 'finite'"):
            MetaReweighter(model, optimizer, hypergradient=engine)
    with pytest.raises(ValueError, match=r"order='before' cannot serve.*use 'after'"):
        MetaReweighter(model, optimizer, order="before")
    with pytest.raises(TypeError, match="sharded by FSDP2"):
        hypergradient(model, optimizer, batch(0), batch(1), torch.ones(16))
    reduced = sharded(classifier(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"param_dtype=torch.bfloat16.*use torch.autocast"):
        MetaReweighter(reduced, OPTIMIZERS["sgd"](reduced.parameters()))

    reweighter = MetaReweighter(model, optimizer, warmup_steps=0)
    before = copy.deepcopy(values(model))
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="accumulate with the synchronisation on"):
        reweighter.step(part(batch(0), rank, 8))
    assert_same(values(model), before)
    model.set_requires_gradient_sync(True)
    assert reweighter.step(part(batch(0), rank, 8)).loss > 0
    return True


def held_out(rank):
    """MOLERE on a sharded model: φ and Θ stay the same on all ranks."""
    model = sharded(classifier())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    buffer = ValidationBuffer(splitter=LearnedSplitter(), fraction=0.25, hold_out=True, lr=0.05)
    start = copy.deepcopy(buffer.splitter.state_dict())
    reweighter = MetaReweighter(model, optimizer, validation=buffer, warmup_steps=3, every=2)
    for step in range(12):
        rows = torch.arange(40)
        reweighter.step(part((*batch(step, 40), rows), rank, 20))
    moved = any(not torch.equal(start[name], value) for name, value in buffer.splitter.state_dict().items())
    return reweighter.weighting.state_dict(), buffer.splitter.state_dict(), moved, len(buffer), reweighter.meta_updates


@pytest.mark.parametrize("function", [undisturbed, refused])
def test_in_each_rank(function):
    assert in_ranks(2, function) == [True, True]


def test_networks_stay_the_same_on_all_ranks():
    first, second = in_ranks(2, held_out)
    assert_same(first[:2], second[:2])
    assert first[2]
    assert min(first[3], second[3]) >= 2
    assert first[4] == second[4] == 5


def test_a_model_that_is_not_sharded_is_known():
    model = classifier()
    assert not fsdp.is_sharded(model)
    assert fsdp.full(model[0].weight) is model[0].weight
    fsdp.check_sharded(model, "forward", "before")
    fsdp.check_synchronised(model)

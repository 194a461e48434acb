"""FSDP2: two processes with half a batch and half of each parameter are one process with the whole (gloo, CPU)."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import in_processes
from same import assert_same
from test_distributed import batch, part, reweighted
from torch import nn

from torch_molere import MetaReweighter, SignalWeighting, hypergradient

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
}


def classifier(norm):
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
    from torch_molere.sharded import full

    return {name: full(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def train(rank, cut, name, engine):
    """Seven steps with a fixed validation set; rank None is one process with everything."""
    model = classifier(nn.LayerNorm)  # batch norm's statistics are those of a rank
    if rank is not None:
        sharded(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    weighting = SignalWeighting(("loss", "margin")).double()
    reweighter = reweighted(model, optimizer, weighting, rank, hypergradient=engine)
    weights = []
    for step in range(7):
        inputs, targets = part(batch(step), rank, cut)
        weights.append(reweighter.step((inputs, targets)).weights)
    return values(model), weighting.state_dict(), weights, reweighter.result.val_loss, reweighter.engine


@pytest.mark.parametrize(
    ("name", "engine", "cut"),
    [
        ("sgd", "auto", 8),
        ("sgd", "finite", 11),
        ("adam", "finite", 8),
        ("adamw", "finite", 8),
        ("nadam", "finite", 8),
    ],
)
def test_two_halves_are_a_whole(name, engine, cut):
    whole = train(None, cut, name, "finite")
    first, second = in_processes(2, train, cut, name, engine)
    assert_same(first[:2], second[:2])
    for rank in (first, second):
        assert_same(rank[0], whole[0], rtol=1e-5, atol=1e-7)
        assert_same(rank[1], whole[1], rtol=1e-5, atol=1e-7)
        assert_same(rank[3], whole[3], rtol=1e-5, atol=1e-7)
        assert rank[4] == "finite"
    for a, b, both in zip(first[2], second[2], whole[2], strict=True):
        assert_same(torch.cat([a, b]), both, rtol=1e-5, atol=1e-7)


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


class Equal(nn.Module):
    def forward(self, samples):
        return torch.ones_like(samples.losses)


def refused(rank):
    """What cannot be right is refused, and says what to do."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded(classifier(nn.LayerNorm))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match=r"hypergradient='forward' cannot serve.*use 'finite'"):
        MetaReweighter(model, optimizer, hypergradient="forward")
    with pytest.raises(ValueError, match=r"order='before' cannot serve.*use 'after'"):
        MetaReweighter(model, optimizer, order="before")
    with pytest.raises(TypeError, match="sharded by FSDP2"):
        hypergradient(model, optimizer, batch(0), batch(1), torch.ones(16))
    reduced = sharded(classifier(nn.LayerNorm), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
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
    model = sharded(classifier(nn.LayerNorm))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    reweighter = MetaReweighter(model, optimizer, warmup_steps=3, every=2, val_fraction=0.25, splitter_lr=0.05)
    start = copy.deepcopy(reweighter.splitter.state_dict())
    for step in range(12):
        reweighter.step(part(batch(step, 40), rank, 20))
    moved = any(not torch.equal(start[name], value) for name, value in reweighter.splitter.state_dict().items())
    return reweighter.weighting.state_dict(), reweighter.splitter.state_dict(), moved, len(reweighter.buffer)


@pytest.mark.parametrize("function", [undisturbed, refused])
def test_in_each_process(function):
    assert in_processes(2, function) == [True, True]


def test_networks_stay_the_same_on_all_ranks():
    first, second = in_processes(2, held_out)
    assert_same(first[:2], second[:2])
    assert first[2]
    assert min(first[3], second[3]) > 0


def test_a_model_that_is_not_sharded_is_known():
    from torch_molere.sharded import check_sharded, check_synchronised, full, is_sharded

    model = classifier(nn.LayerNorm)
    assert not is_sharded(model)
    assert full(model[0].weight) is model[0].weight
    check_sharded(model, "forward", "before")
    check_synchronised(model)

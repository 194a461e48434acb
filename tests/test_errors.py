"""Bad input: a clear error that names the argument, and nothing changed."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import FreeWeighting, InputWeighting, LearnedSplitter, MetaReweighter, RandomSplitter, SignalWeighting
from torch_molere import hypergradient as hypergradient_of


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def make(**options):
    model = classifier()
    return MetaReweighter(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **{"warmup_steps": 0, "every": 1} | options
    )


def batch(size=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


MODEL = classifier()
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch.optim.Optimizer, got float"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=1)}, ValueError, "optimizer holds none of the model's"),
        ({"optimizer": torch.optim.LBFGS(MODEL.parameters())}, TypeError, "LBFGS cannot be differentiated"),
        ({"optimizer": torch.optim.SparseAdam(MODEL.parameters())}, TypeError, "SparseAdam cannot be differentiated"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn must be callable, got str"),
        ({"correct_fn": 3}, TypeError, "correct_fn must be callable, got int"),
        ({"weighting": lambda s: s}, TypeError, "weighting must be a torch.nn.Module, got function"),
        ({"splitter": "hard"}, TypeError, "splitter must be a torch.nn.Module, got str"),
        ({"splitter": RandomSplitter(), "validation": [1]}, ValueError, "splitter and validation exclude each other"),
        ({"validation": 7}, TypeError, "validation must be an iterable of batches, got int"),
        ({"validation": iter([1])}, TypeError, "one-pass iterator list_iterator"),
        ({"validation": []}, ValueError, "validation is empty"),
        ({"hypergradient": "exact"}, ValueError, "hypergradient must be one of .* got 'exact'"),
        ({"order": "during"}, ValueError, "order must be 'after' or 'before', got 'during'"),
        ({"val_fraction": 0.0}, ValueError, r"val_fraction must lie in \(0, 1\), got 0.0"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction must lie in \(0, 1\), got 1.0"),
        ({"hold_out": "no"}, ValueError, "hold_out must be True, False or 'auto', got 'no'"),
        ({"val_loss_fn": 1}, TypeError, "val_loss_fn must be callable, got int"),
        ({"every": 0}, ValueError, "every must be an integer ≥ 1, got 0"),
        ({"every": 2.5}, ValueError, "every must be an integer ≥ 1, got 2.5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be an integer ≥ 0, got -1"),
        ({"val_batch_size": 0}, ValueError, "val_batch_size must be an integer ≥ 1, got 0"),
        ({"buffer_size": 0}, ValueError, "buffer_size must be a positive number of samples, got 0"),
        ({"buffer_bytes": 0}, ValueError, "buffer_bytes must be a positive number of bytes, got 0"),
    ],
)
def test_construction(change, error, message):
    hooks = len(MODEL._forward_pre_hooks)
    with pytest.raises(error, match=message):
        MetaReweighter(**{"model": MODEL, "optimizer": OPTIMIZER} | change)
    assert len(MODEL._forward_pre_hooks) == hooks


def test_unrolled_needs_an_optimizer_that_higher_has():
    with pytest.raises(TypeError, match="AdamW"):
        MetaReweighter(MODEL, torch.optim.AdamW(MODEL.parameters()), hypergradient="unrolled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "exact"}, "engine must be one of"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2}, "steps=2 needs engine='unrolled', got engine='auto'"),
        ({"weights": torch.ones(9)}, r"weights must be floating \(10,\), got \(9,\)"),
        ({"weights": torch.ones(10).long()}, "weights must be floating"),
    ],
)
def test_hypergradient(change, message):
    with pytest.raises(ValueError, match=message):
        hypergradient_of(MODEL, OPTIMIZER, batch(), batch(), **{"weights": torch.ones(10)} | change)


TOKENS = (torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize(
    ("options", "given", "error", "message"),
    [
        ({}, torch.ones(3), TypeError, r"batch must be \(inputs, targets\) .* got Tensor"),
        ({}, batch()[:1], TypeError, "got 1 elements"),
        ({}, (*batch(), None, None), TypeError, "got 4 elements"),
        ({}, (torch.ones(0, 5), torch.ones(0).long()), ValueError, "at least one instance|more than 1 value"),
        ({"loss_fn": F.cross_entropy}, batch(), ValueError, r"shape \(10,\), got \(\); use reduction='none'"),
        ({"loss_fn": lambda o, t: o}, batch(), ValueError, r"shape \(10,\), got \(10, 3\); reduce all"),
        ({"loss_fn": lambda o, t: 1.0}, batch(), TypeError, "loss_fn must return a tensor .* got float"),
        ({}, (*batch(), torch.arange(9)), ValueError, r"indices must be \(10,\) integers, got \(9,\)"),
        ({}, (*batch(), torch.arange(10.0)), ValueError, "indices must be .* integers, got .* torch.float32"),
        ({}, (*batch(), torch.arange(-1, 9)), ValueError, "indices must be ≥ 0, got -1"),
        ({"weighting": FreeWeighting(5)}, (*batch(), torch.arange(10)), ValueError, r"\[0, 5\), got 9"),
        ({"weighting": FreeWeighting(5)}, batch(), ValueError, "needs the rows' indices"),
        ({"weighting": nn.Identity()}, batch(), ValueError, r"weighting must return \(10,\) weights, got Samples"),
        ({"weighting": InputWeighting(nn.Linear(5, 2))}, batch(), ValueError, r"network must return \(10,\) or"),
        ({"splitter": nn.Identity()}, batch(), ValueError, r"splitter must return \(10,\) probabilities, got Samples"),
        ({"correct_fn": lambda o, t: o}, batch(), ValueError, r"correct_fn must return \(10,\) bool"),
        ({"buffer_bytes": 3}, batch(), ValueError, "buffer_bytes=3 is less than one instance takes"),
        (
            {"weighting": SignalWeighting(("label",), num_classes=4)},
            batch(),
            ValueError,
            "num_classes=4, but the model has 3 outputs",
        ),
        (
            {"weighting": SignalWeighting(("margin",)), "loss_fn": lambda o, t: o.square().mean(1)},
            (batch()[0], torch.ones(10, 3)),
            ValueError,
            "signal 'margin' needs",
        ),
        ({"splitter": LearnedSplitter(network=nn.Linear(5, 2))}, batch(), Exception, "index|out of bounds"),
    ],
)
def test_a_refused_batch_changes_nothing(options, given, error, message):
    reweighter = make(**options)
    before = copy.deepcopy((reweighter.state_dict(), reweighter.model.state_dict()))
    optimizer = copy.deepcopy(reweighter.optimizer.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(error, match=message):
        reweighter.step(given)
    assert_same((reweighter.state_dict(), reweighter.model.state_dict()), before)
    assert_same(reweighter.optimizer.state_dict(), optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert reweighter.steps == 0


class Signed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, samples):
        return torch.full_like(samples.losses, self.value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_and_probabilities_out_of_range(value):
    with pytest.raises(ValueError, match="weighting must return finite weights ≥ 0"):
        make(weighting=Signed(value)).step(batch())
    with pytest.raises(ValueError, match=r"splitter must return probabilities in \[0, 1\]"):
        make(splitter=Signed(value)).step(batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("warmup", [0, 3])
def test_nonfinite_losses_are_refused_with_their_rows(value, warmup):
    reweighter = make(warmup_steps=warmup)
    for seed in range(2):
        reweighter.step(batch(seed=seed))
    before = copy.deepcopy((reweighter.state_dict(), reweighter.model.state_dict(), reweighter.optimizer.state_dict()))
    gradients = [p.grad.clone() for p in reweighter.model.parameters()]
    random = torch.get_rng_state()
    model = reweighter.model

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none").index_fill(0, torch.tensor([2, 7]), value)

    reweighter.loss_fn = loss_fn
    with pytest.raises(FloatingPointError, match=re.escape("instances [2, 7] of the batch")):
        reweighter.step(batch())
    assert_same((reweighter.state_dict(), model.state_dict(), reweighter.optimizer.state_dict()), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_many_offending_rows_are_counted():
    reweighter = make(loss_fn=lambda o, t: o.sum(1) * torch.nan)
    with pytest.raises(FloatingPointError, match=r"19\] and 10 more"):
        reweighter.step(batch(30))


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("engine", ["auto", "forward", "finite", "unrolled"])
@pytest.mark.parametrize("where", ["forward", "weighting", "splitter", "backward", "validation"])
def test_a_failure_anywhere_leaves_model_and_networks_as_they_were(order, engine, where):
    """Out of memory in the middle of a step; the next step works."""
    reweighter = make(order=order, hypergradient=engine)
    for seed in range(3):
        reweighter.step(batch(seed=seed))
    model, optimizer = reweighter.model, reweighter.optimizer
    networks = (model, reweighter.weighting, reweighter.splitter)
    optimizers = (optimizer, reweighter.weighting_optimizer, reweighter.holdout.optimizer)
    before = copy.deepcopy([thing.state_dict() for thing in (*networks, *optimizers)])
    random = torch.get_rng_state()
    calls = []

    def fail(*_):
        calls.append(1)
        if where != "validation" or len(calls) == 2:  # the first call of the model is the training forward
            raise torch.OutOfMemoryError("out of memory")

    failing = {
        "forward": lambda: model[-1].register_forward_hook(fail),
        "validation": lambda: model[-1].register_forward_hook(fail),
        "weighting": lambda: reweighter.weighting.register_forward_hook(fail),
        "splitter": lambda: reweighter.splitter.register_forward_hook(fail),
        "backward": lambda: model[0].register_full_backward_hook(fail),
    }[where]()
    if where == "validation" and engine == "unrolled":
        failing.remove()  # higher calls a copy of the model, without its hooks
        return
    with pytest.raises(torch.OutOfMemoryError):
        reweighter.step(batch(seed=3))
    failing.remove()
    assert_same([thing.state_dict() for thing in (*networks, *optimizers)], before)
    assert torch.equal(torch.get_rng_state(), random)
    assert reweighter.steps == 3
    assert reweighter.step(batch(seed=3)).val_loss is not None


def test_a_nonfinite_validation_loss_skips_the_meta_update(caplog):
    x, y = batch()
    reweighter = make(validation=[(x * torch.nan, y)])
    phi = copy.deepcopy(reweighter.weighting.state_dict())
    for _ in range(3):
        assert torch.isnan(reweighter.step((x, y)).val_loss)
    assert_same(reweighter.weighting.state_dict(), phi)
    assert len([r for r in caplog.records if "skipped a meta-update" in r.message]) == 1


def test_batches_of_one_train_and_say_why_nothing_is_held_out(caplog):
    model = nn.Linear(5, 3)
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=0, every=1)
    for seed in range(3):
        result = reweighter.step(batch(1, seed))
        assert result.val_loss is None
        assert result.weights.tolist() == [1.0]
    assert len([r for r in caplog.records if "batches of one" in r.message]) == 1


def test_a_splitter_that_wants_everything_leaves_one_instance_to_train_on():
    class Everything(nn.Module):
        def forward(self, samples):
            return torch.zeros_like(samples.losses)

    reweighter = make(splitter=Everything(), val_fraction=0.99)
    for seed in range(5):
        result = reweighter.step(batch(seed=seed))
        assert (~result.val_mask).sum() >= 1


class Yields:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_validation_that_yields_nothing_or_something_else():
    with pytest.raises(ValueError, match="validation is empty: it yielded no batch"):
        make(validation=Yields()).step(batch())
    with pytest.raises(ValueError, match=r"validation must yield \(inputs, targets\) batches, got Tensor"):
        make(validation=Yields(torch.ones(3))).step(batch())


def test_instances_of_another_shape_cannot_share_the_buffer():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3))
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=0)
    reweighter.step((torch.randn(10, 6), torch.randint(3, (10,))))
    before = copy.deepcopy(reweighter.state_dict())
    with pytest.raises(ValueError, match="pad inputs to one length"):
        reweighter.step((torch.randn(10, 7), torch.randint(3, (10,))))
    assert_same(reweighter.state_dict(), before)


def test_loss_without_a_call_of_the_model():
    reweighter = make()
    outputs = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="needs outputs of a call of the model"):
        reweighter.loss(outputs, torch.zeros(4).long())


def test_unrolled_refuses_accumulation():
    reweighter = make(hypergradient="unrolled", validation=[batch()])
    for _ in range(2):
        x, y = batch()
        reweighter.loss(reweighter.model(x), y).backward()
    before = copy.deepcopy(reweighter.model.state_dict())
    with pytest.raises(RuntimeError, match="one loss for each optimizer step, got 2"):
        reweighter.optimizer.step()
    assert_same(reweighter.model.state_dict(), before)


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True))
    reweighter = MetaReweighter(
        model, torch.optim.SGD(model.parameters(), lr=0.1), validation=[TOKENS], warmup_steps=0, every=1
    )
    with pytest.raises(TypeError, match="sparse gradients"):
        reweighter.step(TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 3}, r"every=1 \(here 3\)"),
        ({"order": "before"}, r"order='after' \(here 'before'\)"),
        ({"val_fraction": 0.2}, r"val_fraction=0.1 \(here 0.2\)"),
        ({"weighting": FreeWeighting(3)}, r"weighting='SignalWeighting' \(here 'FreeWeighting'\)"),
        ({"validation": [batch()]}, r"validation='buffer' \(here 'fixed'\)"),
        ({"weighting": SignalWeighting(hidden=3)}, "(?s)does not fit this reweighter: .*size mismatch"),
    ],
)
def test_state_of_another_configuration(options, message):
    theirs = make()
    theirs.step(batch())
    ours = make(**options)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert_same(ours.state_dict(), before)


@pytest.mark.parametrize("state", [None, {}, {"version": 99}, [1]])
def test_state_of_something_else(state):
    with pytest.raises(ValueError, match="state_dict must be one of MetaReweighter, version 1"):
        make().load_state_dict(state)


@pytest.mark.parametrize("missing", ["weighting", "holdout", "steps", "engine"])
def test_a_truncated_state_changes_nothing(missing):
    theirs, ours = make(), make(seed=3)
    for reweighter in (theirs, ours):
        for seed in range(3):
            reweighter.step(batch(seed=seed))
    before = copy.deepcopy(ours.state_dict())
    state = theirs.state_dict()
    del state[missing]
    with pytest.raises(ValueError, match=missing):
        ours.load_state_dict(state)
    assert_same(ours.state_dict(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SignalWeighting("loss"), "signals must be a sequence"),
        (lambda: SignalWeighting(("lost",)), "signals must be a sequence of some of"),
        (lambda: SignalWeighting(()), "signals must be a sequence"),
        (lambda: SignalWeighting(("label",)), "need num_classes, got None"),
        (lambda: FreeWeighting(0), "num_samples must be positive, got 0"),
        (lambda: RandomSplitter(1.5), r"val_fraction must lie in \(0, 1\), got 1.5"),
    ],
)
def test_networks(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reduced_precision_parameters_take_forward_mode():
    model = nn.Linear(5, 3).to(torch.bfloat16)
    reweighter = MetaReweighter(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        validation=[(batch()[0].bfloat16(), batch()[1])],
        warmup_steps=0,
        every=1,
    )
    x, y = batch()
    reweighter.step((x.bfloat16(), y))
    assert reweighter.engine == "forward"
    reweighter = MetaReweighter(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        validation=[(x.bfloat16(), y)],
        warmup_steps=0,
        every=1,
        hypergradient="finite",
    )
    with pytest.raises(TypeError, match=r"needs float32 or float64 parameters, got torch\.bfloat16"):
        reweighter.step((x.bfloat16(), y))


def test_indices_may_be_a_list_or_an_array():
    reweighter = make()
    for rows in (list(range(10)), np.arange(10), torch.arange(10, dtype=torch.int32)):
        assert torch.isfinite(reweighter.step((*batch(), rows)).loss)

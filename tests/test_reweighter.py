"""For users: arguments, a step and its result, the criterion, metrics, ``check``, the paper's settings, the end."""

import copy
import functools
import gc
import io
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torch_molere import (
    FreeWeighting,
    InputWeighting,
    LearnedSplitter,
    MetaReweighter,
    OnlineWeighting,
    SignalWeighting,
    ValidationBuffer,
    expected_error,
)
from torch_molere.validation import FixedValidation

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 12, 3


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, C))


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def batch(seed, size=B, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator, dtype=dtype)
    return x, torch.randint(C, (size,), generator=generator), (torch.arange(size) + 7 * seed) % 60


def made(model=None, **options):
    model = classifier() if model is None else model
    options = {"warmup_steps": 1, "every": 2, "validation": ValidationBuffer(fraction=0.3), **options}
    return MetaReweighter(model, sgd(model), **options)


def everything(reweighter):
    model = reweighter.model
    return copy.deepcopy(
        {
            "states": [thing.state_dict() for thing in (model, *reweighter.optimizers, reweighter)],
            "gradients": [parameter.grad for parameter in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "result": None if reweighter.result is None else vars(reweighter.result),
            "random": torch.get_rng_state(),
            "metrics": {k: v for k, v in reweighter.metrics().items() if k != "meta_seconds"},
        }
    )


# Arguments.

MODEL = classifier()
OPTIMIZER = sgd(MODEL)


class Lookahead:
    """As timm's: no optimizer of torch.optim."""

    def __init__(self, base):
        self.base_optimizer, self.param_groups = base, base.param_groups


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch.optim.Optimizer, got float"),
        ({"optimizer": []}, ValueError, "optimizer"),
        ({"optimizer": torch.optim.SGD([torch.ones(1)], lr=1)}, ValueError, "none of the model's trainable parameters"),
        ({"optimizer": torch.optim.LBFGS(MODEL.parameters())}, TypeError, "LBFGS cannot be differentiated"),
        ({"optimizer": torch.optim.SparseAdam(MODEL.parameters())}, TypeError, "SparseAdam cannot be differentiated"),
        ({"optimizer": Lookahead(OPTIMIZER)}, TypeError, "Lookahead wraps another one"),
        ({"optimizer": [OPTIMIZER, sgd(MODEL)]}, ValueError, "several optimizers hold the same"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn must be a function .* got str"),
        ({"loss_fn": nn.MSELoss}, TypeError, "got the class MSELoss; make an instance"),
        ({"loss_fn": nn.CTCLoss()}, TypeError, "CTCLoss takes"),
        ({"val_loss_fn": 1}, TypeError, "^val_loss_fn must be a function .* got int"),
        ({"correct_fn": 3}, TypeError, "correct_fn must be callable, got int"),
        ({"weighting": lambda s: s}, TypeError, "weighting must be a torch.nn.Module, got function"),
        ({"weighting_lr": 0.0}, ValueError, "weighting_lr must be a positive number, got 0.0"),
        ({"weighting_lr": float("nan")}, ValueError, "weighting_lr must be"),
        ({"weighting_optimizer": OPTIMIZER}, TypeError, r"functools.partial\(torch.optim.SGD, lr=0.1\)"),
        ({"weighting_optimizer": lambda p: 3}, TypeError, "got 3"),
        ({"validation": 7}, TypeError, "validation must be an iterable of batches, got int"),
        ({"validation": iter([1])}, TypeError, "one-pass iterator list_iterator"),
        ({"validation": []}, ValueError, "validation is empty"),
        ({"every": 0}, ValueError, "every must be an integer ≥ 1, got 0"),
        ({"every": 2.5}, ValueError, "every must be an integer ≥ 1, got 2.5"),
        ({"every": True}, ValueError, "every must be an integer ≥ 1, got True"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be an integer ≥ 0, got -1"),
        ({"hypergradient": "exact"}, ValueError, "hypergradient must be one of .* got 'exact'"),
        ({"hypergradient": "unrolled"}, ValueError, "hypergradient must be one of"),
        ({"weighting": OnlineWeighting(decay=0.0)}, ValueError, "which there are only in order='before'"),
        ({"order": "during"}, ValueError, "order must be 'after' or 'before', got 'during'"),
        ({"shrinkage": -0.1}, ValueError, "shrinkage must be a number ≥ 0, None or 'auto', got -0.1"),
        ({"shrinkage": "strong"}, ValueError, "shrinkage must be"),
        ({"max_weight": 0.5}, ValueError, r"max_weight must be at least 1 \(the mean weight\) or None, got 0.5"),
        ({"max_weight": float("nan")}, ValueError, "max_weight must be"),
        ({"scaler": 2.0}, TypeError, "scaler must be a torch.amp.GradScaler, got float"),
        ({"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_arguments(change, error, message):
    hooks = [len(MODEL._forward_pre_hooks), len(OPTIMIZER._optimizer_step_pre_hooks)]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        MetaReweighter(**{"model": MODEL, "optimizer": OPTIMIZER} | change)
    assert [len(MODEL._forward_pre_hooks), len(OPTIMIZER._optimizer_step_pre_hooks)] == hooks
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["traced", "scripted", "sparse", "sparse bag"])
def test_what_can_never_work_is_refused_at_construction(kind):
    model = {
        "traced": lambda: nn.Sequential(torch.jit.trace(nn.Linear(5, 3), torch.ones(1, 5))),
        "scripted": lambda: torch.jit.script(nn.Linear(5, 3)),
        "sparse": lambda: nn.Sequential(nn.Embedding(9, 3, sparse=True)),
        "sparse bag": lambda: nn.Sequential(nn.EmbeddingBag(9, 3, mode="sum", sparse=True)),
    }[kind]()
    with pytest.raises(TypeError, match="use sparse=False" if "sparse" in kind else "traced or scripted"):
        MetaReweighter(model, sgd(model))


def test_a_validation_source_serves_one_reweighter():
    buffer = ValidationBuffer()
    made(validation=buffer)
    with pytest.raises(ValueError, match="used by a reweighter already"):
        made(validation=buffer)
    assert isinstance(made(validation=FixedValidation([batch(0)[:2]])).validation, FixedValidation)


@pytest.mark.parametrize(
    ("options", "given", "error", "message"),
    [
        ({}, torch.ones(3), TypeError, r"batch must be \(inputs, targets\) .* got Tensor"),
        ({}, batch(0)[:1], TypeError, "got 1 elements"),
        ({}, (*batch(0), None), TypeError, "got 4 elements"),
        ({}, (torch.ones(0, 5), torch.ones(0).long()), ValueError, "at least one instance|more than 1 value"),
        ({"loss_fn": F.cross_entropy}, batch(0), ValueError, r"shape \(12,\), got \(\); use reduction='none'"),
        ({"loss_fn": lambda o, t: o}, batch(0), ValueError, r"shape \(12,\), got \(12, 3\); reduce all"),
        ({"loss_fn": lambda o, t: 1.0}, batch(0), TypeError, "loss_fn must return a floating tensor .* got float"),
        ({}, (*batch(0)[:2], torch.arange(9)), ValueError, r"indices must be \(12,\), .* got \(9,\)"),
        ({"weighting": FreeWeighting(5)}, (*batch(0)[:2], torch.arange(12)), ValueError, r"\[0, 5\), got 5"),
        ({"weighting": FreeWeighting(5)}, batch(0)[:2], ValueError, "needs the rows' indices"),
        ({"weighting": nn.Identity()}, batch(0), ValueError, r"weighting must return \(12,\) weights, got Samples"),
        ({"weighting": InputWeighting(nn.Linear(5, 2))}, batch(0), ValueError, r"network must return \(12,\) or"),
        ({"splitter": nn.Identity()}, batch(0), ValueError, r"splitter must return \(12,\) probabilities, got Samples"),
        ({"correct_fn": lambda o, t: o}, batch(0), ValueError, r"correct_fn must return \(12,\) bool"),
        ({"max_bytes": 3}, batch(0), ValueError, "max_bytes=3 is less than"),
        (
            {"weighting": SignalWeighting(("label",), num_classes=4)},
            batch(0),
            ValueError,
            "num_classes=4, but the model has 3 outputs",
        ),
        (
            {"weighting": SignalWeighting(("margin",)), "loss_fn": nn.HingeEmbeddingLoss()},
            (batch(0)[0], torch.ones(12, 3), batch(0)[2]),
            ValueError,
            "signal 'margin' needs",
        ),
        ({"validation": [torch.ones(3)]}, batch(0), ValueError, r"validation must yield \(inputs, targets\)"),
        ({"validation": batch(0)[:2]}, batch(0), ValueError, r"validation must yield \(inputs, targets\)"),
        (
            {"validation": [(torch.ones(4, 6), torch.zeros(4).long())]},
            batch(0),
            ValueError,
            "the model does not take the first batch of validation",
        ),
        ({"validation": [(batch(0)[0], torch.full((12,), 7))]}, batch(0), ValueError, "first batch of validation"),
    ],
)
def test_a_batch_that_is_refused_changes_nothing(options, given, error, message):
    """At the first step already, also what is wrong with the validation set, which warm-up does not use."""
    options = dict(options)
    buffer = {name: options.pop(name) for name in ("splitter", "max_bytes") if name in options}
    warmup = 0 if {"weighting"} & options.keys() else 50
    if buffer:
        warmup, options["validation"] = 0, ValidationBuffer(**buffer)
    reweighter = made(warmup_steps=warmup, **options)
    reweighter.model.eval()  # statistics, which a plain forward moves
    before = everything(reweighter)
    with pytest.raises(error, match=message):
        reweighter.step(given)
    after = everything(reweighter)
    assert_same(after | {"metrics": 0}, before | {"metrics": 0})
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
        made(weighting=Signed(value), warmup_steps=0).step(batch(0))
    with pytest.raises(ValueError, match=r"splitter must return probabilities in \[0, 1\]"):
        made(validation=ValidationBuffer(splitter=Signed(value)), warmup_steps=0).step(batch(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite_are_named(value):
    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none").index_fill(0, torch.tensor([2, 7]), value)

    with pytest.raises(FloatingPointError, match=r"instances \[2, 7\] of the batch"):
        made(loss_fn=loss_fn).step(batch(0))
    with pytest.raises(FloatingPointError, match=r"19\] and 10 more"):
        made(loss_fn=lambda o, t: o.sum(1) * torch.nan).step(batch(0, size=30))


# A step, and its result.


@pytest.mark.parametrize("order", ["after", "before"])
def test_result(order):
    model = classifier()
    reweighter = made(model, order=order, max_weight=1.5)
    for step in range(6):
        x, y, rows = batch(step)
        before = copy.deepcopy(model)
        state = torch.get_rng_state()
        result = reweighter.step((x, y, rows))
        assert result is reweighter.result
        torch.set_rng_state(state)
        outputs = before(x)
        losses = F.cross_entropy(outputs, y, reduction="none")
        assert torch.equal(result.outputs, outputs)
        torch.testing.assert_close(result.loss, (result.weights * losses).mean().detach())
        assert result.loss.shape == ()
        assert result.weights.dtype == torch.float32
        assert result.held_out.dtype == result.val_mask.dtype == torch.bool
        assert result.weights.shape == result.held_out.shape == result.val_mask.shape == (B,)
        assert not any(t.requires_grad for t in (result.loss, result.outputs, result.weights))
        torch.testing.assert_close(result.weights.mean(), torch.tensor(1.0))
        assert result.weights.max() <= 1.5 * (1 + 1e-6)
        assert not result.held_out.any()
        meta = step >= 1 and (step - 1) % 2 == 0
        assert (result.val_loss is not None) == (result.meta_gradient is not None) == meta
        if meta:
            assert result.val_loss.shape == ()
            assert result.meta_gradient.shape == (B,)
        with pytest.raises(FrozenInstanceError):
            result.loss = None
    assert reweighter.meta_updates == 3
    assert reweighter.steps == 6


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_loop_of_ones_own_is_a_step(order):
    """Bit for bit, through ``loss`` and through the criterion."""
    ways = []
    for way in ("step", "loss", "criterion", "closure"):
        model = classifier()
        optimizer = sgd(model)
        validation = ValidationBuffer(fraction=0.3)
        reweighter = MetaReweighter(model, optimizer, warmup_steps=1, every=2, validation=validation, order=order)
        for step in range(7):
            x, y, rows = batch(step)
            if way == "step":
                reweighter.step((x, y, rows))
                continue
            function = reweighter.criterion if way == "criterion" else reweighter.loss

            def closure(x=x, y=y, rows=rows, model=model, optimizer=optimizer, function=function):
                optimizer.zero_grad()
                loss = function(model(x), y, rows)
                loss.backward()
                return loss

            if way == "closure":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ways.append((model.state_dict(), reweighter.state_dict(), vars(reweighter.result)))
        assert reweighter.meta_updates == 3
    for other in ways[1:]:
        assert_same(other, ways[0])


@pytest.mark.parametrize("validation", ["buffer", "fixed"])
@pytest.mark.parametrize("order", ["after", "before"])
def test_a_part_of_the_outputs_is_enough(validation, order):
    """Of a model that returns more than its loss sees; the validation set's outputs are taken apart alike."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def forward(self, x):
            logits = self.inner(x)
            return {"features": logits.detach() + 1, "logits": logits}

    found = []
    for apart in (False, True):
        torch.manual_seed(0)
        model = Pair() if apart else classifier()
        optimizer = sgd(model)
        source = ValidationBuffer(fraction=0.3) if validation == "buffer" else [batch(90)[:2]]
        reweighter = MetaReweighter(model, optimizer, warmup_steps=1, every=1, validation=source, order=order)
        torch.manual_seed(1)
        for step in range(5):
            x, y, rows = batch(step)
            optimizer.zero_grad()
            outputs = model(x)["logits"] if apart else model(x)
            reweighter.loss(outputs, y, rows).backward()
            optimizer.step()
        found.append((list(model.parameters()), reweighter.state_dict(), vars(reweighter.result)))
        assert reweighter.meta_updates > 2
    assert_same(found[0], found[1])


@dataclass
class Output:
    logits: torch.Tensor


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, C)

    def forward(self, a, b, scale=None):
        out = self.linear(a + b)
        return Output(out if scale is None else out * scale)


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_inputs_of_several_tensors_and_outputs_with_logits(form):
    torch.manual_seed(0)
    reweighter = made(TwoInputs())
    for step in range(4):
        x, y, rows = batch(step)
        inputs = {"tuple": (x, x), "list": [x, x], "dict": {"b": x, "a": x, "scale": 2.0}}[form]
        result = reweighter.step((inputs, y, rows))
    assert result.outputs.shape == (B, C)
    assert torch.isfinite(result.val_loss)


@pytest.mark.parametrize("cut", ["body and head", "one each"])
def test_several_optimizers_are_one(cut):
    """Of the same kind: bit for bit what one optimizer with all parameters gives, in either order of their steps."""
    found = []
    for several in (False, True):
        for reverse in (False, True):
            model = classifier()
            parts = [model[:4], model[4:]] if cut == "body and head" else [m for m in model if list(m.parameters())]
            optimizers = [sgd(part) for part in parts] if several else [sgd(model)]
            validation = ValidationBuffer(fraction=0.3)
            given = optimizers if several else optimizers[0]
            reweighter = MetaReweighter(model, given, warmup_steps=1, every=2, validation=validation)
            torch.manual_seed(1)
            for step in range(6):
                x, y, rows = batch(step)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                reweighter.loss(model(x), y, rows).backward()
                for optimizer in reversed(optimizers) if reverse else optimizers:
                    optimizer.step()
            assert reweighter.steps == 6
            found.append((model.state_dict(), reweighter.state_dict(), vars(reweighter.result)))
            if several:
                torch.manual_seed(1)
                stepped = made(classifier())
                assert stepped.step(batch(0)).loss > 0
    for other in found[1:]:
        assert_same(other, found[0])


def test_step_takes_the_steps_of_all_optimizers():
    model = classifier()
    optimizers = [sgd(model[:4]), torch.optim.AdamW(model[4:].parameters(), lr=0.01)]
    reweighter = MetaReweighter(model, optimizers, warmup_steps=1, every=1, validation=ValidationBuffer(fraction=0.3))
    for step in range(4):
        before = copy.deepcopy((model[0].weight, model[4].weight))
        result = reweighter.step(batch(step))
        assert not any(torch.equal(a, b) for a, b in zip(before, (model[0].weight, model[4].weight), strict=True))
    assert result.val_loss is not None
    assert reweighter.steps == 4


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_changes_nothing_but_skips_what_overflows(fused):
    """Ten steps with a scaler, of which the fourth overflows, are nine without."""
    found = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) if scaled else None
        weighting = SignalWeighting(("loss",)).double()
        options = {"validation": [batch(90, dtype=torch.double)[:2]], "warmup_steps": 1, "every": 1}
        reweighter = MetaReweighter(
            model, optimizer, weighting=weighting, hypergradient="forward", scaler=scaler, **options
        )
        overflow = [False]
        for parameter in model.parameters():
            parameter.register_hook(lambda g, overflow=overflow: g * torch.inf if overflow[0] else g)
        for step in range(10):
            overflow[0] = step == 3
            if step != 3 or scaled:
                reweighter.step(batch(step, dtype=torch.double)[:2])
        assert reweighter.steps == 9
        assert reweighter.meta_updates == 8
        found.append((model.state_dict(), weighting.state_dict()))
    assert_same(found[0], found[1], rtol=1e-9, atol=1e-11)


# The loader of validation batches.


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((5,), float(i)), i % C) for i in range(7)])


@pytest.mark.parametrize("size", [2, 3])
def test_a_loader_of_an_iterable_dataset(size):
    """Its ``len`` raises; and its last batch, of one instance, is passed over for batch normalisation."""
    reweighter = made(validation=DataLoader(Stream(), batch_size=size), warmup_steps=0, every=1)
    for step in range(9):
        assert torch.isfinite(reweighter.step(batch(step)).val_loss)
    assert reweighter.meta_updates == 9


def test_a_last_batch_of_one_stays_where_nothing_needs_two():
    calls = []
    model = nn.Linear(5, C)
    validation = [batch(90)[:2], batch(91, size=1)[:2]]
    reweighter = made(
        model,
        validation=validation,
        warmup_steps=0,
        every=1,
        val_loss_fn=lambda o, t: (calls.append(len(t)), F.cross_entropy(o, t, reduction="none"))[1],
    )
    for step in range(4):
        reweighter.step(batch(step))
    assert {1, B} == set(calls)


def test_batches_of_one_with_batch_norm_name_the_loader():
    """At the first step, not at the first meta-update."""
    data = TensorDataset(*batch(90)[:2])
    reweighter = made(validation=DataLoader(data, batch_size=1), warmup_steps=50)
    with pytest.raises(ValueError, match=r"first batch of validation.*drop_last=True or another batch_size"):
        reweighter.step(batch(0))
    reweighter.model.eval()
    reweighter.step(batch(0))


# The criterion.


class Task(nn.Module):
    """As a LightningModule has it: the criterion is an attribute, and assigned later."""

    def __init__(self):
        super().__init__()
        self.network = classifier()
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.network(x)

    def training_step(self, x, y):
        return self.criterion(self(x), y)


def test_the_criterion_stands_where_a_criterion_stood():
    """Also in a task that is the model itself; equal to ``step``, bit for bit."""
    torch.manual_seed(0)
    task = Task()
    twin = copy.deepcopy(task)
    optimizer = sgd(task)
    keys = list(task.state_dict())
    options = {"warmup_steps": 1, "every": 1}
    task.criterion = MetaReweighter(  # held by nothing but its criterion
        task, optimizer, loss_fn=task.criterion, validation=ValidationBuffer(fraction=0.3), **options
    ).criterion
    gc.collect()
    stepped = MetaReweighter(twin, sgd(twin), validation=ValidationBuffer(fraction=0.3), **options)
    for step in range(5):
        torch.manual_seed(step)
        optimizer.zero_grad()
        x, y, _ = batch(step)
        task.training_step(x, y).backward()
        optimizer.step()
        torch.manual_seed(step)
        stepped.step((x, y))
    assert stepped.meta_updates > 2
    assert list(task.state_dict()) == keys
    assert_same(list(task.network.parameters()), list(twin.network.parameters()))


def test_evaluation_by_the_criterion_is_the_plain_loss():
    reweighter = made()
    reweighter.step(batch(0))
    model = reweighter.model.eval()
    x, y, _ = batch(1)
    before = everything(reweighter)
    with torch.no_grad():
        assert torch.equal(reweighter.criterion(model(x), y), F.cross_entropy(model(x), y))
    with torch.inference_mode():
        assert torch.equal(reweighter.criterion(model(x), y), F.cross_entropy(model(x), y))
    assert_same(everything(reweighter), before)


def copied_by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copied_by_torch])
def test_copies_of_model_and_criterion_are_plain(way):
    """An average of the weights, a checkpoint of the module: the criterion's loss, and no part of training."""
    task = Task()
    optimizer = sgd(task)
    reweighter = MetaReweighter(task, optimizer, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1), warmup_steps=0)
    task.criterion = reweighter.criterion
    assert reweighter.criterion is task.criterion
    other = way(task).eval()
    x, y, _ = batch(0)
    loss = other.training_step(x, y)
    assert torch.equal(loss, F.cross_entropy(other(x), y, label_smoothing=0.1))
    loss.backward()
    assert reweighter.attachment.active == []
    assert reweighter.steps == 0


class Scaled(nn.Module):
    """A loss with a parameter of its own, as ArcFace has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs, targets):
        return F.cross_entropy(self.scale * outputs, targets, reduction="none")


def test_a_criterion_keeps_the_parameters_of_its_loss():
    task = Task()
    task.criterion = loss_fn = Scaled()
    optimizer = sgd(task)
    reweighter = MetaReweighter(task, optimizer, loss_fn=loss_fn, warmup_steps=1, every=1)
    task.criterion = reweighter.criterion
    assert any(parameter is loss_fn.scale for parameter in task.parameters())
    for step in range(4):
        optimizer.zero_grad()
        task.training_step(*batch(step)[:2]).backward()
        optimizer.step()
    assert loss_fn.scale != 2.0
    other = copy.deepcopy(task)
    assert next(other.criterion.parameters()) is not loss_fn.scale
    assert not torch.isnan(other.eval().training_step(*batch(0)[:2])).any()


# Numbers for a logger, and for people.


def test_metrics():
    """A flat dict of floats, from the beginning; each against the result."""
    reweighter = made(max_weight=1.2, weighting_lr=0.1)
    assert all(isinstance(value, float) for value in reweighter.metrics().values())
    for step in range(8):
        result = reweighter.step(batch(step))
        if result.meta_gradient is not None:
            latest = result
    found = reweighter.metrics()
    assert all(isinstance(value, float) for value in found.values())
    weights = result.weights.double()
    assert found["steps"] == 8
    assert found["meta_updates"] == reweighter.meta_updates == 4
    assert found["weights/std"] == pytest.approx(float(weights.std(correction=0)), rel=1e-5)
    assert found["weights/effective"] == pytest.approx(float(1 / (1 + weights.var(correction=0))), rel=1e-5)
    assert found["weights/zero"] == 0
    assert found["weights/at_bound"] == pytest.approx(float((weights > 1.1999).double().mean()))
    assert found["validation/sent"] == pytest.approx(float(result.val_mask.double().mean()))
    assert found["validation/instances"] == len(reweighter.validation)
    assert found["validation/fill"] == len(reweighter.validation) / 2048
    assert found["meta_gradient/repeated"] == reweighter.shrinkage.repeated
    assert 0 <= found["validation/accuracy"] <= 1 <= found["validation/classes"] <= 3
    assert found["validation/loss"] == pytest.approx(float(latest.val_loss))
    assert found["meta_gradient/norm"] == pytest.approx(float(latest.meta_gradient.norm()), rel=1e-5)
    gradient = latest.meta_gradient.double()
    expected = float(gradient.mean().abs() / gradient.std(correction=0))
    assert found["meta_gradient/signal_to_noise"] == pytest.approx(expected, rel=1e-4)
    assert found["meta_seconds"] > 0
    assert 0 <= found["check/error"] < 0.01


def test_metrics_of_validation_against_the_rows_themselves():
    """At a rate of zero the classifier stays, so that a whole pass over validation can be looked at by hand."""
    validation = (torch.randn(12, 5), torch.tensor([0] * 6 + [1] * 3 + [2] * 3))
    reweighter = made(nn.Linear(5, C), validation=[validation], every=1, warmup_steps=0)
    reweighter.optimizers[0].param_groups[0]["lr"] = 0.0
    reweighter.step(batch(0))
    with torch.no_grad():
        right = (reweighter.model(validation[0]).argmax(dim=1) == validation[1]).double().mean()
    found = reweighter.metrics()
    assert found["validation/accuracy"] == pytest.approx(float(right))
    assert found["validation/classes"] == pytest.approx(2**1.5)  # entropy of ½, ¼, ¼: 1.5 bits


def test_metrics_of_a_splitter_that_learns():
    reweighter = made(validation=ValidationBuffer(splitter=LearnedSplitter(), fraction=0.5), every=1, warmup_steps=1)
    for step in range(4):
        reweighter.step(batch(step))
    assert reweighter.metrics()["validation/splitter_loss"] > 0


def test_repr():
    reweighter = made(warmup_steps=2, every=1)
    assert "warming up, step 0 of 2; 0 meta-updates, one every 1 steps, engine 'auto'" in repr(reweighter)
    for step in range(4):
        reweighter.step(batch(step))
    text = repr(reweighter)
    assert text.startswith("MetaReweighter(Sequential, SGD)")
    assert "step 4; 2 meta-updates" in text
    assert "SignalWeighting, shrinkage auto, " in text and "max_weight 3.0" in text
    assert f"ValidationBuffer; {len(reweighter.history)} rows known" in text
    assert "shrinkage 0.3, max" in repr(made(shrinkage=0.3))


# check(batch).


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("validation", ["buffer", "fixed", "learned"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_check_changes_nothing(order, validation, steps):
    """And the run goes on as one that was never checked, bit for bit."""
    runs = []
    for checked in (True, False):
        source = {
            "buffer": lambda: ValidationBuffer(fraction=0.3),
            "fixed": lambda: [batch(90)[:2], batch(91)[:2]],
            "learned": lambda: ValidationBuffer(splitter=LearnedSplitter(network=classifier(3)), fraction=0.3),
        }[validation]()
        reweighter = made(order=order, validation=source, weighting=InputWeighting.from_classifier(classifier(4), C))
        torch.manual_seed(1)
        for step in range(steps):
            reweighter.step(batch(step))
        if checked:
            before = everything(reweighter)
            text = reweighter.check(batch(50))
            assert_same(everything(reweighter), before)
            assert reweighter.attachment.active == []
            for part in ("engine: 'finite'", "from reverse mode", "reached: 6 of 6", "rows are trained on too"):
                assert part in text
            assert re.search(r"cost of a meta-update: \d+\.\d of a plain step, one every 2 steps", text)
            assert "rows known by their index: yes" in text
            assert "no; see with_indices" in reweighter.check(batch(50)[:2])
        for step in range(steps, steps + 4):
            reweighter.step(batch(step))
        runs.append(everything(reweighter))
    assert_same(runs[0], runs[1])


def test_check_says_what_is_wrong():
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

        @staticmethod
        def jvp(ctx, tangent):
            return tangent

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, C)

        def forward(self, x):
            return Reversed.apply(self.layer(x))

    reweighter = made(Model(), hypergradient="finite", warmup_steps=500)
    before = everything(reweighter)
    with pytest.raises(RuntimeError, match="finds no engine that agrees with the model's own backward"):
        reweighter.check(batch(0))
    assert_same(everything(reweighter), before)
    for validation in ([(torch.ones(4, 6), torch.zeros(4).long())], [3]):
        with pytest.raises(ValueError, match="validation"):
            made(validation=validation, warmup_steps=500).check(batch(0))
    with pytest.raises(TypeError, match="batch must be"):
        made().check(batch(0)[0])


def test_check_leaves_the_loop_its_pending_loss():
    """Called between a backward and the step that uses its gradients."""
    reweighter = made(warmup_steps=0, every=1)
    twin = made(warmup_steps=0, every=1)
    for each in (reweighter, twin):
        torch.manual_seed(0)
        for step in range(3):
            x, y, rows = batch(step)
            each.optimizers[0].zero_grad()
            each.loss(each.model(x), y, rows).backward()
            if each is reweighter:
                each.check(batch(40))
            each.optimizers[0].step()
    assert reweighter.steps == 3
    assert_same(reweighter.state_dict(), twin.state_dict())
    assert_same(reweighter.model.state_dict(), twin.model.state_dict())


# The paper's settings.


def test_as_in_paper():
    """Order, rates, hard validation held out, no bounds; φ sees x, Θ sees x and y; all of it learns."""
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd(model, weight_decay=1e-4)
    reweighter = MetaReweighter.as_in_paper(model, optimizer, num_outputs=C, warmup_steps=2, fraction=0.3, every=1)
    assert_same(model.state_dict(), before)
    assert reweighter.order == "before"
    assert (reweighter.shrinkage.strength, reweighter.max_weight) == (None, None)
    assert isinstance(reweighter.validation.splitter, LearnedSplitter)
    assert isinstance(reweighter.weighting, InputWeighting)
    assert isinstance(reweighter.weighting_optimizer, torch.optim.SGD)
    assert reweighter.weighting_optimizer.param_groups[0]["lr"] == 1e-3
    networks = reweighter.weighting, reweighter.validation.splitter
    assert not {id(p) for p in model.parameters()} & {id(p) for network in networks for p in network.parameters()}
    start = [[parameter.detach().clone() for parameter in network.parameters()] for network in networks]
    held = 0
    for step in range(8):
        result = reweighter.step(batch(step))
        held += int(result.held_out.sum())
        assert torch.equal(result.weights == 0, result.held_out)
        assert not (result.val_mask & ~result.held_out).any()
    assert held >= 8
    assert reweighter.meta_updates >= 5
    for network, values in zip(networks, start, strict=True):
        assert not all(torch.equal(a, b) for a, b in zip(values, network.parameters(), strict=True))
    assert reweighter.validation.state_dict()["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_as_in_paper_takes_other_options():
    model = classifier()
    options = {"order": "after", "every": 3, "max_weight": 2.0, "val_loss_fn": expected_error}
    reweighter = MetaReweighter.as_in_paper(model, sgd(model), num_outputs=C, warmup_steps=1, lr=0.1, **options)
    assert (reweighter.order, reweighter.every, reweighter.max_weight) == ("after", 3, 2.0)
    for step in range(5):
        reweighter.step(batch(step))


@pytest.mark.parametrize("weighting", ["signals", "inputs", "classifier", "free", "from the evidence"])
def test_every_weighting_learns(weighting):
    model = classifier()
    phi = {
        "signals": lambda: SignalWeighting(("loss", "margin", "probabilities", "label"), num_classes=C),
        "inputs": lambda: InputWeighting(nn.Linear(5, 1)),
        "classifier": lambda: InputWeighting.from_classifier(model, C),
        "free": lambda: FreeWeighting(60),
        "from the evidence": OnlineWeighting,
    }[weighting]()
    reweighter = made(model, weighting=phi, weighting_lr=0.1, validation=[batch(90)[:2]], every=1)
    for _ in range(4):
        result = reweighter.step(batch(1))
    assert result.weights.std() > 0
    torch.testing.assert_close(result.weights.mean(), torch.tensor(1.0))


def test_weighting_optimizer_makes_the_optimizer():
    make = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.5)
    reweighter = made(weighting_optimizer=make)
    assert reweighter.weighting_optimizer.param_groups[0]["momentum"] == 0.5
    assert made(weighting=OnlineWeighting()).weighting_optimizer is None


# The end.


def hooks_of(model, optimizer):
    kinds = (model._forward_pre_hooks, model._forward_hooks)
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return [len(hooks) for hooks in (*kinds, *own)] + [len(p._backward_hooks or ()) for p in model.parameters()]


@pytest.mark.parametrize("way", ["close", "with", "an error within", "let go of"])
def test_the_end_leaves_model_and_optimizer_as_they_were(way):
    model = classifier()
    optimizer = sgd(model)
    reweighter = MetaReweighter(model, optimizer, validation=[batch(9)[:2]], warmup_steps=0, every=1)
    if way in ("with", "an error within"):
        with pytest.raises(ValueError, match="stop") if "error" in way else reweighter, reweighter:
            reweighter.step(batch(0))
            assert sum(hooks_of(model, optimizer)) > 0
            if "error" in way:
                raise ValueError("stop")
    else:
        reweighter.step(batch(0))
        reweighter.loss(model(batch(1)[0]), *batch(1)[1:]).backward()  # a step is under way
        if way == "close":
            reweighter.close()
        else:
            del reweighter
            gc.collect()
    assert sum(hooks_of(model, optimizer)) == 0
    plain, plain_optimizer = copy.deepcopy((model, optimizer))
    plain_optimizer = sgd(plain)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (plain, plain_optimizer)):
        torch.manual_seed(0)
        its.zero_grad()
        F.cross_entropy(each(batch(2)[0]), batch(2)[1]).backward()
        its.step()
    assert_same(model.state_dict(), plain.state_dict())
    if way != "let go of":
        with pytest.raises(RuntimeError, match="this MetaReweighter is closed"):
            reweighter.step(batch(3))


def test_a_reweighter_is_not_copied():
    reweighter = made()
    for way in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save state_dict\(\) and load it into a new MetaReweighter"):
            way(reweighter)


def test_a_copy_of_the_model_is_no_part_of_the_training():
    model = classifier()
    reweighter = made(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(RuntimeError, match="outputs are not what a call of the model returned"):
        reweighter.loss(average(batch(0)[0]), *batch(0)[1:])


def test_new_parameter_groups_and_schedulers():
    model = classifier()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    reweighter = MetaReweighter(model, optimizer, validation=[batch(90)[:2]], warmup_steps=0, every=1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.1})
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        last = model[4].weight.detach().clone()
        assert reweighter.step(batch(step)).val_loss is not None
        scheduler.step()
        assert torch.equal(model[4].weight, last) == (step < 3)

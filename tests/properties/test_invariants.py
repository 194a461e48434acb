"""The invariants that the library promises, as properties (float64): 1 to 5 and 7.

Normalised weights by themselves are in ``test_weights``, margins (6) in ``test_margins``, ranks (8) in ``distributed``.
"""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fresh import in_fresh_processes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import data, deviation, net, reweighter_of, world_of
from same import assert_same
from torch import nn

from torch_molere import (
    FreeWeighting,
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    OnlineWeighting,
    SignalWeighting,
    ValidationBuffer,
    hypergradient,
)
from torch_molere.hypergradients.check import TOLERANCE
from torch_molere.weighting import normalised

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.05, "maximize": True, "momentum": 0.5}),
    "sgd-dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "adam-maximize": (torch.optim.Adam, {"lr": 0.01, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1}),
}
UNROLLED = ("sgd", "sgd-dampening", "rmsprop", "adagrad", "adadelta")
"""What ``higher`` has, and computes as PyTorch does to the last digits."""

seeds = st.integers(0, 2**31 - 1)
names = st.sampled_from(sorted(OPTIMIZERS))
orders = st.sampled_from(["after", "before"])


def optimizer_of(name, model):
    kind, options = OPTIMIZERS[name]
    return kind(model.parameters(), **options)


def network(seed, width=7, classes=3, norm=True, dropout=0.0):
    between = ([nn.BatchNorm1d(width)] if norm else []) + ([nn.Dropout(dropout)] if dropout else [])
    return net(*between, seed=seed, hidden=width, classes=classes)


def warmed(name, model, batch, steps=3):
    """An optimizer that has taken some plain steps."""
    optimizer = optimizer_of(name, model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def validation_loss_after(model, optimizer, train, validation, weights):
    """L_val(θ⁺) by really taking the step, on copies."""
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    (weights * F.cross_entropy(model(train[0]), train[1], reduction="none")).mean().backward()
    optimizer.step()
    return F.cross_entropy(model(validation[0]), validation[1]).item()


# 1. Equal weights and no held-out instances: plain training, bit for bit.


class Equal(nn.Module):
    """Equal weights, but a φ that meta-updates run through."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.double))

    def forward(self, samples):
        return self.value.exp() * torch.ones_like(samples.losses)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=4)
@given(
    seed=seeds,
    size=st.integers(2, 17),
    value=st.floats(-8, 8),
    order=orders,
    fixed=st.booleans(),
    own_loop=st.booleans(),
    bound=st.sampled_from([None, 1.0, 3.0]),
)
def test_equal_weights_are_plain_training(name, seed, size, value, order, fixed, own_loop, bound):
    plain, model = network(seed, dropout=0.2), network(seed, dropout=0.2)
    ours, optimizer = optimizer_of(name, model), optimizer_of(name, plain)
    reweighter = MetaReweighter(
        model,
        ours,
        weighting=Equal(value),
        validation=[data(seed + 1)] if fixed else ValidationBuffer(fraction=0.4),
        warmup_steps=1,
        every=2,
        order=order,
        max_weight=bound,
    )
    batches = [(*data(seed + 2 + step, size), torch.arange(size) + 2 * step) for step in range(5)]
    torch.manual_seed(seed)
    for x, y, _ in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    random = torch.get_rng_state()
    torch.manual_seed(seed)
    for x, y, rows in batches:
        if own_loop:
            ours.zero_grad()
            reweighter.loss(model(x), y, rows).backward()
            ours.step()
        else:
            reweighter.step((x, y, rows))
    assert reweighter.meta_updates > 0
    assert_same(model.state_dict(), plain.state_dict())
    assert_same(ours.state_dict(), optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), random)


# 2. Engines agree with each other and with a central difference, and the check passes exactly where they do.


@given(seed=seeds, name=names, width=st.integers(1, 9), size=st.integers(2, 13), classes=st.integers(2, 5))
def test_engines_agree(seed, name, width, size, classes):
    model = network(seed, width, classes)
    train, validation = data(seed + 1, size, classes=classes), data(seed + 2, size + 1, classes=classes)
    optimizer = warmed(name, model, train)
    weights = torch.rand(size, dtype=torch.double) + 0.1
    setting = (model, optimizer, train, validation, weights)
    exact = hypergradient(*setting, engine="forward")
    # A derivative as small as this is lost in any difference of losses.
    floor = 1e-7 * size**0.5
    assert (hypergradient(*setting, engine="reverse") - exact).norm() <= 1e-10 * exact.norm() + 1e-14
    if name in UNROLLED:
        assert (hypergradient(*setting, engine="unrolled") - exact).norm() <= 1e-10 * exact.norm() + 1e-14
    assert (hypergradient(*setting) - exact).norm() <= 1e-4 * exact.norm() + 1e-3 * floor
    try:
        finite = hypergradient(*setting, engine="finite")
    except RuntimeError as error:  # losses as steep as behind a batch norm of two instances
        assert "'finite' is 0.000" in str(error)
    else:
        assert (finite - exact).norm() <= 1e-4 * exact.norm() + 1e-3 * floor
    direction = torch.randn(size, dtype=torch.double)
    direction /= direction.norm()
    h = 1e-6
    ahead, behind = (validation_loss_after(*setting[:4], weights + s * h * direction) for s in (1, -1))
    sign = -1 if name.endswith("maximize") else 1
    assert abs(sign * (ahead - behind) / (2 * h) - sign * exact @ direction) <= 1e-3 * exact.norm() + floor


def loop_of(accumulate, clip, mask, factor, scaled):
    """A loop of one's own around one optimizer, with what people do between backward and step."""

    def loop(world, criterion):
        (optimizer,) = world.optimizers
        optimizer.zero_grad()
        for x, y in world.extra["batches"][:accumulate]:
            loss = factor * criterion(world.model(x), y) / accumulate
            (world.extra["scaler"].scale(loss) if scaled else loss).backward()
        if scaled:
            world.extra["scaler"].unscale_(optimizer)
        gradients = [p.grad for p in world.model.parameters() if p.grad is not None]
        if mask:
            for gradient in gradients:
                gradient *= torch.arange(gradient.numel()).reshape(gradient.shape) % 3 > 0
        if clip:  # the factor is a constant of the step, which does not depend on the weights
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            shrunk = world.constants.keep("clipping", lambda: min(1.0, 0.05 / float(norm)))
            for gradient in gradients:
                gradient *= shrunk
        if scaled:
            world.extra["scaler"].step(optimizer)
            world.extra["scaler"].update()
        else:
            optimizer.step()

    return loop


@settings(max_examples=12)
@given(
    seed=seeds,
    name=names.filter(lambda name: "maximize" not in name),
    engine=st.sampled_from(["auto", "finite", "forward", "reverse"]),
    accumulate=st.integers(1, 3),
    clip=st.booleans(),
    mask=st.booleans(),
    factor=st.sampled_from([1.0, 0.25, 3.0]),
    scaled=st.booleans(),
)
def test_the_meta_gradient_of_a_step_is_a_central_difference(
    seed, name, engine, accumulate, clip, mask, factor, scaled
):
    """Through really taken steps, whatever the loop does between backward and step."""
    model = network(seed)
    batches = [data(seed + number) for number in range(1, 4)]
    world = world_of(model, warmed(name, model, batches[0]), validation=data(seed + 9))
    world.extra |= {"batches": batches, "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)}
    loop = loop_of(accumulate, clip, mask, factor, scaled)
    reweighter = reweighter_of(world, hypergradient=engine)
    distances = [deviation(world, loop, reweighter) for _ in range(2)]
    assert max(distances) < 1e-4
    assert reweighter.meta_updates == 2


class Scaled(torch.autograd.Function):
    """Its backward is ``factor`` times the derivative of its forward: 1 is right, -1 is gradient reversal."""

    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)


class Backward(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return Scaled.apply(x, self.factor)


@settings(max_examples=12)
@given(
    seed=seeds,
    engine=st.sampled_from(["finite", "forward"]),
    factor=st.sampled_from([1.0, 1.0, -1.0, 0.0, 0.3, 0.8, 1.3, 4.0]),
    accumulate=st.integers(1, 2),
)
def test_the_check_passes_exactly_where_engines_are_right(seed, engine, factor, accumulate):
    """What backward differentiates is right; replays differentiate forward."""
    loop = loop_of(accumulate, clip=False, mask=False, factor=1.0, scaled=False)

    def measured(requested):
        model = net(Backward(factor), seed=seed)
        batches = [data(seed + number) for number in range(1, 3)]
        world = world_of(model, warmed("sgd", model, batches[0]), validation=data(seed + 9))
        world.extra |= {"batches": batches}
        reweighter = reweighter_of(world, hypergradient=requested)
        return deviation(world, loop, reweighter, as_backward=True), reweighter.engine

    with mock.patch.dict(TOLERANCE, {engine: float("inf")}):
        unchecked, _ = measured(engine)
    right = unchecked < 1e-4  # also at 0, where nothing of what is wrong comes into the direction u
    assert right or factor != 1.0
    if right:
        assert measured(engine)[0] < 1e-4
        distance, chosen = measured("auto")
        assert (distance < 1e-4, chosen) == (True, "finite")
    else:
        assume(unchecked > 0.02)  # else it is as good as right
        with pytest.raises(RuntimeError, match="finds no engine that agrees with the model's own backward"):
            measured(engine)
        distance, chosen = measured("auto")
        assert (distance < 1e-4, chosen) == (True, "reverse")


# 3. Weights of a step.


def one_step(x, y, rows=None, seed=0, norm=True, scale=1.0, bound=None):
    """Weights, meta-gradient and Δφ of a step with a fresh free or signal weighting that has learned something."""
    model = network(seed, norm=norm)
    weighting = SignalWeighting(("loss", "margin")) if rows is None else FreeWeighting(64)
    torch.manual_seed(seed)
    nn.init.normal_(weighting.network[-1].weight if rows is None else weighting.scores.weight)
    weighting = weighting.double()
    weighting.register_forward_hook(lambda module, given, weights: scale * weights)
    before = copy.deepcopy(weighting)
    reweighter = MetaReweighter(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        weighting=weighting,
        weighting_optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        validation=[data(seed + 1, 9)],
        warmup_steps=0,
        every=1,
        hypergradient="forward",
        max_weight=bound,
    )
    result = reweighter.step((x, y) if rows is None else (x, y, rows))
    change = [a - b for a, b in zip(weighting.parameters(), before.parameters(), strict=True)]
    return result.weights, result.meta_gradient, change


bounds = st.one_of(st.none(), st.floats(1.0, 4.0))


@given(seed=seeds, size=st.integers(2, 20), bound=bounds, scale=st.floats(1e-3, 1e3))
def test_weights_of_a_step(seed, size, bound, scale):
    (x, y), rows = data(seed, size), torch.arange(size)
    weights, *_ = one_step(x, y, rows, seed, bound=bound)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.mean(), torch.ones((), dtype=torch.double), rtol=1e-12, atol=0)
    if bound is not None:
        assert weights.max() <= bound
    # The scale of g_φ is divided out, in the weights and so in all that follows from them.
    scaled, *rest = one_step(x, y, rows, seed, bound=bound, scale=scale)
    torch.testing.assert_close(scaled, weights, rtol=1e-12, atol=0)
    _, *expected = one_step(x, y, rows, seed, bound=bound)
    torch.testing.assert_close(rest, expected, rtol=1e-8, atol=1e-12)


@given(seed=seeds, size=st.integers(2, 20), bound=bounds)
def test_permuting_the_batch_permutes_weights_and_meta_gradients(seed, size, bound):
    (x, y), rows = data(seed, size), torch.arange(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    weights, gradient, (change,) = one_step(x, y, rows, seed, bound=bound)
    permuted, permuted_gradient, (permuted_change,) = one_step(x[order], y[order], rows[order], seed, bound=bound)
    torch.testing.assert_close(permuted, weights[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=1e-8, atol=1e-12)
    # Each row's own free weight moves by the same, wherever in the batch it stood.
    torch.testing.assert_close(permuted_change, change, rtol=1e-6, atol=1e-10)


@given(seed=seeds, size=st.integers(2, 20), which=st.integers(0, 19))
def test_duplicating_an_instance_duplicates_its_weight(seed, size, which):
    x, y = data(seed, size)
    twice = torch.cat([torch.arange(size), torch.tensor([which % size])])
    weights, gradient, _ = one_step(x[twice], y[twice], seed=seed)
    torch.testing.assert_close(weights[-1], weights[which % size], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient[-1], gradient[which % size], rtol=1e-8, atol=1e-12)
    # Without batch statistics nothing else of the others changes but the normalisation.
    alone, *_ = one_step(x, y, seed=seed, norm=False)
    both, *_ = one_step(x[twice], y[twice], seed=seed, norm=False)
    torch.testing.assert_close(both[:-1] / both[0], alone / alone[0], rtol=1e-10, atol=1e-12)


# 4. A step of φ goes down L_val(θ⁺), along its gradient.


class Watched(SignalWeighting):
    """Remembers what it was shown last."""

    def forward(self, samples):
        self.shown = samples
        return super().forward(samples)


@given(
    seed=seeds,
    name=names.filter(lambda name: "maximize" not in name),
    size=st.integers(3, 20),
    order=orders,
    bound=st.sampled_from([None, 1.5]),
)
def test_a_small_step_of_phi_does_not_raise_the_validation_loss(seed, name, size, order, bound):
    """And its slope is minus the squared length of φ's gradient, by a central difference through steps really taken."""
    model, rate = network(seed), 1e-3
    train, validation = data(seed + 1, size), data(seed + 2, 9)
    torch.manual_seed(seed)
    weighting = Watched(("loss", "margin"), hidden=8).double()
    nn.init.normal_(weighting.network[-1].weight)
    optimizer = warmed(name, model, train)
    reweighter = MetaReweighter(
        model,
        optimizer,
        weighting=weighting,
        weighting_optimizer=lambda p: torch.optim.SGD(p, lr=rate),
        validation=[validation],
        warmup_steps=0,
        every=1,
        hypergradient="forward",
        order=order,
        shrinkage=None,
        max_weight=bound,
    )
    start = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(list(weighting.parameters()))
    reweighter.step(train)
    change = [a.detach() - b for a, b in zip(weighting.parameters(), before, strict=True)]

    def loss_at(t):
        with torch.no_grad():
            for parameter, old, step in zip(weighting.parameters(), before, change, strict=True):
                parameter.copy_(old + t * step)
            weights = normalised(weighting(weighting.shown), None, bound)
        return validation_loss_after(*start, train, validation, weights)

    assert loss_at(1.0) <= loss_at(0.0) + 1e-12
    squared = float(torch.stack([step.square().sum() for step in change]).sum().detach())
    h = 1e-5 / max(squared**0.5, 1e-12)
    slope = (loss_at(h) - loss_at(-h)) / (2 * h)
    # On a step so small differences of losses are rounding; at a bound or a ReLU's corner there is no derivative.
    if squared**0.5 / rate > 1e-6 and bound is None:
        assert slope == pytest.approx(-squared / rate, rel=1e-3)


# 5. Split.


class Says(nn.Module):
    """A splitter that is sure of itself: nearly everything, or nearly nothing, is validation."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, samples):
        return torch.full_like(samples.losses, self.p)


SPLITTERS = {
    "soft": MarginSplitter,
    "hard": lambda: MarginSplitter(float("inf")),
    "easy": lambda: MarginSplitter(-1.0, trim=0.2),
    "learned": lambda: LearnedSplitter(("loss",), hidden=4).double(),
    "everything": lambda: Says(0.0),
    "nothing": lambda: Says(1.0),
}


@pytest.mark.parametrize("kind", SPLITTERS)
@settings(max_examples=6)
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 40), min_size=5, max_size=25),
    fraction=st.floats(0.02, 0.6),
    rows=st.sampled_from([None, "new", "repeated"]),
    warmup=st.integers(0, 5),
    hold_out=st.booleans(),
    capacity=st.integers(2, 50),
    instances=st.integers(2, 50),
)
def test_the_split_covers_the_batch_and_keeps_its_bounds(
    kind, seed, sizes, fraction, rows, warmup, hold_out, capacity, instances
):
    """Whatever a splitter says, and whatever the stream: new rows, rows with replacement, rows without a name."""
    model = network(seed, norm=False)
    each = 5 * 8 + 8  # five inputs and a target
    buffer = ValidationBuffer(
        splitter=SPLITTERS[kind](),
        fraction=fraction,
        hold_out=hold_out,
        capacity=capacity,
        max_bytes=instances * each,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reweighter = MetaReweighter(model, optimizer, validation=buffer, warmup_steps=warmup, every=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sent = shown = 0
    for size in sizes:
        x, y = data(seed + shown, size)
        indices = (
            torch.arange(shown, shown + size) if rows == "new" else torch.randint(60, (size,), generator=generator)
        )
        result = reweighter.step((x, y) if rows is None else (x, y, indices))
        # Every instance is on one side or the other; who is sent is held out, if that is asked for.
        assert result.weights.shape == result.val_mask.shape == result.held_out.shape == (size,)
        assert not result.val_mask.all() and not result.held_out.all()
        assert not result.weights[result.held_out].any()
        assert result.weights[~result.held_out].mean().item() == pytest.approx(1.0, rel=1e-5)
        if not hold_out:
            assert not result.held_out.any()
        elif rows is None or rows == "new":
            assert torch.equal(result.held_out, result.val_mask)
        else:
            trained = set(indices[~result.held_out].tolist())
            gone = set(indices[result.val_mask].tolist())
            assert len(trained & gone) <= 1  # one instance always stays on the training side
            assert len(trained & gone) == 0 or int((~result.held_out).sum()) == 1
        shown += size
        sent += int(result.val_mask.sum())
        assert sent <= 1.5 * fraction * shown + 1
        assert len(buffer) <= min(capacity, instances)
        assert len(buffer) >= min(sent, 1)
    if min(sizes) > 1 and fraction <= 0.5:
        if rows is None and kind != "learned":
            assert sent >= 0.5 * fraction * shown - max(sizes)
        assert sent >= 1


# 7. Save at any step, load in a fresh process, go on: bit-equal to never having stopped.

STEPS = 9
RUNS = {
    "buffer": (
        "after",
        lambda: {"weighting": SignalWeighting(), "validation": ValidationBuffer(capacity=6, fraction=0.3)},
    ),
    "learned": (
        "before",
        lambda: {
            "weighting": SignalWeighting(("loss", "margin")),
            "validation": ValidationBuffer(splitter=LearnedSplitter(("loss", "margin")), hold_out=True, fraction=0.2),
        },
    ),
    "fixed": (
        "before",
        lambda: {
            "weighting": OnlineWeighting(),
            "validation": torch.utils.data.DataLoader(list(zip(*data(9, 14), strict=True)), batch_size=6, shuffle=True),
        },
    ),
    "free": ("after", lambda: {"weighting": FreeWeighting(80), "validation": [data(9), data(10)]}),
}


def train(kind, folder, start):
    """Go on from the state that was saved after ``start`` steps, saving after each."""
    torch.manual_seed(0)
    model = network(0, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    order, options = RUNS[kind]
    reweighter = MetaReweighter(
        model, optimizer, order=order, warmup_steps=2, every=2, weighting_lr=0.05, seed=5, **options()
    )
    if start:
        state = torch.load(folder / f"{start}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        reweighter.load_state_dict(state["reweighter"])
        torch.set_rng_state(state["random"])
    for step in range(start, STEPS):
        x, y = data(step % 4, 20)
        rows = torch.arange(20) + 20 * (step % 4)
        reweighter.step((x, y) if kind == "buffer" and step % 3 == 0 else (x, y, rows))
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "reweighter": reweighter.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, folder / (f"{step + 1}.pt" if start == 0 else f"{start}-{step + 1}.pt"))


@pytest.mark.parametrize("kind", RUNS)
def test_resuming_at_any_step_in_a_fresh_process_is_bit_equal(kind, tmp_path):
    train(kind, tmp_path, 0)
    in_fresh_processes(train, [(kind, tmp_path, start) for start in range(1, STEPS)])
    for start in range(1, STEPS):
        for step in range(start + 1, STEPS + 1):
            resumed, whole = (torch.load(tmp_path / f"{name}.pt") for name in (f"{start}-{step}", step))
            assert_same(resumed, whole)

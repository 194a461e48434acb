"""The invariants that the library promises, as properties (float64)."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same
from test_hypergradients import OPTIMIZERS, relative, validation_loss_after
from torch import nn

from torch_molere import (
    FreeWeighting,
    LearnedSplitter,
    MetaReweighter,
    SignalWeighting,
    hypergradient,
    probabilistic_margin,
)
from torch_molere.weighting import normalised

seeds = st.integers(0, 2**31 - 1)
names = st.sampled_from(sorted(OPTIMIZERS))


class Constant(nn.Module):
    """Equal weights, but a φ that meta-updates run through."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.double))

    def forward(self, samples):
        return self.value.exp() * torch.ones_like(samples.losses)


def network(seed, width=7, classes=3, normalise=True):
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(width)] if normalise else []
    return nn.Sequential(nn.Linear(5, width), *norm, nn.Tanh(), nn.Linear(width, classes)).double()


def data(seed, size, classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator, dtype=torch.double)
    return x, torch.randint(classes, (size,), generator=generator)


# 1. Equal weights and no validation instances: plain training, bit for bit.


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=4)
@given(seed=seeds, size=st.integers(2, 17), value=st.floats(-8, 8), order=st.sampled_from(["after", "before"]))
def test_equal_weights_are_plain_training(name, seed, size, value, order):
    kind, options = OPTIMIZERS[name]
    plain, model = network(seed), network(seed)
    ours, optimizer = kind(model.parameters(), **options), kind(plain.parameters(), **options)
    reweighter = MetaReweighter(
        model,
        ours,
        weighting=Constant(value),
        validation=[data(seed + 1, 6)],
        warmup_steps=1,
        every=2,
        order=order,
        hypergradient="forward",
    )
    for step in range(5):
        x, y = data(seed + 2 + step, size)
        reweighter.step((x, y))
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_same(model.state_dict(), plain.state_dict())
    assert_same(ours.state_dict(), optimizer.state_dict())


# 2. Engines agree with each other and with a central difference.


@given(seed=seeds, name=names, width=st.integers(1, 9), size=st.integers(2, 13), classes=st.integers(2, 5))
def test_engines_agree(seed, name, width, size, classes):
    kind, options = OPTIMIZERS[name]
    model = network(seed, width, classes)
    optimizer = kind(model.parameters(), **options)
    train, validation = data(seed + 1, size, classes), data(seed + 2, size + 1, classes)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    weights = torch.rand(size, dtype=torch.double) + 0.1
    setting = (model, optimizer, train, validation, weights)
    exact = hypergradient(*setting, engine="forward")
    if name.startswith("sgd") and name != "sgd-maximize":
        assert relative(hypergradient(*setting, engine="unrolled"), exact) < 1e-10
    # A derivative as small as this is lost in any difference of losses.
    floor = 1e-7 * size**0.5
    assert (hypergradient(*setting, engine="finite") - exact).norm() <= 1e-4 * exact.norm() + 1e-3 * floor

    direction = torch.randn(size, dtype=torch.double)
    direction /= direction.norm()
    h = 1e-6
    ahead, behind = (validation_loss_after(*setting[:4], weights + s * h * direction) for s in (1, -1))
    assert abs((ahead - behind) / (2 * h) - exact @ direction) <= 1e-3 * exact.norm() + floor


# 3. Weights.

positive = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


@given(raw=positive, seed=seeds, scale=st.floats(1e-6, 1e6))
def test_weights_are_nonnegative_with_mean_one_whatever_their_scale(raw, seed, scale):
    w = torch.tensor(raw, dtype=torch.double)
    training = torch.rand(len(raw), generator=torch.Generator().manual_seed(seed)) < 0.7
    training[0] = True
    bar = normalised(w, training)
    assert (bar >= 0).all()
    assert (bar[~training] == 0).all()
    torch.testing.assert_close(bar[training].mean(), torch.tensor(1.0, dtype=torch.double), rtol=1e-12, atol=0)
    torch.testing.assert_close(normalised(scale * w, training), bar, rtol=1e-12, atol=0)
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(normalised(w[order], training[order]), bar[order], rtol=1e-12, atol=0)


def one_step(x, y, rows=None, seed=0, normalise=True):
    """Weights and Δφ of a step with a fresh free or signal weighting."""
    model = network(seed, normalise=normalise)
    weighting = SignalWeighting(("loss", "margin")) if rows is None else FreeWeighting(64)
    torch.manual_seed(seed)
    nn.init.normal_(weighting.network[-1].weight if rows is None else weighting.scores.weight)
    weighting = weighting.double()
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
    )
    result = reweighter.step((x, y) if rows is None else (x, y, rows))
    return result.weights, [a - b for a, b in zip(weighting.parameters(), before.parameters(), strict=True)]


@given(seed=seeds, size=st.integers(2, 20))
def test_permuting_the_batch_permutes_weights_and_meta_gradients(seed, size):
    (x, y), rows = data(seed, size), torch.arange(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    weights, (change,) = one_step(x, y, rows, seed)
    permuted, (permuted_change,) = one_step(x[order], y[order], rows[order], seed)
    torch.testing.assert_close(permuted, weights[order], rtol=1e-10, atol=1e-12)
    # Each row's own free weight moves by the same, wherever in the batch it stood.
    torch.testing.assert_close(permuted_change, change, rtol=1e-8, atol=1e-12)


@given(seed=seeds, size=st.integers(2, 20), which=st.integers(0, 19))
def test_duplicating_an_instance_duplicates_its_weight(seed, size, which):
    x, y = data(seed, size)
    twice = torch.cat([torch.arange(size), torch.tensor([which % size])])
    weights, _ = one_step(x[twice], y[twice], seed=seed)
    torch.testing.assert_close(weights[-1], weights[which % size], rtol=1e-10, atol=1e-12)
    # Without batch statistics nothing else of the others changes but the normalisation.
    alone, _ = one_step(x, y, seed=seed, normalise=False)
    both, _ = one_step(x[twice], y[twice], seed=seed, normalise=False)
    torch.testing.assert_close(both[:-1] / both[0], alone / alone[0], rtol=1e-10, atol=1e-12)


# 4. A small φ step does not raise L_val(θ⁺).


@given(seed=seeds, name=names, size=st.integers(3, 20))
def test_a_small_step_of_phi_does_not_raise_the_validation_loss(seed, name, size):
    kind, options = OPTIMIZERS[name]
    model = network(seed)
    optimizer = kind(model.parameters(), **options)
    train, validation = data(seed + 1, size), data(seed + 2, 9)
    weighting = SignalWeighting(("loss", "margin")).double()
    nn.init.normal_(weighting.network[-1].weight)
    reweighter = MetaReweighter(
        model,
        optimizer,
        weighting=weighting,
        weighting_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
        validation=[validation],
        warmup_steps=2,
        every=1,
        hypergradient="forward",
    )
    for _ in range(3):
        reweighter.step(train)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    # The weights before and after one φ step, both applied to the same state of θ.
    old = reweighter.step(train).weights
    twin = network(seed)
    twin.load_state_dict(state[0])
    twin_optimizer = kind(twin.parameters(), **options)
    twin_optimizer.load_state_dict(state[1])
    losses = F.cross_entropy(twin(train[0]), train[1], reduction="none").detach()
    twin.load_state_dict(state[0])
    samples = reweighter._samples(((train[0],), {}), network_outputs(twin, train[0]), train[1], losses)
    with torch.no_grad():
        new = normalised(weighting(samples), None)
    before, after = (validation_loss_after(twin, twin_optimizer, train, validation, w) for w in (old, new))
    assert after <= before + 1e-9 * abs(before)


def network_outputs(model, x):
    return copy.deepcopy(model)(x).detach()


# 5. Split.


@settings(max_examples=10)
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 40), min_size=5, max_size=30),
    delta=st.floats(0.02, 0.6),
    bias=st.floats(-6, 6),
    indexed=st.booleans(),
    warmup=st.integers(0, 5),
    hold_out=st.sampled_from([True, False, "auto"]),
)
def test_the_split_covers_the_batch_and_keeps_its_fraction(seed, sizes, delta, bias, indexed, warmup, hold_out):
    """Whatever a splitter says (here: nearly everything, or nearly nothing, is validation)."""
    model = network(seed, normalise=False)
    splitter = LearnedSplitter(("loss",)).double()
    nn.init.constant_(splitter.network[-1].bias, bias)
    reweighter = MetaReweighter(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        splitter=splitter,
        val_fraction=delta,
        warmup_steps=warmup,
        every=2,
        buffer_size=50,
        hold_out=hold_out,
        seed=seed,
    )
    sent, shown, first = 0, 0, 0
    for size in sizes:
        x, y = data(seed + shown, size)
        rows = torch.arange(first, first + size)
        first += size
        result = reweighter.step((x, y, rows) if indexed else (x, y))
        assert result.weights.shape == result.val_mask.shape == (size,)
        left_out = result.weights == 0
        if hold_out == "auto":
            assert not (left_out & ~result.val_mask).any() and (indexed or not left_out.any())
        else:
            assert torch.equal(left_out, result.val_mask & hold_out)
        assert not result.val_mask.all()
        torch.testing.assert_close(
            result.weights[~left_out].mean(), torch.tensor(1.0, dtype=torch.double), rtol=1e-5, atol=0
        )
        # Unless something was released, replaced or, held out at random, not let in.
        if indexed and result.val_loss is None and len(reweighter.buffer) < 50 and hold_out != "auto":
            assert {int(r) for r in rows[result.val_mask]} <= set(reweighter.buffer.rows)
        shown += size
        sent += int(result.val_mask.sum())
        assert sent <= 1.5 * delta * shown + 1
        assert len(reweighter.buffer) <= 50
        if sent:
            assert len(reweighter.buffer) >= 1
    if min(sizes) >= 4 and not indexed:
        assert sent >= 0.5 * delta * shown - max(sizes)


# 6. Margins.

logits = st.lists(st.floats(-30, 30), min_size=2, max_size=6)


@given(row=logits, target=st.integers(0, 5), shift=st.floats(-100, 100))
def test_margins(row, target, shift):
    z, y = torch.tensor([row], dtype=torch.double), torch.tensor([target % len(row)])
    margin = probabilistic_margin(z, y)
    assert -1 <= margin <= 1
    p = z.softmax(1)[0]
    others = max(p[c] for c in range(len(row)) if c != y)
    assert abs(margin - (p[y] - others)) <= 1e-15
    if others != p[y]:
        assert (margin > 0) == (z.argmax() == y)
    torch.testing.assert_close(probabilistic_margin(z + shift, y), margin, rtol=1e-9, atol=1e-12)


# 7. Save at any step, load in a fresh process, go on: bit-equal to never having stopped.

SCRIPT = """
import sys, torch
from torch import nn
from torch_molere import FreeWeighting, LearnedSplitter, MetaReweighter, SignalWeighting

source, target, order, engine, kind, start, stop = sys.argv[1:]

def batch(step):
    generator = torch.Generator().manual_seed(step % 4)
    x = torch.randn(20, 5, generator=generator, dtype=torch.double)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long(), torch.arange(20) + 20 * (step % 4)

torch.manual_seed(0)
layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)]
model = nn.Sequential(*layers).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = torch.utils.data.DataLoader(list(zip(*batch(9)[:2])), batch_size=6, shuffle=True)
options = {
    "fixed": dict(validation=loader, weighting=FreeWeighting(80)),
    "buffer": dict(weighting=SignalWeighting(("loss", "margin")), splitter=LearnedSplitter(("loss", "margin"))),
}[kind]
reweighter = MetaReweighter(
    model, optimizer, hypergradient=engine, order=order, warmup_steps=3, every=2, weighting_lr=0.05, seed=5, **options
)
if source != "none":
    state = torch.load(source, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    reweighter.load_state_dict(state["reweighter"])
    torch.set_rng_state(state["random"])
for step in range(int(start), int(stop)):
    x, y, rows = batch(step)
    reweighter.step((x, y) if kind == "buffer" and step % 3 == 0 else (x, y, rows))
torch.save(
    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "reweighter": reweighter.state_dict(),
     "random": torch.get_rng_state()}, target)
"""


def run_in_a_fresh_process(source, target, *arguments):
    command = [sys.executable, "-c", SCRIPT, source, target, *arguments]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return torch.load(target, weights_only=True)


STOPPED = [("after", "auto", "buffer"), ("before", "auto", "fixed"), ("after", "forward", "fixed")]


@pytest.fixture(scope="module", params=STOPPED)
def never_stopped(request, tmp_path_factory):
    whole = run_in_a_fresh_process("none", tmp_path_factory.mktemp("whole") / "whole.pt", *request.param, 0, 12)
    return request.param, whole


@settings(max_examples=2)
@given(stop=st.integers(1, 11))
def test_resuming_in_a_fresh_process_is_bit_equal(tmp_path_factory, never_stopped, stop):
    arguments, whole = never_stopped
    folder = tmp_path_factory.mktemp("resumed")
    run_in_a_fresh_process("none", folder / "half.pt", *arguments, 0, stop)
    resumed = run_in_a_fresh_process(folder / "half.pt", folder / "resumed.pt", *arguments, stop, 12)
    assert_same(resumed, whole)

"""Saved and loaded: bit-equal afterwards, at any step; or a ValueError says why not, and nothing has changed."""

import copy
import io
import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from same import assert_same
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torch_molere import (
    FreeWeighting,
    InputWeighting,
    LearnedSplitter,
    MetaReweighter,
    OnlineWeighting,
    RandomWeighting,
    SignalWeighting,
    ValidationBuffer,
)

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 10, 3


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(B, 4, generator=generator), torch.randint(C, (B,), generator=generator)
    return x, y, (torch.arange(B) * 3 + seed) % 40


class Augmented(Dataset):
    """Rows with noise of NumPy's, Python's and PyTorch's global streams, as augmentations draw it."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        x = torch.full((4,), float(row)).sin()
        noise = np.random.normal() + random.gauss(0, 1) + torch.randn(())
        return x + 0.1 * noise, row % C


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        for row in range(8):
            yield torch.randn(4) + np.random.rand(), row % C


def phi_by_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def network(width=4):
    first = nn.Linear(width, 5, bias=False)  # whose gradient, before batch normalisation, would be rounding alone
    return nn.Sequential(first, nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, C))


KINDS = {
    "buffer": lambda: {"validation": ValidationBuffer(capacity=12, fraction=0.3)},
    "held out": lambda: {"validation": ValidationBuffer(capacity=12, fraction=0.3, hold_out=True), "order": "before"},
    "learned splitter": lambda: {
        "validation": ValidationBuffer(splitter=LearnedSplitter(network=network()), capacity=12, fraction=0.3),
        "weighting": InputWeighting.from_classifier(network(), C),
    },
    "fixed": lambda: {"validation": [batch(90)[:2], batch(91)[:2]], "weighting": FreeWeighting(100)},
    "augmented": lambda: {"validation": DataLoader(Augmented(), batch_size=5, shuffle=True)},
    "own generator": lambda: {
        "validation": DataLoader(Augmented(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    },
    "iterable": lambda: {"validation": DataLoader(Stream(), batch_size=4), "order": "before"},
    "momentum": lambda: {
        "weighting": SignalWeighting(hidden=5),
        "weighting_optimizer": phi_by_momentum,
        "validation": ValidationBuffer(fraction=0.3),
    },
    "from the evidence": lambda: {"weighting": OnlineWeighting(), "validation": [batch(90)[:2]]},
    "control": lambda: {"weighting": RandomWeighting(), "validation": ValidationBuffer(fraction=0.3)},
}


def reweighter_of(kind, steps=0, seed=0, **options):
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"warmup_steps": 1, "every": 2, "hypergradient": "finite", "seed": seed, **KINDS[kind](), **options}
    reweighter = MetaReweighter(model, optimizer, **options)
    for step in range(steps):
        reweighter.step(batch(step))
    return reweighter


def saved(*things):
    """Through a file, as ``torch.load(weights_only=True)`` reads it."""
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in things] + [torch.get_rng_state()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(reweighter):
    result = reweighter.result
    return copy.deepcopy(
        (reweighter.model.state_dict(), reweighter.state_dict(), {} if result is None else vars(result))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_any_step_goes_on_bit_for_bit(kind):
    """26, and DESIGN section 8, 7. A fresh reweighter, whatever the global streams of NumPy and Python stand at."""
    whole = reweighter_of(kind)
    states, expected = [], []
    for step in range(7):
        states.append(saved(whole.model, whole.optimizers[0], whole))
        whole.step(batch(step))
        expected.append(everything(whole))
    assert whole.meta_updates == 3
    for start in range(7):
        resumed = reweighter_of(kind, seed=0)
        np.random.seed(start)
        random.seed(start)
        *parts, stream = states[start]
        for thing, state in zip((resumed.model, resumed.optimizers[0], resumed), parts, strict=True):
            thing.load_state_dict(state)
        torch.set_rng_state(stream)
        for step in range(start, min(start + 3, 7)):
            resumed.step(batch(step))
            assert_same(everything(resumed), expected[step])


@pytest.mark.parametrize("kind", ["augmented", "own generator", "iterable", "learned splitter", "control"])
@pytest.mark.parametrize("order", ["after", "before"])
def test_global_random_streams_are_those_of_a_plain_loop(kind, order):
    """26. Neither read nor moved, also by steps that are refused."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    reweighter = reweighter_of(kind, order=order)
    plain = copy.deepcopy(reweighter.model)
    torch.manual_seed(7)

    def streams():
        return str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()

    for step in range(6):
        before = streams()
        x, y, rows = batch(step)
        with pytest.raises(FloatingPointError):
            reweighter.step((x.fill_(torch.nan) if step % 2 else x / 0, y, rows))
        for part, found in zip(before[:2], streams()[:2], strict=True):
            assert part == found
        torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
        plain(batch(step)[0])
        expected = streams()
        torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
        reweighter.step(batch(step))
        assert streams() == expected


def test_numbers_that_are_drawn_do_not_depend_on_what_the_loop_draws():
    """26."""
    results = []
    for drawn in (0, 3):
        reweighter = reweighter_of("augmented")
        for step in range(4):
            np.random.rand(drawn)
            [random.random() for _ in range(drawn)]
            torch.manual_seed(step)
            reweighter.step(batch(step))
        results.append(everything(reweighter))
    assert_same(*results)


# 25. Two reweighters on one optimizer.


def test_a_cell_run_twice_replaces_the_first_reweighter(caplog):
    """25. With a warning; the old one is closed, and nothing is done twice."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    first = MetaReweighter(model, optimizer, warmup_steps=1, every=1)
    with caplog.at_level(logging.WARNING):
        second = MetaReweighter(model, optimizer, warmup_steps=1, every=1)
    assert [r.message for r in caplog.records if "had a MetaReweighter already" in r.message]
    assert len(model._forward_hooks) == len(optimizer._optimizer_step_pre_hooks) == 1
    alone = MetaReweighter(twin, twin_optimizer, warmup_steps=1, every=1)
    for step in range(4):
        torch.manual_seed(step)
        second.step(batch(step))
        torch.manual_seed(step)
        alone.step(batch(step))
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(second.state_dict(), alone.state_dict())
    assert first.steps == 0
    with pytest.raises(RuntimeError, match="closed"):
        first.step(batch(9))


def test_a_replaced_reweighter_of_two_optimizers_is_closed_whole():
    """25."""
    model = network()
    head, body = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[4], model[:4]))
    first = MetaReweighter(model, [body, head])
    second = MetaReweighter(model, head)
    assert not body._optimizer_step_pre_hooks
    second.close()
    assert not model._forward_hooks
    assert not head._optimizer_step_pre_hooks
    assert first.steps == 0


def test_a_reweighter_that_was_closed_leaves_the_optimizer_to_another(caplog):
    """25."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    MetaReweighter(model, optimizer).close()
    reweighter = MetaReweighter(model, optimizer)
    reweighter.close()
    del reweighter
    MetaReweighter(model, optimizer)
    assert not [r.message for r in caplog.records if "had a MetaReweighter already" in r.message]


# 25. Bad states.

GOOD = {kind: copy.deepcopy(reweighter_of(kind, 5, seed=3).state_dict()) for kind in ("buffer", "fixed", "momentum")}
GOOD["learned splitter"] = copy.deepcopy(reweighter_of("learned splitter", 5, seed=3).state_dict())


def first_tensor(tree):
    return next(value for value in tree.values() if isinstance(value, torch.Tensor) and value.is_floating_point())


def set_nan(part):
    return lambda state: first_tensor(part(state)).view(-1)[:1].fill_(torch.nan)


def set_rate(part, value):
    return lambda state: part(state)["param_groups"][0].update(lr=value)


BAD = {
    "φ of NaN": ("buffer", set_nan(lambda s: s["weighting"]), "parameters must be finite"),
    "an infinite φ": ("buffer", lambda s: first_tensor(s["weighting"]).mul_(torch.inf), "parameters must be finite"),
    "a moment of NaN": ("momentum", set_nan(lambda s: s["weighting_optimizer"]["state"][0]), "numbers must be finite"),
    "Θ of NaN": ("learned splitter", set_nan(lambda s: s["validation"]["splitter"]), "parameters must be finite"),
    "Θ's moment": (
        "learned splitter",
        set_nan(lambda s: s["validation"]["optimizer"]["state"][0]),
        "optimizer's numbers must be finite",
    ),
    "φ's rate": ("buffer", set_rate(lambda s: s["weighting_optimizer"], -0.1), r"number ≥ 0, got -0.1"),
    "φ's rate of NaN": ("buffer", set_rate(lambda s: s["weighting_optimizer"], float("nan")), "number ≥ 0, got nan"),
    "φ's infinite rate": ("buffer", set_rate(lambda s: s["weighting_optimizer"], float("inf")), "number ≥ 0, got inf"),
    "Θ's rate": (
        "learned splitter",
        set_rate(lambda s: s["validation"]["optimizer"], -1.0),
        "lr must be a finite number ≥ 0",
    ),
    "infinite free weights": ("fixed", lambda s: s["weighting"]["scores.weight"].fill_(torch.inf), "must be finite"),
    "another rank": ("buffer", lambda s: s.update(rank=[1, 2]), r"rank and world size \[1, 2\], here is rank 0 of 1"),
    "rank 0 of two": ("buffer", lambda s: s.update(rank=[0, 2]), r"rank and world size \[0, 2\]"),
    "another version": ("buffer", lambda s: s.update(version=1), "version 2, got 1"),
    "another weighting": (
        "buffer",
        lambda s: s["configuration"].update(weighting="FreeWeighting"),
        r"another configuration: weighting='FreeWeighting' \(here 'SignalWeighting'\)",
    ),
    "steps below zero": ("buffer", lambda s: s.update(steps=-1), "steps must be an integer ≥ 0"),
    "no history": ("buffer", lambda s: s.pop("history"), "'history' is missing"),
    "rows twice": ("buffer", lambda s: s["history"]["rows"].fill_(1), "rows must be different"),
    "more instances than the buffer takes": (
        "buffer",
        lambda s: s["validation"]["store"].update(rows=list(range(99))),
        "must have one length",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_state_is_refused_and_changes_nothing(case):
    """25."""
    kind, spoil, message = BAD[case]
    state = copy.deepcopy(GOOD[kind])
    spoil(state)
    reweighter = reweighter_of(kind, 3)
    before = copy.deepcopy(reweighter.state_dict())
    with pytest.raises(ValueError, match=message):
        reweighter.load_state_dict(state)
    assert_same(reweighter.state_dict(), before)
    reweighter.step(batch(7))


@pytest.mark.parametrize("state", [None, {}, [], {"version": 2}, {"version": True}, nn.Linear(2, 2).state_dict()])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="state_dict must"):
        reweighter_of("buffer").load_state_dict(state)


def test_data_of_users_may_be_nan_or_infinite():
    """Missing values and masks of -inf among the inputs held are no fault of a state."""

    class Forgiving(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, C)

        def forward(self, x):
            return self.layer(x.nan_to_num(posinf=0.0, neginf=0.0))

    def made():
        torch.manual_seed(0)
        model = Forgiving()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return MetaReweighter(model, optimizer, warmup_steps=1, every=1, validation=ValidationBuffer(fraction=0.3))

    reweighter = made()
    for step in range(3):
        x, y, rows = batch(step)
        x[:, 0], x[:, 1] = torch.nan, -torch.inf
        reweighter.step((x, y, rows))
    other = made()
    other.load_state_dict(reweighter.state_dict())
    assert_same(other.state_dict(), reweighter.state_dict())


@pytest.mark.parametrize("kind", GOOD)
def test_nothing_is_shared_with_the_state_that_was_loaded(kind):
    state = copy.deepcopy(GOOD[kind])
    reweighter = reweighter_of(kind)
    reweighter.load_state_dict(state)
    assert_same(reweighter.state_dict(), GOOD[kind])
    for step in range(3):
        reweighter.step(batch(step))
    assert_same(state, GOOD[kind])


WRONG = [None, -1, 0, 3, 10**30, True, 0.5, float("nan"), "auto", b"", [], {}, (1, 2), [None], {"a": 1}, ...]
WRONG += [torch.zeros(2), torch.zeros(0), torch.zeros(3, 1, 2), torch.ones(1, dtype=torch.long), torch.tensor(1.0)]


def damage(data, tree):
    """Walks down to a random place and leaves something else there."""
    while True:
        keys = sorted(tree, key=str) if isinstance(tree, dict) else list(range(len(tree)))
        key = data.draw(st.sampled_from(keys))
        below = tree[key]
        if isinstance(below, (dict, list)) and below and data.draw(st.integers(0, 3)):
            tree = below
            continue
        ways = ["drop", "wrong", "add"] + ["shape", "type"] * isinstance(below, torch.Tensor)
        way = data.draw(st.sampled_from(ways))
        if way == "drop":
            del tree[key]
        elif way == "wrong":
            tree[key] = copy.copy(data.draw(st.sampled_from(WRONG)))
        elif way == "add":
            wrong = data.draw(st.sampled_from(WRONG))
            if isinstance(tree, dict):
                tree["more"] = wrong
            else:
                tree.insert(key, wrong)
        elif way == "shape":
            tree[key] = data.draw(st.sampled_from([below[None], below.flatten()[:1], torch.cat([below.flatten()] * 2)]))
        else:
            tree[key] = below.to(data.draw(st.sampled_from([torch.long, torch.bool, torch.double, torch.complex64])))
        return


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=30, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
@given(data=st.data(), steps=st.sampled_from([0, 3]))
def test_a_malformed_state_loads_or_changes_nothing(kind, data, steps):
    """25. A damaged file is refused with everything as it was; or it loads, and training goes on and can be saved."""
    state = copy.deepcopy(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 2))):
        damage(data, state)
    reweighter = reweighter_of(kind, steps)
    reweighter.loss(reweighter.model(batch(7)[0]), *batch(7)[1:]).backward()  # a step is under way
    before, pending = copy.deepcopy(reweighter.state_dict()), list(reweighter.attachment.active)
    try:
        reweighter.load_state_dict(state)
    except ValueError:
        assert_same(reweighter.state_dict(), before)
        assert reweighter.attachment.active == pending
    else:
        for step in range(2):
            assert torch.isfinite(reweighter.step(batch(step)).loss)
        again = reweighter_of(kind)
        again.load_state_dict(reweighter.state_dict())
        assert_same(again.state_dict(), reweighter.state_dict())


@pytest.mark.parametrize("seed", [-1, 2.0, "0", None, 2**63])
def test_seeds(seed):
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="seed must be"):
        MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed)


@pytest.mark.parametrize("kind", ["buffer", "augmented", "learned splitter", "control"])
def test_large_seeds(kind):
    """Everything that is derived from a seed stays a seed."""
    reweighter = reweighter_of(kind, 3, seed=2**63 - 1)
    assert torch.isfinite(reweighter.step(batch(3)).val_loss)


def test_seeds_give_other_runs():
    splits = [reweighter_of("buffer", 3, seed=seed).validation.store.rows for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_a_state_of_a_longer_validation_set_goes_on_from_the_beginning():
    state = copy.deepcopy(GOOD["fixed"])
    state["validation"]["position"] = 10**30
    reweighter = reweighter_of("fixed")
    reweighter.load_state_dict(state)
    for step in range(4):
        reweighter.step(batch(step))
    found = reweighter.state_dict()["validation"]
    assert found["pass"] == state["validation"]["pass"] + 1
    assert found["position"] in (1, 2)


def test_state_of_a_loader_without_workers_is_small():
    """A fixed set is not saved with the state."""
    data = TensorDataset(torch.randn(5000, 4), torch.randint(C, (5000,)))
    reweighter = reweighter_of("fixed", validation=DataLoader(data, batch_size=10))
    for step in range(3):
        reweighter.step(batch(step))
    file = io.BytesIO()
    torch.save(reweighter.state_dict(), file)
    assert file.tell() < 50_000

"""Whatever a state looks like: it loads and works, or a ValueError says why not and nothing has changed."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same
from torch import nn

from torch_molere import FreeWeighting, MetaReweighter, SignalWeighting

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = int(os.environ.get("TORCH_MOLERE_EXAMPLES", "50"))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(10, 4, generator=generator),
        torch.randint(3, (10,), generator=generator),
        torch.arange(10) + seed,
    )


KINDS = {
    "buffer": lambda: {},
    "fixed": lambda: {"validation": [batch(90)[:2], batch(91)[:2]], "weighting": FreeWeighting(100)},
    "momentum": lambda: {
        "weighting": SignalWeighting(hidden=5),
        "weighting_optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    },
}


def reweighter_of(kind, steps, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"warmup_steps": 1, "every": 1, "hypergradient": "finite", "buffer_size": 12, "seed": seed}
    reweighter = MetaReweighter(model, optimizer, **options, **KINDS[kind]())
    for step in range(steps):
        reweighter.step(batch(step))
    return reweighter


GOOD = {kind: copy.deepcopy(reweighter_of(kind, 5, seed=3).state_dict()) for kind in KINDS}
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
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), steps=st.sampled_from([0, 3]))
def test_a_malformed_state_loads_or_changes_nothing(kind, data, steps):
    state = copy.deepcopy(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 2))):
        damage(data, state)
    reweighter = reweighter_of(kind, steps)
    reweighter.loss(reweighter.model(batch(7)[0]), *batch(7)[1:]).backward()  # an update is under way
    before, pending = copy.deepcopy(reweighter.state_dict()), list(reweighter._weighted)
    try:
        reweighter.load_state_dict(state)
    except ValueError:
        assert_same(reweighter.state_dict(), before)
        assert reweighter._weighted == pending
    else:
        for step in range(2):
            assert torch.isfinite(reweighter.step(batch(step)).loss)
        again = reweighter_of(kind, 0)
        again.load_state_dict(reweighter.state_dict())
        assert_same(again.state_dict(), reweighter.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_state_loads(kind):
    reweighter = reweighter_of(kind, 2)
    reweighter.load_state_dict(GOOD[kind])
    assert_same(reweighter.state_dict(), GOOD[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_shared_with_the_state_that_was_loaded(kind):
    state = copy.deepcopy(GOOD[kind])
    reweighter = reweighter_of(kind, 0)
    reweighter.load_state_dict(state)
    for step in range(3):
        reweighter.step(batch(step))
    assert_same(state, GOOD[kind])


def test_a_buffer_larger_than_the_cap_is_refused():
    reweighter = reweighter_of("buffer", 0)
    reweighter.buffer.max_bytes = 100
    with pytest.raises(ValueError, match="more than buffer_bytes=100"):
        reweighter.load_state_dict(GOOD["buffer"])


@pytest.mark.parametrize("seed", [-1, 2.0, "0", None, 2**63])
def test_seeds(seed):
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="seed must be"):
        MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_large_seeds(kind):
    """Everything that is derived from a seed stays a seed."""
    reweighter = reweighter_of(kind, 3, seed=2**63 - 1)
    assert torch.isfinite(reweighter.step(batch(3)[:2] if kind != "fixed" else batch(3)).val_loss)

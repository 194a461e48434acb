"""Reweighters beside each other, copies of what they hold, and what is left when they go."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import (
    FreeWeighting,
    InputWeighting,
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    RandomSplitter,
    Samples,
    SignalWeighting,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return (
        torch.randn(12, 5, generator=generator),
        torch.randint(3, (12,), generator=generator),
        torch.arange(12) + number,
    )


class Pair:
    """A model and a reweighter of one of several kinds."""

    def __init__(self, kind):
        torch.manual_seed(kind)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options = [
            {"hypergradient": "finite"},
            {"hypergradient": "forward", "order": "before", "weighting": SignalWeighting(("loss", "margin"))},
            {"hypergradient": "forward", "validation": [batch(90)[:2], batch(91)[:2]]},
        ][kind]
        self.reweighter = MetaReweighter(self.model, self.optimizer, warmup_steps=2, every=2, seed=kind, **options)

    def step(self, number):
        self.reweighter.step(batch(number))

    def state(self):
        return copy.deepcopy([thing.state_dict() for thing in (self.model, self.optimizer, self.reweighter)])


def alone(kind, steps):
    pair = Pair(kind)
    for number in range(steps):
        pair.step(number)
    return pair.state()


def test_interleaved_is_each_alone():
    expected = [alone(kind, 12) for kind in range(3)]
    pairs = [Pair(kind) for kind in range(3)]
    random = torch.get_rng_state()
    for number in range(12):
        for pair in pairs[:: 1 if number % 2 else -1]:
            pair.step(number)
    assert torch.equal(torch.get_rng_state(), random)
    for pair, states in zip(pairs, expected, strict=True):
        assert_same(pair.state(), states)


def test_halves_of_steps_may_interleave():
    """loss of one, loss of the other, updates in either order."""
    expected = [alone(kind, 8) for kind in (0, 1)]
    pairs = [Pair(kind) for kind in (0, 1)]
    for number in range(8):
        x, *rest = batch(number)
        for pair in pairs:
            pair.optimizer.zero_grad()
        losses = [pair.reweighter.loss(pair.model(x), *rest) for pair in pairs]
        for loss in reversed(losses):
            loss.backward()
        for pair in pairs:
            pair.optimizer.step()
    for pair, states in zip(pairs, expected, strict=True):
        assert_same(pair.state(), states)


def test_threads_with_models_of_their_own():
    """Rows by index and models without dropout draw nothing from the stream that threads share."""
    expected = [alone(kind, 30) for kind in range(3)]
    found, failures = [None] * 3, []
    pairs = [Pair(kind) for kind in range(3)]
    start = threading.Barrier(3)

    def run(kind):
        try:
            start.wait()
            for number in range(30):
                pairs[kind].step(number)
            found[kind] = pairs[kind].state()
        except BaseException as error:
            failures.append(error)

    random = torch.get_rng_state()
    threads = [threading.Thread(target=run, args=(kind,)) for kind in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_rng_state(random)
    assert not failures
    assert_same(found, expected)


@pytest.mark.parametrize("way", ["close", "with", "let go"])
def test_what_is_left_trains_plainly(way):
    """Model and optimizer of a reweighter that is gone go on as copies that never had one."""
    pair = Pair(0)
    if way == "with":
        with pair.reweighter:
            pair.step(0)
            pair.step(1)
    else:
        for number in range(4):
            pair.step(number)
    model, optimizer = pair.model, pair.optimizer
    if way == "close":
        pair.reweighter.close()
        pair.reweighter.close()  # twice does no harm
    del pair.reweighter, pair
    gc.collect()
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for number in range(3):
        x, y, _ = batch(number)
        for network, updates in ((model, optimizer), (twin, twin_optimizer)):
            updates.zero_grad()
            F.cross_entropy(network(x), y).backward()
            updates.step()
    assert_same((model.state_dict(), optimizer.state_dict()), (twin.state_dict(), twin_optimizer.state_dict()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_of_model_and_optimizer_are_plain(copied):
    """While the reweighter lives; the copies train without it and it does not notice."""
    pair = Pair(0)
    for number in range(4):
        pair.step(number)
    model, optimizer = copied((pair.model, pair.optimizer))
    assert_same((model.state_dict(), optimizer.state_dict()), (pair.model.state_dict(), pair.optimizer.state_dict()))
    before = pair.state()
    x, y, _ = batch(9)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_same(pair.state(), before)
    assert pair.reweighter._call is None
    for number in range(4, 6):
        pair.step(number)
    assert_same(pair.state(), alone(0, 6))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_reweighter_says_why_it_cannot_be_copied(copied):
    pair = Pair(0)
    with pytest.raises(TypeError, match=r"save state_dict\(\) and load it into a new MetaReweighter"):
        copied(pair.reweighter)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_results_samples_and_networks_can_be_copied(copied):
    pair = Pair(0)
    for number in range(4):
        pair.step(number)
    assert_same(vars(copied(pair.reweighter.result)), vars(pair.reweighter.result))
    x, y, rows = batch(0)
    with torch.no_grad():
        outputs = pair.model.eval()(x)
    losses = F.cross_entropy(outputs, y, reduction="none")
    samples = Samples(((x,), {}), y, outputs, losses, outputs.argmax(1) == y, rows)
    assert_same(vars(copied(samples)), vars(samples))
    for network in (
        SignalWeighting(("loss", "label"), num_classes=3),
        InputWeighting(nn.Linear(5, 1)),
        InputWeighting.from_classifier(pair.model, 3),
        FreeWeighting(20),
        LearnedSplitter(("margin", "probabilities"), num_classes=3),
        LearnedSplitter(network=nn.Linear(5, 3)),
        RandomSplitter(0.2, seed=4),
        MarginSplitter("easy"),
    ):
        assert_same(copied(network)(samples).detach(), network(samples).detach())

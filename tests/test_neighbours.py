"""Reweighters beside each other, and copies of what they hold."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from some_samples import some_samples
from torch import nn

from torch_molere import (
    FreeWeighting,
    InputWeighting,
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    OnlineWeighting,
    RandomSplitter,
    SignalWeighting,
    ValidationBuffer,
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

    def __init__(self, kind, **others):
        torch.manual_seed(kind)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options = [
            {"hypergradient": "finite"},
            {"hypergradient": "forward", "order": "before", "weighting": SignalWeighting(("loss", "margin"))},
            {"hypergradient": "forward", "validation": [batch(90)[:2], batch(91)[:2]]},
        ][kind] | others
        self.reweighter = MetaReweighter(self.model, self.optimizer, warmup_steps=2, every=2, seed=kind, **options)

    def step(self, number):
        self.reweighter.step(batch(number))

    def state(self):
        return copy.deepcopy([thing.state_dict() for thing in (self.model, self.optimizer, self.reweighter)])


def alone(kind, steps, **others):
    pair = Pair(kind, **others)
    for number in range(steps):
        pair.step(number)
    assert pair.reweighter.meta_updates > 0
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


def test_two_losses_in_one_backward():
    """The sum of two models' losses, each with a reweighter of its own."""
    expected = [alone(kind, 8) for kind in (0, 1)]
    pairs = [Pair(kind) for kind in (0, 1)]
    for number in range(8):
        x, *rest = batch(number)
        for pair in pairs:
            pair.optimizer.zero_grad()
        sum(pair.reweighter.loss(pair.model(x), *rest) for pair in pairs).backward()
        for pair in pairs:
            pair.optimizer.step()
    for pair, states in zip(pairs, expected, strict=True):
        assert_same(pair.state(), states)


def test_threads_with_models_of_their_own():
    """A split by row and models without dropout draw nothing from the stream that threads share."""

    def others(kind):
        return {} if kind == 2 else {"validation": ValidationBuffer(splitter=RandomSplitter(), fraction=0.2)}

    expected = [alone(kind, 20, **others(kind)) for kind in range(3)]
    found, failures = [None] * 3, []
    pairs = [Pair(kind, **others(kind)) for kind in range(3)]
    start = threading.Barrier(3)

    def run(kind):
        try:
            start.wait()
            for number in range(20):
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
    for number in range(4, 6):
        pair.step(number)
    assert_same(pair.state(), alone(0, 6))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_results_samples_and_networks_can_be_copied(copied):
    pair = Pair(0)
    for number in range(5):
        pair.step(number)
    assert pair.reweighter.result.meta_gradient is not None
    assert_same(vars(copied(pair.reweighter.result)), vars(pair.reweighter.result))
    samples = some_samples(indices=torch.arange(8), arguments=((torch.randn(8, 5),), {}))
    assert_same(vars(copied(samples)), vars(samples))
    for network in (
        SignalWeighting(("loss", "label"), num_classes=3),
        InputWeighting(nn.Linear(5, 1)),
        InputWeighting.from_classifier(pair.model, 3),
        FreeWeighting(20),
        OnlineWeighting(),
        LearnedSplitter(("margin", "probabilities"), num_classes=3),
        LearnedSplitter(network=nn.Linear(5, 3)),
        RandomSplitter(0.2, seed=4),
        MarginSplitter(2.0, trim=0.1),
    ):
        torch.manual_seed(0)
        expected = network(samples).detach()
        torch.manual_seed(0)
        assert_same(copied(network)(samples).detach(), expected)

"""Whatever is done to a run, in whatever order: it stays plain weighted training, and every save goes on bit-equal.

Hypothesis draws the sequences. ``TORCH_MOLERE_SEQUENCES`` sets how many there are.
"""

import copy
import io
import os

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from same import assert_same
from torch import nn

from torch_molere import (
    LearnedSplitter,
    MarginSplitter,
    MetaReweighter,
    RandomSplitter,
    SignalWeighting,
    ValidationBuffer,
)

SEQUENCES = int(os.environ.get("TORCH_MOLERE_SEQUENCES", "20"))
SPLITTERS = {
    "margin": MarginSplitter,
    "hard": lambda: MarginSplitter(float("inf")),
    "random": RandomSplitter,
    "learned": lambda: LearnedSplitter(("loss",), hidden=4),
}


class Fault:
    """Raises at the n-th forward from now on."""

    def __init__(self):
        self.left, self.error, self.calls = 0, None, 0

    def called(self):
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise self.error("out of memory")


class Middle(nn.Tanh):
    """Part of a model, where a forward may fail."""

    def __init__(self):
        super().__init__()
        self.fault = Fault()

    def forward(self, x):
        self.fault.called()
        return super().forward(x)


def trained(seed):
    """A model, an optimizer of a part of it, and a scheduler."""
    random = torch.get_rng_state()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), Middle(), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, 4))
    torch.set_rng_state(random)
    optimizer = torch.optim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


class Run:
    """A run with a reweighter and its plain twin: the same loop with the reweighter's weights and nothing else."""

    def __init__(self, options, seed, groups=1):
        self.options, self.groups, self.classes = options, 1, 2
        self.model, self.optimizer, self.scheduler = trained(seed)
        self.twin, self.twin_optimizer, self.twin_scheduler = trained(seed)
        self.reweighter = self.reweighted()
        self.parameters = list(self.model.parameters())
        self.updates = self.shown = self.sent = 0
        self.accumulated = False
        for _ in range(1, groups):
            self.add_group()

    def reweighted(self):
        random = torch.get_rng_state()
        torch.manual_seed(1)
        chosen = dict(self.options)
        if "splitter" in chosen:
            buffer = {name: chosen.pop(name) for name in ("splitter", "fraction", "hold_out", "capacity")}
            buffer["splitter"] = SPLITTERS[buffer["splitter"]]()
            chosen["validation"] = ValidationBuffer(**buffer, lr=0.05)
        phi = SignalWeighting(hidden=4)
        torch.set_rng_state(random)
        return MetaReweighter(self.model, self.optimizer, weighting=phi, weighting_lr=0.05, **chosen)

    def stateful(self):
        names = ("model", "optimizer", "scheduler", "reweighter", "twin", "twin_optimizer", "twin_scheduler")
        return {name: getattr(self, name) for name in names}

    def state(self):
        return copy.deepcopy(
            [{name: thing.state_dict() for name, thing in self.stateful().items()}, torch.get_rng_state()]
        )

    def batch(self, number, size, indexed):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(size, 4, generator=generator), torch.randint(self.classes, (size,), generator=generator)
        rows = torch.randint(40, (size,), generator=generator)  # some of them twice
        return (x, y, rows) if indexed else (x, y)

    # What can be done to it; each by the same call to the twin.

    def update(self, numbers, sizes, indexed, own_loop):
        """One optimizer step, on one batch or on several that accumulate."""
        batches = [self.batch(number, size, indexed) for number, size in zip(numbers, sizes, strict=True)]
        random, results = torch.get_rng_state(), []
        if not own_loop:
            results = [self.reweighter.step(batches[0])]
        else:
            self.optimizer.zero_grad()
            for x, *rest in batches:
                (self.reweighter.loss(self.model(x), *rest) / len(batches)).backward()
                results.append(self.reweighter.result)
            self.optimizer.step()
        result, after = self.reweighter.result, torch.get_rng_state()
        torch.set_rng_state(random)
        self.twin_optimizer.zero_grad()
        losses = []
        for (x, y, *_), own in zip(batches, results, strict=True):
            losses.append(weighted_loss(self.twin(x), y, own))
            (losses[-1] / len(batches) if own_loop else losses[-1]).backward()
            self.check(own, len(y))
        self.twin_optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
        assert_same(result.loss, torch.stack(losses).mean().detach())
        for name in ("weights", "held_out", "val_mask"):  # the result of a step covers all its batches
            assert_same(getattr(result, name), torch.cat([getattr(own, name) for own in results]))
        if result.val_loss is not None:
            assert result.meta_gradient.shape == result.weights.shape
        self.updates += 1
        self.accumulated |= len(batches) > 1

    def check(self, result, size):
        side = ~result.held_out
        assert result.weights.shape == result.val_mask.shape == result.held_out.shape == (size,)
        assert side.any()
        assert (result.weights >= 0).all()
        assert (result.weights[~side] == 0).all()
        torch.testing.assert_close(result.weights[side].mean(), torch.tensor(1.0))
        if self.reweighter.max_weight is not None:
            assert result.weights.max() <= self.reweighter.max_weight
        if not self.options.get("hold_out", False):
            assert side.all()
        if self.updates < self.reweighter.warmup_steps:
            assert (result.weights[side] == 1).all()
            assert result.val_loss is None
        self.shown += size
        self.sent += int(result.val_mask.sum())

    def given_up(self, number, size, indexed, backward):
        """A forward and a loss that no step follows, with a backward or without."""
        before = self.state()
        x, *rest = self.batch(number, size, indexed)
        random = torch.get_rng_state()
        self.optimizer.zero_grad()
        loss = self.reweighter.loss(self.model(x), *rest)
        if backward:
            loss.backward()
            self.optimizer.zero_grad()
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        self.twin(x)
        assert torch.equal(torch.get_rng_state(), after)
        assert_same(self.reweighter.state_dict(), before[0]["reweighter"])

    def evaluate(self, number, size, gradients):
        x, y, *_ = self.batch(number, size, False)
        before = copy.deepcopy(self.reweighter.state_dict())
        modes = self.model.training, self.twin.training
        self.model.eval(), self.twin.eval()
        with torch.set_grad_enabled(gradients):
            loss, plain = self.reweighter.loss(self.model(x), y), F.cross_entropy(self.twin(x), y)
        if not gradients:
            assert_same(loss, plain)
        self.model.train(modes[0]), self.twin.train(modes[1])
        assert_same(self.reweighter.state_dict(), before)

    def dry_run(self, number, size, indexed):
        """It changes nothing."""
        before = self.state()
        assert self.reweighter.check(self.batch(number, size, indexed)).startswith("engine")
        assert_same(self.state(), before)

    def schedule(self):
        self.scheduler.step(), self.twin_scheduler.step()

    def mode(self, training):
        self.model.train(training), self.twin.train(training)

    def add_group(self):
        for optimizer, model in ((self.optimizer, self.model), (self.twin_optimizer, self.twin)):
            optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.02})
        for scheduler in (self.scheduler, self.twin_scheduler):
            scheduler.base_lrs.append(0.02)
        self.groups += 1

    def new_class(self, more=1):
        self.classes = min(self.classes + more, 4)

    def failing_step(self, number, size, indexed, own_loop, at, error):
        """The ``at``-th forward fails, if there are as many: the model is as after a plain step that failed there.

        Returns what has the same effect: how many forwards a step takes depends on what was checked before.
        """
        fault, random = self.model[1].fault, torch.get_rng_state()
        before = copy.deepcopy(self.reweighter.state_dict())
        fault.left, fault.error, fault.calls = at, error, 0
        shown = self.shown, self.sent
        try:
            self.update([number], [size], indexed, own_loop)
        except error:
            after = torch.get_rng_state()
            torch.set_rng_state(random)
            if fault.calls > 1:  # it was not training's own forward that failed
                self.twin(self.batch(number, size, indexed)[0])
            assert torch.equal(torch.get_rng_state(), after)
            assert_same(self.reweighter.state_dict(), before)
            assert (self.shown, self.sent) == shown
            return ("given_up", (number, size, indexed, False)) if fault.calls > 1 else ("new_class", (0,))
        finally:
            fault.left = 0
        return "update", ([number], [size], indexed, own_loop)

    def reopen(self):
        """Another reweighter goes on where one was closed."""
        state = copy.deepcopy(self.reweighter.state_dict())
        self.reweighter.close()
        assert not self.model._forward_pre_hooks
        assert not self.model._forward_hooks
        assert not self.optimizer._optimizer_step_pre_hooks
        assert not self.optimizer._optimizer_step_post_hooks
        self.reweighter = self.reweighted()
        self.reweighter.load_state_dict(state)


def weighted_loss(outputs, targets, result):
    if (result.weights == 1).all():
        return F.cross_entropy(outputs, targets)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (result.weights * losses).sum() / int((~result.held_out).sum())


class Sequences(RuleBasedStateMachine):
    """Every action is done, remembered since the last save, and done again after a load."""

    @initialize(
        seed=st.integers(0, 9),
        order=st.sampled_from(["after", "before"]),
        engine=st.sampled_from(["finite", "forward", "reverse", "auto"]),
        every=st.integers(1, 3),
        warmup=st.integers(0, 5),
        splitter=st.sampled_from([None, *SPLITTERS]),
        capacity=st.sampled_from([2, 5, 50]),
        fraction=st.sampled_from([0.1, 0.4]),
        hold_out=st.booleans(),
        bound=st.sampled_from([None, 3.0]),
    )
    def begin(self, seed, order, engine, every, warmup, splitter, capacity, fraction, hold_out, bound):
        torch.manual_seed(seed)
        self.options = {
            "order": order,
            "hypergradient": engine,
            "every": every,
            "warmup_steps": warmup,
            "max_weight": bound,
            "shrinkage": None if seed % 3 == 0 else "auto",
        }
        if splitter is None:
            generator = torch.Generator().manual_seed(seed)
            self.options["validation"] = [(torch.randn(5, 4, generator=generator), torch.arange(5) % 3)] * 2
        else:
            self.options |= {
                "splitter": splitter,
                "capacity": capacity,
                "fraction": fraction,
                "hold_out": hold_out,
            }
        self.most, self.fraction, self.seed, self.numbers = capacity, fraction, seed, 1000 * seed
        self.run = Run(self.options, seed)
        self.save()

    def do(self, action, *arguments):
        self.since.append((action, arguments))
        getattr(self.run, action)(*arguments)

    def number(self):
        self.numbers += 1
        return self.numbers

    sizes, indexed = st.integers(2, 9), st.booleans()

    @rule(size=sizes, indexed=indexed)
    def step(self, size, indexed):
        self.do("update", [self.number()], [size], indexed, False)

    @rule(sizes=st.lists(sizes, min_size=1, max_size=3), indexed=indexed)
    def loop(self, sizes, indexed):
        if self.options["order"] == "before":
            sizes = sizes[:1]  # its look-ahead is of one batch
        self.do("update", [self.number() for _ in sizes], sizes, indexed, True)

    @rule(size=sizes, indexed=indexed, backward=st.booleans())
    def given_up(self, size, indexed, backward):
        self.do("given_up", self.number(), size, indexed, backward)

    @rule(size=sizes, gradients=st.booleans())
    def evaluate(self, size, gradients):
        self.do("evaluate", self.number(), size, gradients)

    @rule(size=sizes, indexed=indexed)
    def dry_run(self, size, indexed):
        self.do("dry_run", self.number(), size, indexed)

    @rule()
    def schedule(self):
        self.do("schedule")

    @rule(training=st.booleans())
    def mode(self, training):
        self.do("mode", training)

    @precondition(lambda self: self.run.groups == 1)
    @rule()
    def add_group(self):
        self.do("add_group")

    @rule()
    def new_class(self):
        self.do("new_class")

    @rule(
        size=sizes,
        indexed=indexed,
        own_loop=st.booleans(),
        at=st.integers(1, 6),
        error=st.sampled_from([torch.OutOfMemoryError, KeyboardInterrupt]),
    )
    def failing_step(self, size, indexed, own_loop, at, error):
        self.since.append(self.run.failing_step(self.number(), size, indexed, own_loop, at, error))

    @rule()
    def reopen(self):
        self.do("reopen")

    @rule()
    def save(self):
        run = self.run
        values = [run.groups, run.classes, run.updates, run.shown, run.sent, run.accumulated, run.model.training]
        self.file = io.BytesIO()
        states = {name: thing.state_dict() for name, thing in run.stateful().items()}
        torch.save([states, values, torch.get_rng_state()], self.file)
        self.since = []

    @precondition(lambda self: self.since)
    @rule(fresh=st.booleans())
    def load_and_do_it_again(self, fresh):
        expected = self.run.state()
        done, self.since = self.since, []
        self.file.seek(0)
        states, (groups, *values), random = torch.load(self.file, weights_only=True)
        if fresh or groups != self.run.groups:  # an optimizer cannot give back a group
            torch.manual_seed(77)
            self.run = Run(self.options, self.seed + 1, groups)
        run = self.run
        for name, thing in run.stateful().items():
            thing.load_state_dict(states[name])
        run.classes, run.updates, run.shown, run.sent, run.accumulated, training = values
        run.model.train(training), run.twin.train(training)
        torch.set_rng_state(random)
        for action, arguments in done:
            self.do(action, *arguments)
        assert_same(run.state(), expected)

    @invariant()
    def holds(self):
        if not hasattr(self, "run"):
            return
        run = self.run
        assert_same(run.model.state_dict(), run.twin.state_dict())
        assert_same(run.optimizer.state_dict(), run.twin_optimizer.state_dict())
        assert all(a is b for a, b in zip(run.model.parameters(), run.parameters, strict=True))
        assert run.reweighter.steps == run.updates
        if "splitter" in self.options:
            assert len(run.reweighter.validation) <= self.most
            if not run.accumulated:
                assert run.sent <= 1.5 * self.fraction * run.shown + 1
            assert run.shown > 0 or len(run.reweighter.validation) == 0


TestSequences = pytest.mark.usefixtures("one_thread")(Sequences.TestCase)
TestSequences.pytestmark.append(pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"))
TestSequences.settings = settings(max_examples=SEQUENCES, stateful_step_count=25)

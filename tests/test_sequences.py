"""Whatever is done to a run, in whatever order: it stays plain weighted training, and every save goes on bit-equal.

Hypothesis draws the sequences. ``TORCH_MOLERE_SEQUENCES`` sets how many there are.
"""

import copy
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from same import assert_same
from torch import nn

from torch_molere import LearnedSplitter, MetaReweighter, SignalWeighting, load_checkpoint, save_checkpoint

SEQUENCES = int(os.environ.get("TORCH_MOLERE_SEQUENCES", "40"))


class Run:
    """A run with a reweighter and its plain twin: the same loop with the reweighter's weights and nothing else."""

    def __init__(self, options, seed, groups=1):
        self.options, self.seed, self.groups, self.classes = options, seed, 1, 2
        self.model, self.optimizer, self.scheduler = self.trained()
        self.reweighter = self.reweighted()
        self.twin, self.twin_optimizer, self.twin_scheduler = self.trained()
        self.fault = None
        self.model[0].register_forward_hook(self.fail)
        self.updates = self.shown = self.sent = 0
        for _ in range(1, groups):
            self.add_group()

    def trained(self):
        random = torch.get_rng_state()
        torch.manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 4))
        torch.set_rng_state(random)
        optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def reweighted(self):
        random = torch.get_rng_state()
        torch.manual_seed(1)
        phi, theta = SignalWeighting(("loss", "margin"), hidden=4), LearnedSplitter(("loss",), hidden=4)
        torch.set_rng_state(random)
        chosen = {} if "validation" in self.options else {"splitter": theta}
        return MetaReweighter(
            self.model, self.optimizer, weighting=phi, weighting_lr=0.05, splitter_lr=0.05, **chosen, **self.options
        )

    def stateful(self):
        names = ("model", "optimizer", "scheduler", "reweighter", "twin", "twin_optimizer", "twin_scheduler")
        return {name: getattr(self, name) for name in names}

    def fail(self, *_):
        if self.fault is not None:
            self.fault -= 1
            if self.fault == 0:
                raise torch.OutOfMemoryError("out of memory")

    def state(self):
        return copy.deepcopy(
            [
                [thing.state_dict() for thing in (self.model, self.optimizer, self.scheduler, self.reweighter)],
                [parameter.grad for parameter in self.model.parameters()],
                torch.get_rng_state(),
                len(self.reweighter._weighted),
            ]
        )

    def batch(self, number, size, indexed):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(size, 4, generator=generator), torch.randint(self.classes, (size,), generator=generator)
        return (x, y, torch.randperm(40, generator=generator)[:size]) if indexed else (x, y)

    # What can be done to it; each by the same call to the twin.

    def update(self, numbers, sizes, indexed, own_loop):
        """One optimizer step, on one batch or on several that accumulate."""
        batches = [self.batch(number, size, indexed) for number, size in zip(numbers, sizes, strict=True)]
        random, results = torch.get_rng_state(), []
        if len(batches) == 1 and not own_loop:
            results = [self.reweighter.step(batches[0])]
        else:
            self.optimizer.zero_grad()
            for x, *rest in batches:
                (self.reweighter.loss(self.model(x), *rest) / len(batches)).backward()
                results.append(self.reweighter.result)
            self.optimizer.step()
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        self.twin_optimizer.zero_grad()
        for (x, y, *_), result in zip(batches, results, strict=True):
            loss = (result.weights * F.cross_entropy(self.twin(x), y, reduction="none")).sum() / self.side(result).sum()
            (loss if len(batches) == 1 and not own_loop else loss / len(batches)).backward()
            assert_same(loss.detach(), result.loss)
            self.check(result, len(y))
        self.twin_optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
        self.updates += 1

    def side(self, result):
        """Which instances are trained on."""
        return ~result.val_mask if self.options.get("hold_out") is True else result.weights > 0

    def check(self, result, size):
        side = self.side(result)
        assert result.weights.shape == result.val_mask.shape == (size,)
        assert side.any()
        assert (result.weights >= 0).all()
        assert (result.weights[~side] == 0).all()
        assert result.val_mask[~side].all()
        torch.testing.assert_close(result.weights[side].mean(), torch.tensor(1.0))
        if self.updates < self.reweighter.warmup_steps:
            assert (result.weights[side] == 1).all()
            assert result.val_loss is None
        self.shown += size
        self.sent += int(result.val_mask.sum())

    def abandoned_loss(self, number, size, indexed):
        """A forward and a loss that nothing follows."""
        x, *rest = self.batch(number, size, indexed)
        random = torch.get_rng_state()
        self.reweighter.loss(self.model(x), *rest)
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        self.twin(x)
        assert torch.equal(torch.get_rng_state(), after)
        self.shown += size
        self.sent += int(self.reweighter.result.val_mask.sum())

    def evaluate(self, number, size):
        x, y, *_ = self.batch(number, size, False)
        with torch.no_grad():
            modes = self.model.training, self.twin.training
            self.model.eval(), self.twin.eval()
            assert_same(
                self.reweighter.loss(self.model(x), y), F.cross_entropy(self.twin(x), y, reduction="none").mean()
            )
            self.model.train(modes[0]), self.twin.train(modes[1])

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

    def new_class(self):
        self.classes = min(self.classes + 1, 4)

    def failing_step(self, number, size, indexed, at):
        """The ``at``-th forward fails, if there are as many; the step has not happened then."""
        before = self.state()
        self.fault = at
        try:
            self.update([number], [size], indexed, own_loop=False)
        except torch.OutOfMemoryError:
            assert_same(self.state(), before)
        finally:
            self.fault = None

    def reopen(self):
        """Another reweighter goes on where one was closed."""
        state = copy.deepcopy(self.reweighter.state_dict())
        self.reweighter.close()
        assert not self.model._forward_pre_hooks
        assert not self.optimizer._optimizer_step_pre_hooks
        assert not self.optimizer._optimizer_step_post_hooks
        self.reweighter = self.reweighted()
        self.reweighter.load_state_dict(state)


class Sequences(RuleBasedStateMachine):
    """Every action is done, remembered since the last save, and done again after a load."""

    @initialize(
        seed=st.integers(0, 9),
        order=st.sampled_from(["after", "before"]),
        engine=st.sampled_from(["finite", "forward", "auto"]),
        every=st.integers(1, 3),
        warmup=st.integers(0, 5),
        fixed=st.booleans(),
        buffer=st.sampled_from([2, 5, 50]),
        fraction=st.sampled_from([0.1, 0.4]),
        hold_out=st.sampled_from([True, "auto"]),
    )
    def begin(self, seed, order, engine, every, warmup, fixed, buffer, fraction, hold_out):
        torch.manual_seed(seed)
        self.options = {"order": order, "hypergradient": engine, "every": every, "warmup_steps": warmup}
        if fixed:
            generator = torch.Generator().manual_seed(seed)
            self.options["validation"] = [(torch.randn(5, 4, generator=generator), torch.arange(5) % 3)] * 2
        else:
            self.options |= {"buffer_size": buffer, "val_fraction": fraction, "hold_out": hold_out}
        self.fraction, self.seed, self.numbers = fraction, seed, 1000 * seed
        self.run = Run(self.options, seed)
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "checkpoint.pt"
        self.save()

    def teardown(self):
        self.folder.cleanup()

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
        self.do("update", [self.number() for _ in sizes], sizes, indexed, True)

    @rule(size=sizes, indexed=indexed)
    def abandoned_loss(self, size, indexed):
        self.do("abandoned_loss", self.number(), size, indexed)

    @rule(size=sizes)
    def evaluate(self, size):
        self.do("evaluate", self.number(), size)

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

    @rule(size=sizes, indexed=indexed, at=st.integers(1, 4))
    def failing_step(self, size, indexed, at):
        self.do("failing_step", self.number(), size, indexed, at)

    @rule()
    def reopen(self):
        self.do("reopen")

    @rule()
    def save(self):
        run = self.run
        run.optimizer.zero_grad(), run.twin_optimizer.zero_grad()
        values = [run.groups, run.classes, run.updates, run.shown, run.sent, run.model.training]
        save_checkpoint(self.path, **run.stateful(), values=values)
        self.since = []

    @precondition(lambda self: self.since)
    @rule(fresh=st.booleans())
    def load_and_do_it_again(self, fresh):
        expected = self.run.state()
        done, self.since = self.since, []
        groups = torch.load(self.path, weights_only=True)["values"]["values"][0]
        if fresh or groups != self.run.groups:  # an optimizer cannot give back a group
            torch.manual_seed(77)
            self.run = Run(self.options, self.seed + 1, groups)
        run = self.run
        values = load_checkpoint(self.path, **run.stateful())
        run.groups, run.classes, run.updates, run.shown, run.sent, training = values["values"]
        run.optimizer.zero_grad(), run.twin_optimizer.zero_grad()
        run.model.train(training), run.twin.train(training)
        for action, arguments in done:
            self.do(action, *arguments)
        assert_same(run.state()[0], expected[0])
        assert torch.equal(run.state()[2], expected[2])

    @invariant()
    def holds(self):
        if not hasattr(self, "run"):
            return
        run = self.run
        assert_same(run.model.state_dict(), run.twin.state_dict())
        assert_same(run.optimizer.state_dict(), run.twin_optimizer.state_dict())
        assert run.reweighter.steps == run.updates
        assert not run.reweighter._journal.recording
        if run.reweighter.buffer is not None:
            assert len(run.reweighter.buffer) <= self.options["buffer_size"]
            assert run.sent <= 1.5 * self.fraction * run.shown + 1
            assert (run.shown == 0) == (sum(run.reweighter.buffer._seen.values()) == 0)


TestSequences = pytest.mark.usefixtures("one_thread")(Sequences.TestCase)
TestSequences.pytestmark.append(pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"))
TestSequences.settings = settings(max_examples=SEQUENCES, stateful_step_count=25)

"""Whatever is raised wherever in a step: the step has not happened, and the next one works.

Every call of everything that belongs to the user (model, loss, networks, optimizers, loader) is made to fail in turn,
then the step is repeated; the run must stay bit-equal with one in which nothing ever failed.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import InputWeighting, LearnedSplitter, MetaReweighter
from torch_molere.hypergradients import ENGINES

pytestmark = pytest.mark.usefixtures("one_thread")


class Faults:
    """Counts the calls by place, and raises at the one that is armed."""

    def __init__(self):
        self.counts, self.armed, self.error = Counter(), None, None

    def tick(self, place):
        self.counts[place] += 1
        if (place, self.counts[place]) == self.armed:
            self.armed = None
            raise self.error

    def arm(self, place, number, error):
        self.counts.clear()
        self.armed, self.error = (place, number), error


faults = Faults()
PLACES = ("forward", "backward", "loss", "weighting", "splitter", "correct", "phi", "theta", "loader", "optimizer")
injected = Counter()
ERRORS = (KeyboardInterrupt("stop"), ValueError("broken"), torch.OutOfMemoryError("out of memory"))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.last = nn.Linear(6, 3)
        self.aside = nn.Parameter(torch.zeros(3))  # that the optimizer does not hold

    def forward(self, x):
        faults.tick("forward")
        hidden = self.drop(self.norm(self.first(x)).tanh())
        if hidden.requires_grad:
            hidden.register_hook(lambda _: faults.tick("backward"))
        faults.tick("late")  # statistics and random numbers have moved
        return self.last(hidden) + self.aside


class Ticking(nn.Module):
    """Fails once before and once after what it wraps has run."""

    def __init__(self, module, place):
        super().__init__()
        self.module, self.place = module, place

    def forward(self, samples):
        faults.tick(self.place)
        found = self.module(samples)
        faults.tick(self.place)
        return found


def ticking_adam(place):
    class TickingAdam(torch.optim.Adam):
        def step(self, closure=None):
            faults.tick(place)
            super().step()
            faults.tick(place)

    return lambda parameters: TickingAdam(parameters, lr=0.05)


class Loader:
    """The fault leaves its iterator behind, as an exception inside a generator does."""

    def __iter__(self):
        faults.tick("loader")
        for seed in (50, 51, 52):
            faults.tick("loader")
            yield batch(seed)[:2]


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(9, 4, generator=generator), torch.randint(3, (9,), generator=generator)
    return x, y, (torch.arange(9) * 5 + 3 * seed) % 12  # rows that come again


def loss_fn(outputs, targets):
    faults.tick("loss")
    return F.cross_entropy(outputs, targets, reduction="none")


def correct_fn(outputs, targets):
    faults.tick("correct")
    return outputs.argmax(1) == targets


class World:
    """All that a step may touch."""

    def __init__(self, order, engine, kind):
        torch.manual_seed(0)
        self.model = Classifier()
        held = [p for name, p in self.model.named_parameters() if name != "aside"]
        self.optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)
        phi = InputWeighting(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
        options = (
            {"validation": Loader()}
            if kind == "fixed"
            else {
                "splitter": Ticking(LearnedSplitter(("loss", "margin"), hidden=5), "splitter"),
                "splitter_optimizer": ticking_adam("theta"),
                "buffer_size": 7,  # soon full: instances are replaced
                "val_fraction": 0.3,
            }
        )
        self.reweighter = MetaReweighter(
            self.model,
            self.optimizer,
            loss_fn=loss_fn,
            correct_fn=correct_fn,
            weighting=Ticking(phi, "weighting"),
            weighting_optimizer=ticking_adam("phi"),
            order=order,
            hypergradient=engine,
            warmup_steps=1,
            every=2,
            **options,
        )
        self.optimizer.register_step_pre_hook(lambda *_: faults.tick("optimizer"))  # after the meta-update
        self.indexed = kind != "encounters"

    def batch(self, step):
        return batch(step) if self.indexed else batch(step)[:2]

    def snapshot(self):
        reweighter = self.reweighter
        networks = [self.model, reweighter.weighting] + [reweighter.splitter] * (reweighter.splitter is not None)
        hooks = (self.model._forward_pre_hooks, self.optimizer._optimizer_step_pre_hooks)
        return copy.deepcopy(
            {
                "states": [thing.state_dict() for thing in (self.model, self.optimizer, reweighter)],
                "gradients": [parameter.grad for network in networks for parameter in network.parameters()],
                "random": torch.get_rng_state(),
                "hooks": [len(found) for found in hooks],
                "result": vars(reweighter.result) if reweighter.result else None,
                "under way": len(reweighter._weighted),
            }
        )


SETTINGS = [(order, engine, "rows") for order in ("after", "before") for engine in ENGINES] + [
    (order, "finite", kind) for order in ("after", "before") for kind in ("fixed", "encounters")
]


def attack(world, twin, act, spared=()):
    """Every call in ``act(world)`` fails in turn, which leaves no trace; undisturbed it then does what it does to the
    twin, to whom nothing ever happens. Returns how many calls there were."""
    random = torch.get_rng_state()
    faults.counts.clear()
    act(twin)
    calls, expected = Counter(faults.counts), twin.snapshot()
    torch.set_rng_state(random)
    # "auto" takes an OutOfMemoryError in forward mode for its answer.
    errors = ERRORS[:2] if world.reweighter.engine == "auto" else ERRORS
    before = world.snapshot()
    for place, count in calls.items():
        if place in spared:
            continue
        for number in range(1, count + 1):
            error = errors[(sum(injected.values()) + number) % len(errors)]
            faults.arm(place, number, error)
            with pytest.raises(type(error), match=str(error)):
                act(world)
            assert_same(world.snapshot(), before)
            injected[place] += 1
    act(world)
    assert_same(world.snapshot(), expected)
    return calls


@pytest.mark.parametrize(("order", "engine", "kind"), SETTINGS)
def test_a_step_that_fails_has_not_happened(order, engine, kind):
    world, twin = World(order, engine, kind), World(order, engine, kind)
    calls = Counter()
    for step in range(5):  # warm-up, a meta-update that chooses an engine, none, another one, none
        calls += attack(world, twin, lambda world, step=step: world.reweighter.step(world.batch(step)))
    places = {"forward", "late", "backward", "loss", "weighting", "correct", "phi", "optimizer"}
    assert calls.keys() == places | ({"loader"} if kind == "fixed" else {"splitter", "theta"})
    assert world.reweighter.result.val_loss is None


@pytest.mark.parametrize(("order", "engine", "kind"), SETTINGS)
def test_a_loss_that_fails_has_not_happened(order, engine, kind):
    """In a loop of one's own; the forward before it is taken back, too."""
    world, twin = World(order, engine, kind), World(order, engine, kind)
    losses = {}

    def forward_and_loss(world, step):
        x, *rest = world.batch(step)
        losses[world] = world.reweighter.loss(world.model(x), *rest)

    for step in range(4):
        attack(world, twin, lambda world, step=step: forward_and_loss(world, step), spared=["late"])
        for each in (world, twin):
            each.optimizer.zero_grad()
            losses[each].backward()
            each.optimizer.step()
    assert_same(world.snapshot()["states"], twin.snapshot()["states"])


@pytest.mark.parametrize(("order", "engine", "kind"), SETTINGS)
def test_a_meta_update_that_fails_leaves_the_update_to_be_taken_without(order, engine, kind):
    """In a loop of one's own: the optimizer's step raises and has not happened; called again it is a plain one."""
    world = World(order, engine, kind)
    world.reweighter.every = 1
    world.reweighter.step(world.batch(0))
    failed = Counter()
    for place in PLACES[:-1] if order == "after" else PLACES:  # φ has learned when the optimizer itself fails
        for number in range(1, 5):
            x, *rest = world.batch(number)
            world.optimizer.zero_grad()
            world.reweighter.loss(world.model(x), *rest).backward()
            before = world.snapshot()
            faults.arm(place, number, ERRORS[number % 2])
            try:
                world.optimizer.step()
            except (KeyboardInterrupt, ValueError):
                failed[place] += 1
            else:
                faults.armed = None
                break
            found = world.snapshot()
            assert_same(found | {"under way": 0}, before | {"under way": 0})
            assert found["under way"] == 0
            plain_model, plain = copy.deepcopy((world.model, world.optimizer))
            for copied, parameter in zip(plain_model.parameters(), world.model.parameters(), strict=True):
                copied.grad = parameter.grad  # which copies of parameters go without
            plain.step()
            steps, phi = world.reweighter.steps, copy.deepcopy(world.reweighter.weighting.state_dict())
            world.optimizer.step()
            assert_same(world.model.state_dict(), plain_model.state_dict())
            assert_same(world.reweighter.weighting.state_dict(), phi)
            assert world.reweighter.steps == steps + 1
    injected.update(failed)
    inside = {"forward", "loss", "phi"} | ({"loader"} if kind == "fixed" else {"correct", "splitter", "theta"})
    assert failed.keys() >= (inside if order == "after" else {"optimizer"})


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_backward_that_fails_in_a_loop_of_ones_own(order):
    """φ, Θ and the split are as ``loss`` left them, and nothing of that batch is in the next update."""
    world = World(order, "finite", "rows")
    for step in range(6):
        x, *rest = world.batch(step)
        loss = world.reweighter.loss(world.model(x), *rest)
        before = copy.deepcopy((world.reweighter.state_dict(), world.optimizer.state_dict()))
        faults.arm("backward", 1, ERRORS[0])
        world.optimizer.zero_grad()
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        assert_same((world.reweighter.state_dict(), world.optimizer.state_dict()), before)
        world.optimizer.zero_grad()
        world.reweighter.loss(world.model(x), *rest).backward()
        assert len(world.reweighter._weighted) == (order == "after" and step in (1, 3, 5))
        world.optimizer.step()
        assert world.reweighter.steps == step + 1


def test_a_failure_after_the_update_is_after_the_step():
    """What other people's hooks do once θ has moved takes nothing back."""
    world = World("after", "finite", "rows")
    world.optimizer.register_step_post_hook(lambda *_: faults.tick("post"))
    world.reweighter.step(world.batch(0))
    twin = copy.deepcopy(world.model.state_dict())
    faults.arm("post", 1, ERRORS[0])
    with pytest.raises(KeyboardInterrupt):
        world.reweighter.step(world.batch(1))
    assert world.reweighter.steps == 2
    assert world.reweighter.result.val_loss is not None
    assert not torch.equal(world.model.state_dict()["first.weight"], twin["first.weight"])
    assert world.reweighter.step(world.batch(2)).val_loss is None


def test_gradients_zeroed_in_place_are_no_gradients():
    """After ``zero_grad(set_to_none=False)`` the losses of an update that was skipped are forgotten, too."""
    world = World("after", "finite", "rows")
    for step in range(2):
        x, *rest = world.batch(step)
        world.optimizer.zero_grad(set_to_none=False)
        world.reweighter.loss(world.model(x), *rest).backward()
        if step == 0:
            world.optimizer.step()
    assert len(world.reweighter._weighted) == 1
    world.optimizer.zero_grad(set_to_none=False)  # as after an update that a GradScaler skipped
    x, *rest = world.batch(2)
    world.reweighter.loss(world.model(x), *rest).backward()
    assert len(world.reweighter._weighted) == 1


def test_a_loss_that_failed_asks_for_another_forward():
    """The one before has been taken back with it."""
    world = World("after", "finite", "rows")
    (x, *rest), before = world.batch(0), world.snapshot()
    outputs = world.model(x)
    faults.arm("loss", 1, ERRORS[1])
    with pytest.raises(ValueError, match="broken"):
        world.reweighter.loss(outputs, *rest)
    assert_same(world.snapshot(), before)
    with pytest.raises(RuntimeError, match="a call of the model made since the last loss"):
        world.reweighter.loss(outputs, *rest)


def test_what_failed_holds_no_memory():
    world = World("after", "finite", "rows")
    for step in range(3):
        world.reweighter.step(world.batch(step))
    faults.arm("phi", 2, ERRORS[0])
    with pytest.raises(KeyboardInterrupt):
        world.reweighter.step(world.batch(3))
    reweighter = world.reweighter
    assert not reweighter._journal.recording
    assert reweighter._call is None
    assert reweighter._weighted == []

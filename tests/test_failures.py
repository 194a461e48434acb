"""Whatever is raised wherever in a step: the model is as after a failed plain step, and the reweighter is unchanged.

Every call of everything that belongs to the user (model, loss, networks, optimizers, loader) is made to fail in turn,
and a real SIGINT comes at many moments; then the step is repeated.
"""

import copy
import functools
import random
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

import torch_molere
from torch_molere import InputWeighting, LearnedSplitter, MetaReweighter, ValidationBuffer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """As in a terminal; a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    # What PyTorch's own contexts leave behind where they are interrupted while they are entered or left.
    torch.set_grad_enabled(True)
    assert torch.autocast_increment_nesting() == 1  # nothing was interrupted in a context of autocast
    torch.autocast_decrement_nesting()


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
ERRORS = (KeyboardInterrupt("stop"), torch.OutOfMemoryError("out of memory"), ValueError("broken"))
COMMITTED = ("phi", "theta")  # called once θ has moved


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.last = nn.Linear(6, 3)
        self.aside = nn.Parameter(torch.zeros(3))  # that the optimizer does not hold
        self.calls = 0

    def forward(self, x):
        faults.tick("forward")
        hidden = self.drop(self.norm(self.first(x)).tanh())
        if hidden.requires_grad:
            hidden.register_hook(lambda _: faults.tick("backward"))
        self.calls += 1
        faults.tick("late")  # statistics, attributes and random numbers have moved
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

    def __init__(self, order="after", engine="finite", kind="rows", every=2):
        torch.manual_seed(0)
        self.model = Classifier()
        held = [p for name, p in self.model.named_parameters() if name != "aside"]
        self.optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)
        phi = InputWeighting(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
        splitter = Ticking(LearnedSplitter(("loss", "margin"), hidden=5), "splitter")
        buffer = ValidationBuffer(splitter=splitter, optimizer=ticking_adam("theta"), capacity=7, fraction=0.3)
        self.reweighter = MetaReweighter(
            self.model,
            self.optimizer,
            loss_fn=loss_fn,
            correct_fn=correct_fn,
            weighting=Ticking(phi, "weighting"),
            weighting_optimizer=ticking_adam("phi"),
            validation=Loader() if kind == "fixed" else buffer,
            order=order,
            hypergradient=engine,
            warmup_steps=1,
            every=every,
        )
        self.optimizer.register_step_pre_hook(lambda *_: faults.tick("optimizer"))  # after the meta-update
        self.indexed = kind != "no rows"
        self.objects = dict(self.model.named_parameters())

    def step(self, seed):
        self.reweighter.step(batch(seed) if self.indexed else batch(seed)[:2])

    def loop_step(self, seed):
        x, *rest = batch(seed) if self.indexed else batch(seed)[:2]
        self.optimizer.zero_grad()
        self.reweighter.loss(self.model(x), *rest).backward()
        self.optimizer.step()

    def parts(self):
        """By what a failed plain step may change of it."""
        model, modules = self.model, [self.reweighter.weighting, getattr(self.reweighter.validation, "splitter", None)]
        hooks = (model._forward_pre_hooks, model._forward_hooks, self.optimizer._optimizer_step_pre_hooks)
        never = {
            "parameters": dict(model.named_parameters()),
            "optimizer": self.optimizer.state_dict(),
            "reweighter": self.reweighter.state_dict(),
            "gradients": [p.grad for module in modules if module is not None for p in module.parameters()],
            "modes": [module.training for module in model.modules()],
            "hooks": [len(found) for found in hooks],
            "streams": (str(np.random.get_state()), random.getstate()),
        }
        forward = {"buffers": dict(model.named_buffers()), "calls": model.calls, "random": torch.get_rng_state()}
        return copy.deepcopy((never, forward))

    def is_whole(self):
        """The model's parameters are the very objects that the optimizer holds."""
        found = dict(self.model.named_parameters())
        assert found.keys() == self.objects.keys()
        assert all(found[name] is parameter for name, parameter in self.objects.items())
        assert not any(name in vars(module) for module in self.model.modules() for name in module._parameters)

    def put_back(self, forward):
        """What a plain forward has moved."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(forward["buffers"][name])
        self.model.calls = forward["calls"]
        torch.set_rng_state(forward["random"])


def forward_alone(model, seed):
    """What a plain training forward on this batch leaves of the buffers, attributes and random stream."""
    other = copy.deepcopy(model)
    state = torch.get_rng_state()
    other(batch(seed)[0])
    found = {"buffers": dict(other.named_buffers()), "calls": other.calls, "random": torch.get_rng_state()}
    torch.set_rng_state(state)
    return copy.deepcopy(found)


def is_same(a, b):
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


SETTINGS = [
    ("after", "finite", "rows"),
    ("after", "auto", "no rows"),
    ("after", "reverse", "fixed"),
    ("before", "forward", "rows"),
    ("before", "finite", "fixed"),
]


@pytest.mark.parametrize(
    ("order", "engine", "kind", "loop"),
    [(*setting, "step") for setting in SETTINGS] + [(*SETTINGS[0], "own loop"), (*SETTINGS[3], "own loop")],
)
def test_a_step_that_fails_is_a_failed_plain_step(order, engine, kind, loop):
    """24. Undisturbed it then does what it does in a world in which nothing ever failed."""
    world, twin = World(order, engine, kind), World(order, engine, kind)
    act = World.step if loop == "step" else World.loop_step
    places = Counter()
    for seed in range(4):  # warm-up, a meta-update that is checked, none, another one
        start = torch.get_rng_state()
        faults.counts.clear()
        act(twin, seed)
        calls, expected = Counter(faults.counts), twin.parts()
        torch.set_rng_state(start)
        never, forward = world.parts()
        trained = forward_alone(world.model, seed)
        # The loader first: a batch that has been read is kept.
        for place, count in sorted(calls.items(), key=lambda item: item[0] != "loader"):
            for number in range(1, count + 1) if place not in COMMITTED else ():
                # The search for an engine makes errors of a replay its own, and "auto" goes on to another engine.
                error = ERRORS[(number + seed) % (2 if engine == "auto" else 3)]
                faults.arm(place, number, error)
                with pytest.raises((type(error), RuntimeError), match=str(error)):
                    act(world, seed)
                world.is_whole()
                found, moved = world.parts()
                assert_same(found, never)
                # The forward has failed, is over, or ("late") has moved everything when it failed.
                assert is_same(moved, forward) or is_same(moved, trained), (place, number)
                world.put_back(forward)
                places[place] += 1
        act(world, seed)
        assert_same(world.parts(), expected)
    own = {"loader"} if kind == "fixed" else {"splitter"}
    assert places.keys() == {"forward", "late", "backward", "loss", "weighting", "correct", "optimizer"} | own


@pytest.mark.parametrize("place", COMMITTED)
def test_an_error_of_a_networks_own_optimizer_comes_after_the_step(place):
    """24. θ has moved by then; nothing else of the reweighter has."""
    world = World()
    world.step(0)
    never, _ = world.parts()
    plain = copy.deepcopy(world.model)
    plain_optimizer = torch.optim.SGD([p for n, p in plain.named_parameters() if n != "aside"], lr=0.1, momentum=0.9)
    plain_optimizer.load_state_dict(world.optimizer.state_dict())
    faults.arm(place, 1, ERRORS[2])
    with pytest.raises(ValueError, match="broken"):
        world.step(1)
    world.is_whole()
    assert not torch.equal(world.model.last.weight, plain.last.weight)
    found, before = world.reweighter.state_dict(), never["reweighter"]
    for name in ("steps", "history", "engines"):
        assert_same(found[name], before[name])
    assert_same(found["validation"]["store"], before["validation"]["store"])
    world.step(1)
    world.step(2)


def test_a_meta_update_that_fails_leaves_a_plain_step_to_be_taken():
    """24. In a loop of one's own: ``optimizer.step()`` raises and has not happened; called again it is a plain one."""
    world = World(every=1)
    world.step(0)
    for place in ("forward", "loss", "splitter"):
        x, *rest = batch(1)
        world.optimizer.zero_grad()
        world.reweighter.loss(world.model(x), *rest).backward()
        never, _ = world.parts()
        faults.arm(place, 1, ERRORS[0])
        with pytest.raises(KeyboardInterrupt):
            world.optimizer.step()
        world.is_whole()
        assert_same(world.parts()[0], never)
        plain, plain_optimizer = copy.deepcopy((world.model, world.optimizer))
        for copied, parameter in zip(plain.parameters(), world.model.parameters(), strict=True):
            copied.grad = parameter.grad  # which copies of parameters go without
        plain_optimizer.step()
        world.optimizer.step()
        assert_same(world.model.state_dict(), plain.state_dict())
        assert_same(world.reweighter.state_dict(), never["reweighter"])


def test_a_failure_after_the_update_is_after_the_step():
    """What other people's hooks do once θ has moved takes nothing back."""
    world = World()
    world.optimizer.register_step_post_hook(lambda *_: faults.tick("post"))
    world.step(0)
    before = copy.deepcopy(world.model.state_dict())
    faults.arm("post", 1, ERRORS[0])
    with pytest.raises(KeyboardInterrupt):
        world.step(1)
    assert world.reweighter.steps == 2
    assert world.reweighter.result.val_loss is not None
    assert not torch.equal(world.model.state_dict()["first.weight"], before["first.weight"])
    world.step(2)
    assert world.reweighter.result.val_loss is None


def test_what_failed_holds_no_memory():
    world = World(every=1)
    for seed in range(3):
        world.step(seed)
    faults.arm("forward", 2, ERRORS[0])
    with pytest.raises(KeyboardInterrupt):
        world.step(3)
    world.reweighter.attachment.forget()
    assert world.reweighter.attachment.active == []


# A real Ctrl-C.

PACKAGE = str(Path(torch_molere.__file__).parent)
SWAPS = ("run_apart", "put_back", "apply", "stand_in", "_apply_attributes")  # where others stand in for the parameters


class Moments:
    """Counts the lines that the package executes, and sends a SIGINT to this process at the one that is armed.

    A line that says ``try:`` is none: Python takes up signals at calls and jumps, and there is none.
    """

    def __init__(self, armed=None, functions=None):
        self.armed, self.functions, self.count = armed, functions, 0

    def __enter__(self):
        self._before = sys.gettrace()  # coverage's
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        code = frame.f_code
        counts = code.co_filename.startswith(PACKAGE) and (self.functions is None or code.co_name in self.functions)
        return self._line if counts else None

    def _line(self, frame, event, argument):
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) not in tries():
            self.count += 1
            if self.count == self.armed:
                signal.raise_signal(signal.SIGINT)
        return self._line


@functools.cache
def tries():
    lines = [(str(path), path.read_text().splitlines()) for path in Path(PACKAGE).rglob("*.py")]
    return {(path, place) for path, text in lines for place, line in enumerate(text, 1) if line.strip() == "try:"}


@pytest.mark.parametrize(("order", "engine"), [("after", "finite"), ("after", "forward"), ("before", "finite")])
def test_ctrl_c_at_any_moment(order, engine):
    """24. At many lines where others stand in for the parameters, and at a sample of all the others."""
    world = World(order, engine, every=1)
    for seed in range(2):
        world.step(seed)
    state, model_state, optimizer_state = copy.deepcopy(
        (world.reweighter.state_dict(), world.model.state_dict(), world.optimizer.state_dict())
    )
    random_state = torch.get_rng_state()

    def start():
        world.reweighter.load_state_dict(state)
        world.model.load_state_dict(model_state)
        world.optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        torch.set_rng_state(random_state)

    moments = []
    for functions, number in ((SWAPS, 40), (None, 20)):
        start()
        with Moments(functions=functions) as counted:
            world.step(2)
        moments += [(functions, moment) for moment in range(counted.count, 0, -max(counted.count // number, 1))]
    whole_step = copy.deepcopy(world.reweighter.state_dict())
    assert len(moments) > 55
    outcomes = Counter()
    for functions, moment in moments:
        start()
        before = copy.deepcopy(list(world.model.parameters()))
        with pytest.raises(KeyboardInterrupt), Moments(moment, functions):
            world.step(2)
        world.is_whole()
        taken = not all(torch.equal(a, b) for a, b in zip(before, world.model.parameters(), strict=True))
        # All of the step, or nothing of it; or θ alone, as it moves first.
        found = world.reweighter.state_dict()
        all_of_it = taken and is_same(found, whole_step)
        assert all_of_it or is_same(found, state)
        outcomes[taken, all_of_it] += 1
    assert outcomes[True, True]
    assert outcomes[False, False]
    world.step(3)


def test_ctrl_c_from_outside():
    """24. A timer sends it, wherever the step is, also within PyTorch."""
    world = World(every=1)
    world.step(0)
    process = threading.main_thread().ident
    stopped = 0
    for number in range(20):
        timer = threading.Timer(0.0006 * (number % 10), signal.pthread_kill, (process, signal.SIGINT))
        try:
            timer.start()
            for seed in range(20):
                world.step(seed)
            timer.join()
        except KeyboardInterrupt:
            stopped += 1
        timer.join()
        torch.set_grad_enabled(True)  # PyTorch's own no_grad may have been stopped at its end
        world.is_whole()
        assert all(torch.isfinite(parameter).all() for parameter in world.model.parameters())
    assert stopped > 15
    world.step(1)

"""The reverse-mode check: when it runs, what it finds, what it falls back on, and what it costs."""

import logging

import pytest
import torch
import torch.nn.functional as F
from oracle import Given, World, data, deviation, net, plain_loop, relative, reweighter_of, world_of
from torch import nn

import torch_molere.planning
from torch_molere import hypergradient
from torch_molere.hypergradients.check import EngineChoice, Found, agreement, examine
from torch_molere.hypergradients.functional import Call, Replay
from torch_molere.losses import PerSampleLoss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checks(monkeypatch):
    """At which step each check ran: to be given a reweighter."""
    ran = []

    def counted(*arguments, **options):
        ran.append(ran.reweighter.steps + 1)
        return examine(*arguments, **options)

    class Ran(list):
        reweighter = None

    ran = Ran()
    monkeypatch.setattr(torch_molere.planning, "examine", counted)
    return ran


# When


def test_it_runs_at_the_1st_10th_and_100th_meta_update(checks):
    world = world_of(net())
    checks.reweighter = reweighter = reweighter_of(world)
    for _ in range(101):
        plain_loop(world, reweighter.loss)
    assert checks == [1, 10, 100]
    choice = EngineChoice("auto")
    choice.found = Found("finite", 0.0, True, False, "key")
    due = []
    for choice.updates in range(20_000):
        if choice.due("key"):
            due.append(choice.updates + 1)
    assert due == [1, 10, 100, 1000, 10_000]


CHANGES = {
    "training": lambda model: model[1].eval(),
    "dtype": lambda model: model.float(),
    "frozen": lambda model: model[0].bias.requires_grad_(False),
    "compiled": lambda model: model.compile(backend="eager"),
    "forward_hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "parameter_hook": lambda model: model[0].weight.register_hook(lambda gradient: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_runs_after_a_visible_change(name, checks):
    world = world_of(net(nn.Dropout(0.3)))
    checks.reweighter = reweighter = reweighter_of(world)
    for _ in range(3):
        plain_loop(world, reweighter.loss)
    CHANGES[name](world.model)
    if name == "dtype":
        world.batch = world.batch[0].float(), world.batch[1]
        reweighter.validation.batches[0] = (world.validation[0].float(), world.validation[1])
        world.optimizers[0].state.clear()
    for _ in range(3):
        plain_loop(world, reweighter.loss)
    assert checks == [1, 4]
    torch._dynamo.reset()


def test_it_runs_when_autocast_is_switched_on(checks):
    (x, y), (xv, yv) = data(1), data(2)
    world = World(net().float(), [], (x.float(), y), (xv.float(), yv))
    world.optimizers = [torch.optim.SGD(world.model.parameters(), lr=0.1)]
    checks.reweighter = reweighter = reweighter_of(world)
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=step >= 2):
            plain_loop(world, reweighter.loss)
    assert checks == [1, 3]


def test_it_runs_again_where_backward_does_not_fit(checks):
    """A change that nobody can see: the gradients that backward leaves tell at once."""
    world = world_of(net())
    gate = {"on": False}

    def forward(h, own=world.model[1].forward):
        with torch.no_grad():
            factor = (3 * h).sigmoid()
        return own(h) * factor if gate["on"] else own(h)

    world.model[1].forward = forward
    checks.reweighter = reweighter = reweighter_of(world)
    plain_loop(world, reweighter.loss)
    plain_loop(world, reweighter.loss)
    gate["on"] = True
    plain_loop(world, reweighter.loss)
    assert reweighter.result.meta_gradient is None  # given up
    plain_loop(world, reweighter.loss)
    assert checks == [1, 4]
    assert reweighter.engine == "reverse"


def test_nothing_is_believed_for_ever_after_loading(checks):
    world = world_of(net())
    checks.reweighter = reweighter = reweighter_of(world)
    for _ in range(3):
        plain_loop(world, reweighter.loss)
    state = reweighter.state_dict()
    checks.reweighter = again = reweighter_of(world)
    again.load_state_dict(state)
    assert (again.engine, again.meta_updates) == ("auto", 3)
    plain_loop(world, again.loss)
    assert checks == [1, 4]
    assert again.engine == "finite"


# What it falls back on


class Around(nn.Module):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.middle = nn.Linear(5, 7).double(), nn.Linear(7, 3).double(), middle

    def forward(self, x):
        return self.outer(self.middle(torch.tanh(self.inner(x))))


class Identity(torch.autograd.Function):
    """No forward-mode rule; its backward may not be its derivative."""

    factor = 1.0

    @staticmethod
    def forward(ctx, h):
        return h * 1.0

    @classmethod
    def backward(cls, ctx, gradient):
        return gradient * cls.factor


class Reversed(Identity):
    factor = -1.0


class Once(torch.autograd.Function):
    """Backward is not the derivative, and cannot be differentiated itself."""

    @staticmethod
    def forward(ctx, h):
        return h * 1.0

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return -gradient


def with_no_grad(h):
    with torch.no_grad():
        gate = (2 * h).sigmoid()
    return h * gate


MIDDLES = {
    "plain": (lambda h: h, {"finite", "forward", "reverse"}),
    "no_forward_rule": (Identity.apply, {"finite", "reverse"}),
    "detached": (lambda h: h * (2 * h).sigmoid().detach(), {"forward", "reverse"}),
    "no_grad": (with_no_grad, {"reverse"}),
    "reversed": (Reversed.apply, {"reverse"}),
    "once": (Once.apply, set()),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_auto_takes_the_first_engine_that_is_right(name, caplog):
    middle, right = MIDDLES[name]
    world = world_of(Around(middle))
    reweighter = reweighter_of(world)
    caplog.set_level(logging.INFO, "torch_molere")
    if not right:
        with pytest.raises(RuntimeError) as error:
            plain_loop(world, reweighter.loss)
        for part in ("'finite' is", "'forward' cannot be used", "'reverse' is", "Likely causes"):
            assert part in str(error.value)
        return
    for _ in range(2):
        plain_loop(world, reweighter.loss)
    first = next(engine for engine in ("finite", "forward", "reverse") if engine in right)
    assert reweighter.engine == first
    assert caplog.text.count(f"uses the '{first}' engine") == 1
    assert caplog.text.count("differentiates the training graph twice") == (first == "reverse")


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.parametrize("engine", ["finite", "forward", "reverse"])
def test_it_passes_exactly_where_the_engine_is_right(name, engine):
    """Right by the oracle, as_backward; by step and by hypergradient."""
    middle, right = MIDDLES[name]
    world = world_of(Around(middle))
    arguments = world.model, world.optimizers[0], world.batch, world.validation, torch.rand(6).double()
    if engine in right:
        reweighter = reweighter_of(world, hypergradient=engine)
        assert max(deviation(world, reweighter=reweighter, as_backward=True) for _ in range(2)) < 1e-5
        exact = hypergradient(*arguments, engine="reverse")
        assert relative(hypergradient(*arguments, engine=engine), exact) < 1e-5
    else:
        with pytest.raises(RuntimeError, match=f"{engine!r} (is|cannot)"):
            plain_loop(world, reweighter_of(world, hypergradient=engine).loss)
        with pytest.raises(RuntimeError, match=f"{engine!r} (is|cannot)"):
            hypergradient(*arguments, engine=engine)


def test_a_forward_that_cannot_be_repeated_is_refused():
    calls = []

    def once(h):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("called again")
        return h

    world = world_of(Around(once))
    with pytest.raises(RuntimeError, match=r"does not repeat: it fails \(called again\).*training reaches: it fails"):
        plain_loop(world, reweighter_of(world).loss)


def test_forward_where_parameters_are_in_half_precision():
    world = world_of(net().bfloat16())
    world.batch, world.validation = ((x.bfloat16(), y) for x, y in (world.batch, world.validation))
    reweighter = reweighter_of(world)
    plain_loop(world, reweighter.loss)
    assert reweighter.engine == "forward"
    with pytest.raises(RuntimeError, match="needs float32 or float64 parameters"):
        hypergradient(world.model, world.optimizers[0], world.batch, world.validation, torch.ones(6), engine="finite")


def test_along_the_meta_gradient_too():
    """A mask in a parameter's hook does not show along the gradient."""
    world = world_of(net())
    world.model[0].weight.register_hook(lambda g: g * (torch.arange(35).reshape(7, 5) % 2))
    reweighter = reweighter_of(world)
    plain_loop(world, reweighter.loss)
    assert reweighter.result.meta_gradient is None and reweighter.meta_updates == 0
    plain_loop(world, reweighter.loss)
    assert reweighter.engine == "reverse" and reweighter.meta_updates == 1
    with pytest.raises(RuntimeError, match="along the direction of the meta-gradient"):
        plain_loop(world, reweighter_of(world, hypergradient="finite").loss)


# What it costs


class Ticking(torch.autograd.Function):
    """Counts forwards and backwards."""

    counts = [0, 0]  # noqa: RUF012

    @staticmethod
    def forward(ctx, h):
        Ticking.counts[0] += 1
        return h * 1.0

    @staticmethod
    def backward(ctx, gradient):
        Ticking.counts[1] += 1
        return gradient


def test_it_costs_one_backward_and_two_replays():
    """One replay at θ, one along the gradient; the one along the meta-gradient is that of every meta-update. The very
    first step tries the first batch of validation, too."""
    world = world_of(Around(Ticking.apply))
    reweighter = reweighter_of(world)
    found = []
    for _ in range(3):
        Ticking.counts[:] = [0, 0]
        plain_loop(world, reweighter.loss)
        found.append(tuple(Ticking.counts))
    assert found == [(6, 3), (3, 2), (3, 2)]  # unchecked: training, validation, and one replay


def test_a_step_without_a_meta_update_repeats_nothing():
    world = world_of(Around(Ticking.apply))
    reweighter = reweighter_of(world, every=3)
    plain_loop(world, reweighter.loss)
    Ticking.counts[:] = [0, 0]
    plain_loop(world, reweighter.loss)
    assert Ticking.counts == [1, 1]


# Its arithmetic


@pytest.mark.parametrize("engine", ["finite", "forward", "reverse"])
def test_agreement(engine):
    torch.manual_seed(0)
    weights, rows = torch.rand(8).double() / 8, torch.randn(8, 20).double()
    direction, gradient = torch.randn(20).double(), weights @ rows
    derivatives = rows @ direction

    def agree(found, along=direction, reduced=False):
        return agreement(engine, weights, found, [along], [gradient], reduced=reduced)

    assert agree(derivatives)[0] < 1e-12 and agree(derivatives)[1]
    assert not agree(derivatives * 1.01)[1] and agree(derivatives * 1.01, reduced=True)[1]
    assert not agree(-derivatives)[1] and not agree(torch.zeros(8).double())[1]
    assert agree(torch.zeros(8).double(), torch.zeros(20).double()) == (0.0, True)
    along = rows @ gradient
    assert agree(along * 1.05, gradient, reduced=True)[1] and not agree(along * 1.5, gradient, reduced=True)[1]
    single = agreement(
        engine, weights.float(), derivatives.float() * 1.0005, [direction.float()], [gradient.float()], reduced=False
    )
    assert single[1]


def test_losses_that_average_out_are_told_apart():
    """The sum is blind to another order of the instances; the losses themselves are not."""
    model = net()
    x, y = data(1)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    losses = F.cross_entropy(model(x), y, reduction="none")
    call = Call(model, torch.device("cpu"), ((x[order],), {}), (model,))
    owners = list(model.parameters())
    replay = Replay(model, PerSampleLoss(), call, lambda outputs: outputs, y[order], owners, call.autocast)
    with pytest.raises(RuntimeError, match="the forward does not repeat"):
        examine("finite", replay, [p.detach() for p in owners], losses, torch.full((6,), 1 / 6).double())


def test_given_weights_are_those_of_the_check():
    assert Given()(type("Samples", (), {"losses": torch.zeros(3)})).tolist() == pytest.approx([0.4, 1.0, 1.6])

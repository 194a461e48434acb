"""Every engine against a central difference, a hand-written double backward, ``higher`` and each other (float64)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_molere import hypergradient
from torch_molere.hypergradients.engines import OwnGraph, finite_difference
from torch_molere.hypergradients.functional import Call, Replay
from torch_molere.losses import PerSampleLoss

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.05, "maximize": True, "momentum": 0.5}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adam-maximize": (torch.optim.Adam, {"lr": 0.01, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1}),
}


def problem(seed=0, kind=torch.optim.SGD, warm=7, **options):
    """A small smooth classifier whose optimizer has taken a few steps, and two batches."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimizer = kind(model.parameters(), **options)
    x = torch.randn(11, 5, generator=generator, dtype=torch.double)
    y = torch.randint(3, (11,), generator=generator)
    xv = torch.randn(6, 5, generator=generator, dtype=torch.double)
    yv = torch.randint(3, (6,), generator=generator)
    for _ in range(warm):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    weights = torch.rand(11, generator=generator, dtype=torch.double) + 0.2
    return model, optimizer, (x, y), (xv, yv), weights


def validation_loss_after(model, optimizer, train, validation, weights, steps=1):
    """L_val(θ⁺) by really taking the steps, on copies."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for _ in range(steps):
        optimizer.zero_grad()
        (weights * F.cross_entropy(model(train[0]), train[1], reduction="none")).mean().backward()
        optimizer.step()
    return F.cross_entropy(model(validation[0]), validation[1]).item()


def central_difference(model, optimizer, train, validation, weights, steps=1, h=1e-5):
    def at(i, shift):
        shifted = weights.clone()
        shifted[i] += shift
        return validation_loss_after(model, optimizer, train, validation, shifted, steps)

    return torch.tensor([(at(i, h) - at(i, -h)) / (2 * h) for i in range(len(weights))], dtype=torch.double)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_central_difference(name):
    kind, options = OPTIMIZERS[name]
    setting = problem(kind=kind, **options)
    expected = central_difference(*setting)
    for engine in ("forward", "reverse", "finite", "auto"):
        found = hypergradient(*setting, engine=engine)
        assert torch.allclose(found, expected, rtol=2e-4, atol=1e-10 + 1e-5 * expected.abs().max()), engine


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_central_difference_at_the_first_step(name):
    """A first Adam-like step is nearly the gradient's sign: its derivative is of the size of eps."""
    kind, options = OPTIMIZERS[name]
    setting = problem(kind=kind, warm=0, **options)
    found, expected = hypergradient(*setting, engine="reverse"), central_difference(*setting, h=1e-6)
    assert torch.allclose(found, expected, rtol=2e-4, atol=2e-9)


@pytest.mark.parametrize("name", ["sgd", "sgd-decay", "sgd-momentum", "sgd-dampening", "sgd-nesterov", "rmsprop"])
def test_forward_and_reverse_equal_unrolled(name):
    kind, options = OPTIMIZERS[name]
    setting = problem(kind=kind, **options)
    unrolled = hypergradient(*setting, engine="unrolled")
    for engine in ("forward", "reverse"):
        assert relative(hypergradient(*setting, engine=engine), unrolled) < 1e-10
    assert relative(hypergradient(*setting, engine="finite"), unrolled) < 1e-4


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Adadelta])
def test_forward_equals_unrolled_of_the_other_optimizers_of_higher(kind):
    """But for eps, which higher's Adam adds before the bias correction."""
    options = {"lr": 0.01, "eps": 1e-30 if kind is torch.optim.Adam else 1e-8}
    setting = problem(kind=kind, **options)
    assert relative(*(hypergradient(*setting, engine=engine) for engine in ("forward", "unrolled"))) < 1e-8


def test_engines_draw_the_same_random_masks():
    model, _, *batches = problem()
    model.insert(2, nn.Dropout(0.4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    exact = hypergradient(model, optimizer, *batches, engine="unrolled")
    for engine in ("forward", "reverse", "finite"):
        assert relative(hypergradient(model, optimizer, *batches, engine=engine), exact) < 1e-5


def test_unrolled_equals_double_backward_written_by_hand():
    model, _, (x, y), (xv, yv), weights = setting = problem(lr=0.1)
    w = weights.clone().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = (w * F.cross_entropy(model(x), y, reduction="none")).mean()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    after = {n: p - 0.1 * g for n, p, g in zip(names, parameters, gradients, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(model, after, xv), yv)
    (expected,) = torch.autograd.grad(loss, w)
    for engine in ("unrolled", "forward", "reverse"):
        assert relative(hypergradient(*setting, engine=engine), expected) < 1e-12


def test_unrolled_looks_several_steps_ahead():
    setting = problem(lr=0.1, momentum=0.9)
    found = hypergradient(*setting, engine="unrolled", steps=3)
    assert relative(found, central_difference(*setting, steps=3)) < 1e-7


class Counting(nn.Module):
    """Keeps a count, and a buffer that it writes to."""

    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.total += 1
        return x


@pytest.mark.parametrize("engine", ["auto", "forward", "finite", "reverse", "unrolled"])
def test_changes_nothing(engine):
    model, optimizer, *batches = problem(lr=0.1, momentum=0.9)
    model.append(nn.Dropout(0.3))
    counting = Counting()
    model.append(counting)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    parameters = list(model.parameters())
    gradients = [p.grad.clone() for p in parameters]
    random = torch.get_rng_state()
    hypergradient(model, optimizer, *batches, engine=engine)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert (counting.calls, counting.log) == (0, [])


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.LBFGS, {}), (torch.optim.SparseAdam, {}), (torch.optim.Adafactor, {})]
)
def test_refuses_optimizers_without_the_flag(kind, options):
    model, _, *batches = problem(lr=0.1)
    with pytest.raises(TypeError, match=kind.__name__):
        hypergradient(model, kind(model.parameters(), **options), *batches, engine="forward")


def test_unrolled_refuses_what_higher_would_ignore():
    with pytest.raises(ValueError, match="maximize"):
        hypergradient(*problem(lr=0.1, maximize=True), engine="unrolled")
    with pytest.raises(TypeError, match="AdamW"):
        hypergradient(*problem(kind=torch.optim.AdamW, lr=0.1), engine="unrolled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "exact"}, "engine must be one of"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"steps": 2}, "needs engine='unrolled'"),
        ({"weights": torch.ones(4)}, r"weights must be floating \(11,\)"),
        ({"weights": torch.ones(11).long()}, "weights must be floating"),
    ],
)
def test_refuses_arguments_out_of_their_range(options, message):
    model, optimizer, train, validation, weights = problem(lr=0.1)
    with pytest.raises(ValueError, match=message):
        hypergradient(model, optimizer, train, validation, options.pop("weights", weights), **options)


def test_every_engine_knows_attention():
    """Flash attention has neither a forward-mode rule nor a second derivative on the CPU."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (1, 8)), layer, nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = torch.randn(7, 5, dtype=torch.double), torch.randint(3, (7,))
    setting = (model, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), (x[:4], y[:4]), torch.ones(7).double())
    exact = hypergradient(*setting, engine="unrolled")
    assert relative(hypergradient(*setting, engine="forward"), exact) < 1e-9
    assert relative(hypergradient(*setting, engine="finite"), exact) < 1e-4
    assert relative(central_difference(*setting), exact) < 1e-5


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = kind(5, 6, batch_first=True).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        return self.head(self.cell(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind):
    model = Recurrent(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    _, _, *rest = problem()
    expected = central_difference(model, optimizer, *rest)
    assert relative(hypergradient(model, optimizer, *rest), expected) < 1e-5


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh()).double()
        self.head = nn.Linear(7, 3).double()

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))


@pytest.mark.parametrize("engine", ["forward", "finite", "reverse"])
def test_checkpoints(engine):
    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    _, _, *rest = problem()
    before = copy.deepcopy(model.state_dict())
    found = hypergradient(model, optimizer, *rest, engine=engine)
    assert relative(found, central_difference(model, optimizer, *rest)) < 1e-5
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def replay_of(model, batch):
    call = Call(model, torch.device("cpu"), ((batch[0],), {}), (model,))
    owners = list(model.parameters())
    return Replay(model, PerSampleLoss(), call, lambda outputs: outputs, batch[1], owners, call.autocast)


def test_a_finite_difference_needs_single_precision_and_takes_a_direction_of_zeros():
    model, _, train, *_ = problem(warm=0)
    replay = replay_of(model, train)
    values = [p.detach() for p in replay.owners]
    zeros = [torch.zeros_like(v) for v in values]
    assert torch.equal(finite_difference(replay, values, zeros), torch.zeros(11).double())
    with pytest.raises(TypeError, match="float32 or float64"):
        finite_difference(replay, values, [z.bfloat16() for z in zeros])


def test_the_own_graph_gives_each_instance_its_derivative():
    """Against the per-sample gradients, one by one."""
    model, _, (x, y), *_ = problem(warm=0)
    model.eval()
    losses = F.cross_entropy(model(x), y, reduction="none")
    owners = list(model.parameters())
    direction = [torch.randn_like(p) for p in owners]
    rows = [torch.autograd.grad(loss, owners, retain_graph=True) for loss in losses]
    expected = torch.stack([sum((g * u).sum() for g, u in zip(row, direction, strict=True)) for row in rows])
    found = OwnGraph(losses, owners, (model,)).derivative(direction)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    losses.sum().backward()  # the graph is still there

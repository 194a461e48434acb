"""Every engine against a central difference, a hand-written double backward and each other (float64)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_molere import hypergradient

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
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
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


@pytest.mark.parametrize("engine", ["forward", "finite"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm", [0, 7])
def test_equals_central_difference(name, engine, warm):
    kind, options = OPTIMIZERS[name]
    setting = problem(kind=kind, warm=warm, **options)
    found = hypergradient(*setting, engine=engine)
    expected = central_difference(*setting, h=1e-6 if warm == 0 else 1e-5)
    if name == "rprop":  # only the gradient's sign enters the update
        assert found.abs().max() == 0
        assert expected.abs().max() < 1e-8
        return
    # A first Adam-like step is nearly the gradient's sign: its derivative is of the size of eps.
    assert torch.allclose(found, expected, rtol=2e-4, atol=2e-9 if warm == 0 else 1e-10 + 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", ["sgd", "sgd-decay", "sgd-momentum", "sgd-dampening", "sgd-nesterov", "rmsprop"])
def test_forward_equals_unrolled(name):
    kind, options = OPTIMIZERS[name]
    setting = problem(kind=kind, **options)
    forward, unrolled = (hypergradient(*setting, engine=engine) for engine in ("forward", "unrolled"))
    assert relative(forward, unrolled) < 1e-10


def test_unrolled_equals_double_backward_written_by_hand():
    model, _, (x, y), (xv, yv), weights = setting = problem(lr=0.1)
    w = weights.clone().requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = (w * F.cross_entropy(model(x), y, reduction="none")).mean()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    after = {n: p - 0.1 * g for n, p, g in zip(names, parameters, gradients, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(model, after, xv), yv)
    (expected,) = torch.autograd.grad(loss, w)
    assert relative(hypergradient(*setting, engine="unrolled"), expected) < 1e-12
    assert relative(hypergradient(*setting, engine="forward"), expected) < 1e-12


def test_unrolled_looks_several_steps_ahead():
    setting = problem(lr=0.1, momentum=0.9)
    found = hypergradient(*setting, engine="unrolled", steps=3)
    assert relative(found, central_difference(*setting, steps=3)) < 1e-7


@pytest.mark.parametrize("engine", ["auto", "forward", "finite", "unrolled"])
def test_changes_nothing(engine):
    model, optimizer, *batches = problem(lr=0.1, momentum=0.9)
    model.append(nn.Dropout(0.3))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    hypergradient(model, optimizer, *batches, engine=engine)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


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

"""The look-ahead against the step really taken, and its derivative in closed form against autograd through the step."""

import copy

import pytest
import torch

from torch_molere.derivatives import _adam, diagonal, has_closed_form
from torch_molere.pieces import as_a_whole, in_pieces
from torch_molere.update import Update


class OwnSGD(torch.optim.SGD):
    """The same update; of a subclass nothing is known, so that autograd differentiates it."""


class OwnAdam(torch.optim.Adam):
    pass


class OwnAdamW(torch.optim.AdamW):
    pass


OPTIMIZERS = [
    (torch.optim.SGD, OwnSGD, {}),
    (torch.optim.SGD, OwnSGD, {"weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, OwnSGD, {"momentum": 0.9}),
    (torch.optim.SGD, OwnSGD, {"momentum": 0.9, "dampening": 0.3}),
    (torch.optim.SGD, OwnSGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.Adam, OwnAdam, {}),
    (torch.optim.Adam, OwnAdam, {"weight_decay": 0.1, "betas": (0.7, 0.95), "eps": 1e-3}),
    (torch.optim.Adam, OwnAdam, {"weight_decay": 0.1, "maximize": True}),
    (torch.optim.AdamW, OwnAdamW, {}),
    (torch.optim.AdamW, OwnAdamW, {"weight_decay": 0.3, "maximize": True}),
]


@pytest.fixture
def counts_in_double():
    """Adam's differentiable step computes its corrections of bias in the precision of its count of steps."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def prepared(kind, options, taken, dtype=torch.double):
    """An optimizer of three parameters after some steps, of which the last had no gradient so far."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)

    parameters = [normal(3, 4), normal(5), normal(2, 2)]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.2}]
    optimizer = kind(groups, lr=0.05, **options)
    for _ in range(taken):
        for parameter in parameters[:2]:
            parameter.grad = normal(*parameter.shape)
        optimizer.step()
    gradients = [normal(*parameter.shape) for parameter in parameters]
    cotangents = [normal(*parameter.shape) for parameter in parameters]
    return optimizer, parameters, gradients, cotangents


@pytest.mark.usefixtures("counts_in_double")
@pytest.mark.parametrize(("kind", "own", "options"), OPTIMIZERS)
@pytest.mark.parametrize("taken", [0, 1, 6])
@pytest.mark.parametrize("without", [None, 0, 2])
def test_closed_form_equals_autograd(kind, own, options, taken, without):
    found = []
    for each in (kind, own):
        optimizer, parameters, gradients, cotangents = prepared(each, options, taken)
        assert has_closed_form(optimizer) == (each is kind)
        if without is not None:
            gradients[without] = None
        cotangents[1] = None
        update = Update(optimizer, parameters, gradients)
        found.append((update.look_ahead(), update.transpose(cotangents)))
    # At Adam's first step, here always the third parameter's, autograd is left with rounding.
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-15)
    assert found[0][1][0 if without == 2 else 2].abs().min() > 0
    assert not found[0][1][1].any()


@pytest.mark.parametrize(("kind", "own", "options"), OPTIMIZERS)
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("taken", [0, 6])
def test_looks_at_the_very_step_that_follows(kind, own, options, implementation, taken):
    optimizer, parameters, gradients, _ = prepared(kind, options | implementation, taken, torch.float)
    before = copy.deepcopy((parameters, optimizer.state_dict()))
    after = Update(optimizer, parameters, gradients).look_ahead()
    torch.testing.assert_close((parameters, optimizer.state_dict()), before, rtol=0, atol=0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    torch.testing.assert_close(after, parameters, rtol=0, atol=0)


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_single_precision_is_enough(taken):
    """At Adam's first step all but a term of the size of eps cancels."""
    single, double = (prepared(torch.optim.AdamW, {}, taken, dtype) for dtype in (torch.float, torch.double))
    for found, expected in zip(*(Update(*s[:3]).transpose(s[3]) for s in (single, double)), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_all_parameters_together_as_one_by_one(options):
    """On an accelerator a group's parameters go through together, whatever the count of their steps."""
    optimizer, parameters, gradients, _ = prepared(torch.optim.Adam, options, 3)
    pieces = as_a_whole(optimizer, parameters, parameters, gradients)
    one_by_one = [diagonal(optimizer, [piece])[0] for piece in pieces]
    torch.testing.assert_close(diagonal(optimizer, pieces), one_by_one, rtol=1e-12, atol=0)
    together = _adam({**optimizer.param_groups[0], "lr": 1.0}, pieces)  # the last one's first step among them
    for found, expected, rate in zip(together, one_by_one, (0.05, 0.05, 0.2), strict=True):
        torch.testing.assert_close(rate * found, expected, rtol=1e-12, atol=0)


def test_on_an_accelerator_parameters_go_through_whole_and_together(monkeypatch):
    monkeypatch.setattr("torch_molere.pieces.SIZE", 5)
    parameters = [torch.empty(3, 4, device="meta"), torch.empty(5, device="meta")]
    (pieces,) = in_pieces(torch.optim.SGD(parameters, lr=0.1), parameters, parameters, [None, None])
    assert [piece.values for piece in pieces] == parameters and not any(piece.elements for piece in pieces)


@pytest.mark.parametrize(("kind", "own", "options"), OPTIMIZERS)
@pytest.mark.parametrize("taken", [0, 6])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_in_pieces_as_a_whole(kind, own, options, taken, size, monkeypatch):
    found = []
    for each in (size, 100):
        monkeypatch.setattr("torch_molere.pieces.SIZE", each)
        optimizer, parameters, gradients, cotangents = prepared(kind, options, taken)
        gradients[2], cotangents[1] = None, None
        pieces = list(in_pieces(optimizer, parameters, parameters, gradients))
        assert len(pieces) == {1: 21, 3: 8, 5: 5, 100: 1}[each]  # of 12, 5 and 4 elements
        update = Update(optimizer, parameters, gradients)
        found.append((update.look_ahead(), update.transpose(cotangents)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_pieces_cover_every_element_once(monkeypatch):
    monkeypatch.setattr("torch_molere.pieces.SIZE", 5)
    optimizer, parameters, gradients, _ = prepared(torch.optim.Adam, {}, 3)
    gradients[0] = gradients[0].t().contiguous().t()  # of which there are no flat views
    for pieces in in_pieces(optimizer, parameters, parameters, gradients):
        assert len(pieces) == 1 or sum(piece.values.numel() for piece in pieces) <= 5
        for piece in pieces:
            piece.values.add_(1.0)
            assert all(value.shape in (piece.values.shape, ()) for value in piece.state.values())
            assert (piece.elements is None) == (piece.owner is not parameters[1] or piece.values.numel() == 5)
    unchanged = prepared(torch.optim.Adam, {}, 3)[1]
    torch.testing.assert_close(parameters, [parameter + 1.0 for parameter in unchanged], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.Adam, OwnAdam])
def test_zero_where_there_is_no_finite_derivative(kind):
    optimizer, parameters, gradients, cotangents = prepared(kind, {}, 0)
    gradients[0][1:] = 0.0
    u = Update(optimizer, parameters, gradients).transpose(cotangents)[0]
    assert not u[1:].any()
    assert u[0].all()


@pytest.mark.usefixtures("counts_in_double")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9, "lr": torch.tensor(0.05, dtype=torch.double)}),
        (torch.optim.AdamW, {"lr": torch.tensor(0.05, dtype=torch.double), "foreach": False}),
    ],
)
def test_leaves_to_autograd_what_it_does_not_know(kind, options):
    parameters = [torch.randn(3, 4, dtype=torch.double)]
    gradients, cotangents = ([torch.randn(3, 4, dtype=torch.double)] for _ in range(2))
    asked = kind(parameters, **({"lr": 0.05} | options))
    assert not has_closed_form(asked)
    plain = kind(parameters, lr=0.05, momentum=0.9) if kind is torch.optim.SGD else kind(parameters, lr=0.05)
    assert has_closed_form(plain)
    # At a first step the largest second moment is the second moment.
    found, expected = (Update(optimizer, parameters, gradients) for optimizer in (asked, plain))
    torch.testing.assert_close(found.look_ahead(), expected.look_ahead(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.transpose(cotangents), expected.transpose(cotangents), rtol=1e-7, atol=1e-15)

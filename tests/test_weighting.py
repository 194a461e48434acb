"""Weightings, each against its definition. That they help training is for the studies and tests/test_kinds.py."""

import math

import pytest
import torch
from some_samples import Operations, some_samples
from torch import nn

from torch_molere.weighting import (
    FreeWeighting,
    GroupWeighting,
    InputWeighting,
    OnlineWeighting,
    RandomWeighting,
    SignalWeighting,
    normalised,
    standardised,
)

KINDS = {
    "default": lambda: SignalWeighting(),
    "signals": lambda: SignalWeighting(("loss", "label"), num_classes=3, hidden=6),
    "inputs": lambda: InputWeighting(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))),
    "classifier": lambda: InputWeighting.from_classifier(nn.Linear(3, 3), 3),
    "free": lambda: FreeWeighting(30),
    "groups": lambda: GroupWeighting(torch.arange(30) % 4),
}


def samples(**changed):
    return some_samples(30, indices=torch.arange(30), **changed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "inputs"])
def test_a_new_weighting_weighs_all_alike(kind):
    weights = normalised(KINDS[kind]()(samples()), None, 3.0)
    assert torch.equal(weights, torch.ones(30))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_lie_between_zero_and_one_and_learn(kind):
    torch.manual_seed(5)
    weighting = KINDS[kind]()
    with torch.no_grad():
        for parameter in weighting.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    weights = weighting(samples())
    assert weights.shape == (30,)
    assert 0.0 <= weights.min() < weights.max() <= 1.0
    gradients = torch.autograd.grad(weights.sum(), list(weighting.parameters()))
    assert all(gradient.to_dense().any() for gradient in gradients)


def test_input_weighting_leaves_the_classifier_alone_and_checks_its_network():
    classifier = nn.Linear(3, 3)
    before = [parameter.clone() for parameter in classifier.parameters()]
    weighting = InputWeighting.from_classifier(classifier.double(), 3)
    assert {parameter.dtype for parameter in weighting.parameters()} == {torch.double}
    with torch.no_grad():
        for parameter in weighting.parameters():
            parameter.zero_()
    assert all(torch.equal(a.double(), b) for a, b in zip(before, classifier.parameters(), strict=True))
    assert InputWeighting(nn.Flatten(0))(some_samples(4, num_classes=None)).shape == (4,)
    with pytest.raises(ValueError, match=r"network must return \(30,\) or \(30, 1\), got \(30, 2\)"):
        InputWeighting(nn.Linear(3, 2))(samples())


def test_free_weighting_is_by_row():
    weighting = FreeWeighting(100)
    with torch.no_grad():
        weighting.scores.weight.copy_(torch.linspace(-3, 3, 100).unsqueeze(1))
    rows = torch.tensor([99, 3, 3, 50, 0])
    batch = some_samples(5, indices=rows)
    torch.testing.assert_close(weighting(batch), torch.sigmoid(torch.linspace(-3, 3, 100)[rows]))
    (gradient,) = torch.autograd.grad(weighting(batch).sum(), weighting.scores.weight)
    assert gradient.is_sparse and sorted(gradient.coalesce().indices()[0].tolist()) == [0, 3, 50, 99]
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 100\), got 100; make FreeWeighting"):
        weighting(some_samples(2, indices=torch.tensor([1, 100])))
    with pytest.raises(ValueError, match="needs the rows' indices"):
        weighting(some_samples(2))
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        FreeWeighting(0)


def test_online_weighting_is_the_evidence():
    evidence = torch.tensor([0.0, 0.3, 0.5, -2.0, 0.1])
    batch = some_samples(5, meta_gradients=evidence)
    weighting = OnlineWeighting(offset=0.3, decay=0.7)
    torch.testing.assert_close(weighting(batch), torch.tensor([0.3, 0.0, 0.0, 2.3, 0.2]))
    assert weighting.meta_decay == 0.7 and not list(weighting.parameters())
    ren = OnlineWeighting(offset=0.0, decay=0.0)  # Learning to Reweight: max(0, -gradient), normalised to sum to one
    published = (-evidence).clamp_min(0) / (-evidence).clamp_min(0).sum()
    torch.testing.assert_close(normalised(ren(batch)) / 5, published)
    nothing = some_samples(5)
    assert torch.equal(normalised(ren(nothing), None, 3.0), torch.zeros(5))  # no step
    assert torch.equal(normalised(weighting(nothing), None, 3.0), torch.ones(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnlineWeighting(offset=-0.1), "offset must be finite and not negative, got -0.1"),
        (lambda: OnlineWeighting(offset=float("inf")), "offset must be finite"),
        (lambda: OnlineWeighting(decay=1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: RandomWeighting(-1.0), "spread must be finite and not negative, got -1.0"),
        (lambda: RandomWeighting(float("nan")), "spread must be finite"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("spread", "deviation"), [(0.0, 0.0), (1.0, 0.42), (2.0, 0.63), (3.0, 0.74)])
def test_random_weights_have_the_distribution_that_is_stated(spread, deviation):
    z = torch.linspace(-8, 8, 4001, dtype=torch.double)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    weights = torch.sigmoid(spread * z)
    by_quadrature = (density * (weights - 0.5) ** 2).sum().sqrt().item() / 0.5
    assert by_quadrature == pytest.approx(deviation, abs=0.006)
    torch.manual_seed(3)
    batch = some_samples(20_000)
    drawn = RandomWeighting(spread)(batch)
    assert normalised(drawn).std().item() == pytest.approx(by_quadrature, abs=0.01)
    torch.manual_seed(3)
    assert torch.equal(RandomWeighting(spread)(batch), drawn)


def test_standardised():
    gradient = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.double)
    deviation = math.sqrt(sum((g - 1.3 / 4) ** 2 for g in gradient.tolist()) / 4)
    torch.testing.assert_close(standardised(gradient), gradient / deviation)
    torch.testing.assert_close(standardised(1e-30 * gradient), gradient / deviation)
    assert torch.equal(standardised(torch.full((7,), 0.1)), torch.zeros(7))  # and not their rounding
    assert torch.equal(standardised(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(standardised(torch.tensor([5.0])), torch.zeros(1))
    assert standardised(torch.zeros(0)).shape == (0,)


def test_few_operations():
    """A small network's step is a few hundred of them."""
    batch, weighting = some_samples(128), SignalWeighting()
    with torch.no_grad(), Operations() as forward:
        weights = weighting(batch)
    with Operations() as normalisation:
        normalised(weights, None, 3.0)
    assert forward.count <= 16
    assert normalisation.count <= 9


def test_rows_of_a_group_weigh_alike():
    """w = sigmoid(10 s) of the row's group; the gradient of a group's score sums over its rows."""
    groups = torch.tensor([2, 0, 0, 1, 2, 2])
    weighting = GroupWeighting(groups)
    with torch.no_grad():
        weighting.scores.copy_(torch.tensor([-0.1, 0.0, 0.2]))
    of_group = torch.tensor([1 / (1 + math.exp(1.0)), 0.5, 1 / (1 + math.exp(-2.0))])
    rows = torch.tensor([5, 1, 1, 3])
    weights = weighting(some_samples(4, indices=rows))
    torch.testing.assert_close(weights.detach(), of_group[groups[rows]])
    weights.sum().backward()
    slope = 10 * of_group * (1 - of_group)
    torch.testing.assert_close(weighting.scores.grad, slope * torch.tensor([2.0, 1.0, 1.0]))
    over_rows = of_group[groups].mean()
    torch.testing.assert_close(weighting.weights, of_group / over_rows)


def test_groups_that_are_refused():
    with pytest.raises(TypeError, match=r"group_of_row must be integers, got torch\.float32"):
        GroupWeighting(torch.zeros(3))
    for wrong in ([0, -1], [], [[0], [1]]):
        with pytest.raises(ValueError, match="group_of_row must be"):
            GroupWeighting(torch.tensor(wrong, dtype=torch.long))
    weighting = GroupWeighting([0, 1])
    with pytest.raises(ValueError, match="needs the rows' indices"):
        weighting(some_samples(3))
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\), got 2"):
        weighting(some_samples(1, indices=torch.tensor([2])))

"""λ that follows from how far meta-gradients repeat themselves."""

import copy
import math

import pytest
import torch
from torch import nn

from torch_molere import MetaReweighter
from torch_molere.shrinkage import BELIEF, DECAY, REPEATED, START, STRONGEST, Shrinkage


def test_the_slope_is_that_of_a_weighted_regression_through_zero():
    generator = torch.Generator().manual_seed(0)
    shrinkage, products, squares = Shrinkage("auto"), [], []
    for _ in range(30):
        memory = torch.randn(50, generator=generator)
        evidence = 0.4 * memory + torch.randn(50, generator=generator)
        known = torch.rand(50, generator=generator) < 0.7
        shrinkage.observe(evidence, memory, known)
        products.append((evidence[known].double() @ memory[known].double()).item())
        squares.append((memory[known].double() @ memory[known].double()).item())
    ages = [DECAY**age for age in reversed(range(30))]
    top = sum(a * p for a, p in zip(ages, products, strict=True)) + START * BELIEF
    bottom = sum(a * s for a, s in zip(ages, squares, strict=True)) + BELIEF
    assert shrinkage.repeated == pytest.approx(top / bottom, rel=1e-6)
    assert shrinkage.strength == pytest.approx(REPEATED * bottom / top, rel=1e-6)
    assert 0.25 < shrinkage.repeated < 0.45  # the slope is 0.4


@pytest.mark.parametrize(("signal", "expected"), [(0.0, STRONGEST), (1.0, REPEATED / 0.5)])
def test_noise_is_shrunk_and_signal_is_not(signal, expected):
    """Memory is the mean of n draws s + ε: the slope is Var(s) / (Var(s) + Var(ε)/n)."""
    generator = torch.Generator().manual_seed(1)
    shrinkage = Shrinkage("auto")
    for _ in range(600):
        s = signal * torch.randn(100, generator=generator)
        memory, evidence = (s + torch.randn(100, generator=generator) for _ in range(2))
        shrinkage.observe(evidence, memory, torch.ones(100, dtype=torch.bool))
    assert shrinkage.strength == pytest.approx(expected, rel=0.1 if signal else 0.75)
    assert shrinkage.strength <= STRONGEST


def test_where_it_starts():
    assert Shrinkage("auto").strength == pytest.approx(0.3)
    assert (Shrinkage(0.2).strength, Shrinkage(None).strength) == (0.2, None)


def test_a_fixed_one_stays():
    shrinkage = Shrinkage(0.2)
    shrinkage.observe(torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.bool))
    assert shrinkage.strength == 0.2 and shrinkage.state_dict() == {"products": 0.0, "squares": 0.0}


@pytest.mark.parametrize(
    "sums",
    [{"products": math.nan, "squares": 1.0}, {"products": 0.0, "squares": -1.0}, {"products": "1", "squares": 1.0}],
)
def test_damaged_sums_are_refused(sums):
    shrinkage = Shrinkage("auto")
    with pytest.raises(ValueError, match="the shrinkage's sums must be finite"):
        shrinkage.load_state_dict(sums)
    assert shrinkage.strength == pytest.approx(0.3)


def run(reweighter, steps, start=0):
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]
    for step in range(start, start + steps):
        reweighter.step((*batches[step % 4], torch.arange(8) + 8 * (step % 4)))


def made():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    return MetaReweighter(model, optimizer, validation=validation, every=1, warmup_steps=0)


def test_the_memory_that_is_compared_is_the_one_before_the_batch():
    reweighter, seen = made(), []
    observe = reweighter.shrinkage.observe
    reweighter.shrinkage.observe = lambda *given: (seen.append(given), observe(*given))
    run(reweighter, 4)
    assert reweighter.shrinkage.strength == pytest.approx(0.3)  # no row has come twice
    before = reweighter.history.to_pandas().meta_gradient
    run(reweighter, 1)
    evidence, memory, known = seen[-1]
    assert bool(known.all()) and torch.allclose(memory, torch.tensor(before[:8].to_numpy()))
    b = ((evidence @ memory).item() + START * BELIEF) / ((memory @ memory).item() + BELIEF)
    assert reweighter.shrinkage.strength == pytest.approx(REPEATED / b, rel=1e-4)
    assert reweighter.metrics()["shrinkage"] == reweighter.shrinkage.strength


def test_it_is_resumed():
    first = made()
    run(first, 6)
    state, weights = copy.deepcopy((first.state_dict(), first.model.state_dict()))
    run(first, 4, 6)
    second = made()
    second.model.load_state_dict(weights)
    second.load_state_dict(state)
    run(second, 4, 6)
    assert second.shrinkage.strength == first.shrinkage.strength
    assert torch.equal(*(r.weighting.network[-1].weight for r in (first, second)))

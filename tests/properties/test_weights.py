"""Normalised weights: whatever the weights, the mean, the bound and what must not matter."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from torch_molere.weighting import normalised

raw = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=40)
bounds = st.one_of(st.none(), st.floats(1.0, 25.0))
sides = st.integers(0, 2**40 - 1)


def given_weights(values, bits):
    weights = torch.tensor(values, dtype=torch.double)
    return weights, torch.tensor([bits >> i & 1 == 0 for i in range(len(values))])


def feasible(weights, training, bound):
    """Whether the bound leaves a mean of one: enough of the training side weighs anything."""
    positive, n = int((weights[training] > 0).sum()), int(training.sum())
    return positive > 0 and (bound is None or positive * bound >= n)


@given(values=raw, bits=sides, bound=bounds)
def test_mean_one_over_the_training_side_and_never_above_the_bound(values, bits, bound):
    weights, training = given_weights(values, bits)
    found = normalised(weights, training, bound)
    assert torch.isfinite(found).all() and (found >= 0).all()
    assert not found[~training].any()
    assert not found[weights == 0].any()
    if bound is not None:
        assert found.max() <= bound
    if feasible(weights, training, bound):
        assert found[training].mean().item() == pytest.approx(1.0, rel=1e-12)
    elif bound is not None:  # the bound wins: nobody weighs more, the mean is less than one
        assert torch.equal(found, torch.where(training & (weights > 0), bound, 0.0).double())


@given(values=raw, bits=sides, bound=st.floats(1.0, 25.0))
def test_it_is_where_clipping_and_renormalising_ends(values, bits, bound):
    weights, training = given_weights(values, bits)
    assume(feasible(weights, training, bound))
    assume(int((weights[training] > 0).sum()) * bound > 1.01 * int(training.sum()))  # or it takes very long
    clipped = weights * training
    for _ in range(3000):
        clipped = (clipped / clipped[training].mean()).clamp_max(bound)
    torch.testing.assert_close(normalised(weights, training, bound), clipped, rtol=1e-6, atol=1e-9)


@given(values=raw, bits=sides, bound=bounds, seed=st.integers(0, 99), scale=st.sampled_from([1e-200, 0.3, 7.0, 1e200]))
def test_neither_order_nor_scale_matters(values, bits, bound, seed, scale):
    weights, training = given_weights(values, bits)
    found = normalised(weights, training, bound)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(normalised(weights[order], training[order], bound), found[order], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(normalised(scale * weights, training, bound), found, rtol=1e-12, atol=0.0)


@given(value=st.floats(1e-30, 1e30), size=st.integers(1, 300), bits=sides, bound=bounds)
def test_equal_weights_are_exactly_one(value, size, bits, bound):
    training = torch.tensor([bits >> (i % 40) & 1 == 0 for i in range(size)])
    for dtype in (torch.float, torch.double):
        weights = torch.full((size,), value, dtype=dtype)
        assert torch.equal(normalised(weights, training, bound), training.to(dtype))
        assert torch.equal(normalised(weights, None, bound), torch.ones(size, dtype=dtype))
        assert torch.equal(normalised(0 * weights, training, bound), torch.zeros(size, dtype=dtype))


@given(
    values=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12), bits=sides, bound=bounds, seed=st.integers(0, 99)
)
def test_its_derivative_is_a_central_difference(values, bits, bound, seed):
    weights, training = given_weights(values, bits)
    assume(bool(training.any()))
    step = 1e-6
    clear = normalised(weights, training, bound)
    near = torch.zeros(()) if bound is None else (clear - bound).abs()
    sides_differ = [normalised(weights * (1 + sign * 1e-4), training, bound) for sign in (-1, 1)]
    assume(torch.allclose(*sides_differ))
    cotangent = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    variable = weights.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(normalised(variable, training, bound) @ cotangent, variable)
    for i, unit in enumerate(torch.eye(len(values), dtype=torch.double)):
        ends = [normalised(weights + sign * step * unit, training, bound) for sign in (1, -1)]
        if bound is not None and ((ends[0] == bound) != (ends[1] == bound)).any():
            continue  # a weight comes to the bound in between: there is no derivative
        if bound is not None and bool(((near > 0) & (near < 1e-4)).any()):
            continue
        difference = ((ends[0] - ends[1]) @ cotangent / (2 * step)).item()
        assert gradient[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-6)


@given(values=raw, bits=sides, bound=bounds)
def test_the_way_of_an_accelerator_is_the_same(values, bits, bound):
    """Which cannot ask whether the bound is reached: the whole computation for weights below it too."""
    from torch_molere.weighting import _bounded

    weights, training = given_weights(values, bits)
    assume(bound is not None)
    relative = weights * training
    relative = relative / relative.max().clamp_min(1e-300)
    torch.testing.assert_close(
        _bounded(relative, training.double().sum(), bound), normalised(weights, training, bound), rtol=1e-12, atol=0.0
    )


def test_a_bound_below_the_mean_is_refused():
    for bound in (0.99, 0.0, float("nan")):
        with pytest.raises(ValueError, match="max_weight must be at least 1"):
            normalised(torch.ones(3), None, bound)
    assert normalised(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3.0).shape == (0,)

"""Exact comparison of nested states."""

import torch
from torch.utils import _pytree as pytree


def assert_same(a, b, rtol=0.0, atol=0.0):
    """Equal structure, equal values; tensors within a tolerance if one is given."""
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert x == y or (x != x and y != y)  # NaN is the same as NaN

"""Margins against their definition, and splits by them (invariant 6)."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_molere.margins import margins, margins_of, probabilistic_margin, split_by_margin

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 9), st.integers(2, 7), st.floats(-50, 50))
def test_margin_properties(seed, size, classes, shift):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, classes, generator=generator, dtype=torch.double)
    targets = torch.randint(classes, (size,), generator=generator)
    found = probabilistic_margin(logits, targets)
    assert ((found >= -1) & (found <= 1)).all()
    assert torch.equal(found > 0, logits.argmax(1) == targets)
    torch.testing.assert_close(probabilistic_margin(logits + shift, targets), found, rtol=0, atol=1e-12)
    for row, target, margin in zip(logits.softmax(1).tolist(), targets.tolist(), found.tolist(), strict=True):
        assert margin == pytest.approx(row[target] - max(p for c, p in enumerate(row) if c != target), abs=1e-12)


def test_margins_of_ignored_targets_and_log_probabilities():
    logits, classes = torch.randn(4, 3, dtype=torch.double), torch.tensor([2, -1, 0, -1])
    found = margins_of(logits, classes)
    assert found[classes < 0].tolist() == [1.0, 1.0]
    kept = classes >= 0
    torch.testing.assert_close(found[kept], probabilistic_margin(logits[kept], classes[kept]))
    torch.testing.assert_close(margins_of(logits.log_softmax(1), classes), found)


def test_half_precision_is_right_where_the_prediction_is():
    logits = torch.tensor([[0.0, 0.002]], dtype=torch.bfloat16)  # both probabilities are 0.5 in bfloat16
    found = probabilistic_margin(logits, torch.tensor([1]))
    assert found.dtype == torch.float32 and found > 0


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2])),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1])),
    ],
)
def test_margin_refuses(logits, targets):
    with pytest.raises(ValueError, match=r"logits|targets"):
        probabilistic_margin(logits, targets)


def test_margins_of_a_loader_in_order_and_mode_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model[1].eval()
    x, y = torch.randn(23, 4), torch.randint(3, (23,))
    found = margins(model, DataLoader(TensorDataset(x, y), batch_size=5))
    assert [module.training for module in model] == [True, False, True, True]
    torch.testing.assert_close(found, probabilistic_margin(model.eval()(x), y).detach())
    with pytest.raises(ValueError, match="no batches"):
        margins(model, [])


@dataclass
class Output:
    logits: torch.Tensor


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *, x):
        return Output(self.linear(x))


def test_margins_take_dicts_and_output_objects():
    model, x, y = Named(), torch.randn(6, 4), torch.randint(3, (6,))
    assert torch.equal(margins(model, [({"x": x}, y)]), margins(model.linear, [(x, y)]))


@given(seeds, st.integers(2, 40), st.sampled_from(["hard", "easy"]), st.floats(0.01, 0.6), st.floats(0, 0.39))
def test_split_covers_and_takes_the_extreme(seed, rows, side, fraction, trim):
    values = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    train, validation = split_by_margin(TensorDataset(values), values, side, fraction, trim)
    assert sorted([*train.indices, *validation.indices]) == list(range(rows))
    assert len(validation) >= 1 and len(train) >= 1
    ranked = torch.argsort(values, descending=side == "easy", stable=True).tolist()
    first = round(trim * rows)
    assert sorted(ranked[first : first + len(validation)]) == validation.indices
    assert abs(len(validation) - fraction * rows) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"side": "both"},
        {"fraction": 0.0},
        {"fraction": 1.0},
        {"trim": 0.95},
        {"trim": -0.1},
        {"margins": torch.ones(3)},
        {"margins": torch.tensor([1.0, torch.nan, 0.0, 0.0])},
        {"dataset": TensorDataset(torch.ones(1)), "margins": torch.ones(1)},
    ],
)
def test_split_refuses(options):
    arguments = {"dataset": TensorDataset(torch.ones(4)), "margins": torch.ones(4), **options}
    with pytest.raises(ValueError, match=next(iter(options))):
        split_by_margin(**arguments)

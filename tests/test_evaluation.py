"""How a model is called, and what its outputs may be."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from torch_molere import hypergradient, margins
from torch_molere.evaluation import arguments_of, batch_size, device_of, inputs_of, logits_of
from torch_molere.samples import Samples, default_correct


def test_arguments_and_back():
    a, b = torch.ones(2), torch.zeros(2)
    for inputs, expected in ((a, ((a,), {})), ((a, b), ((a, b), {})), ({"x": a}, ((), {"x": a}))):
        assert arguments_of(inputs) == expected
        assert inputs_of(expected) is inputs or inputs_of(expected) == inputs
    assert arguments_of([a, b]) == ((a, b), {})
    assert inputs_of(((a,), {"x": b})) == ((a,), {"x": b})


def test_outputs_need_logits():
    with pytest.raises(TypeError, match=r"outputs must be a tensor or have a tensor \.logits, got dict"):
        logits_of({"scores": torch.ones(2)})


@pytest.mark.parametrize("tree", [[], [torch.ones(())], (torch.ones(2), torch.ones(3))])
def test_batches_need_one_first_dimension(tree):
    with pytest.raises(ValueError, match="same first dimension"):
        batch_size(tree)


def test_device_of_a_model_without_tensors():
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False)) == torch.device("cpu")


@dataclass
class Output:
    logits: torch.Tensor


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()

    def forward(self, *, x):
        return Output(self.linear(x))


def test_hypergradient_and_margins_take_dicts_and_output_objects():
    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = ({"x": torch.randn(6, 4, dtype=torch.double)}, torch.tensor([0, 1, 2, 0, 1, 2]))
    weights = torch.rand(6, dtype=torch.double)
    named = [hypergradient(model, optimizer, batch, batch, weights, engine=e) for e in ("forward", "unrolled")]
    torch.testing.assert_close(named[0], named[1], rtol=1e-10, atol=1e-14)
    plain = (batch[0]["x"], batch[1])
    linear = torch.optim.SGD(model.linear.parameters(), lr=0.1)
    torch.testing.assert_close(hypergradient(model.linear, linear, plain, plain, weights), named[0])
    torch.testing.assert_close(margins(model, [batch]), margins(model.linear, [plain]))


def test_what_right_means():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    losses = torch.tensor([0.1, 0.2])
    assert default_correct(logits, torch.tensor([0, 0]), losses).tolist() == [True, False]
    many = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert default_correct(torch.tensor([[3.0, -1.0], [2.0, -2.0]]), many, losses).tolist() == [True, False]
    assert default_correct(torch.tensor([3.0, -2.0]), torch.tensor([1.0, 1.0]), losses).tolist() == [True, False]
    assert default_correct(logits, torch.tensor([[0.3, 4.0], [1.0, 2.0]]), losses).tolist() == [True, False]


def test_samples():
    x, outputs = torch.ones(2, 3), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    samples = Samples(((x,), {}), torch.tensor([0, 0]), outputs, torch.ones(2), torch.tensor([True, False]))
    assert samples.inputs is x
    assert samples.classes.tolist() == [0, 0]
    assert (samples.margins > 0).tolist() == [True, False]
    floats = Samples(((x,), {}), torch.ones(2, 2), outputs, torch.ones(2), torch.tensor([True, False]))
    assert floats.classes is None

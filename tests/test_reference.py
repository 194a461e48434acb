"""``step`` equals MOLERE in plain loops, in both orders (float64)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import Given, data, net, reweighter_of, world_of
from torch import nn

from torch_molere.reference import hard_instances, meta_gradient, training_step

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3),
    # higher adds eps before the bias correction, PyTorch after it.
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02, eps=1e-15),
}


class OfLosses(nn.Module):
    """φ on the present loss alone, which is all that the reference gives it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.network = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def weigh(self, losses):
        return self.network(losses.unsqueeze(1)).squeeze(1).sigmoid()

    def forward(self, samples):
        return self.weigh(samples.losses)


def per_sample(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("shrinkage", [None, 1.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("engine", ["forward", "finite"])
def test_step_equals_the_reference(order, name, shrinkage, engine):
    batches = [data(seed, size=9) for seed in range(10, 16)]
    validation, every, warm = data(3), 2, 1

    model, phi = net(), OfLosses()
    optimizer, phi_optimizer = OPTIMIZERS[name](model.parameters()), torch.optim.Adam(phi.parameters(), lr=0.05)
    expected = []
    for number, batch in enumerate(batches):
        weigh = phi.weigh if number >= warm else torch.ones_like
        due = number >= warm and (number - warm) % every == 0
        for state in optimizer.state.values() if name == "adam" else ():
            state["step"] = state["step"].double()  # higher takes powers of it
        expected.append(
            training_step(
                model,
                optimizer,
                weigh,
                phi_optimizer,
                batch,
                validation if due else None,
                per_sample,
                order=order,
                shrinkage=shrinkage,
            )
        )

    world = world_of(net(), validation=validation)
    world.optimizers = [OPTIMIZERS[name](world.model.parameters())]
    weighting = OfLosses()
    reweighter = reweighter_of(
        world,
        weighting=weighting,
        weighting_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        every=every,
        warmup_steps=warm,
        order=order,
        hypergradient=engine,
        shrinkage=shrinkage,
        max_weight=None,
    )
    close = {"rtol": 1e-9, "atol": 1e-11} if engine == "forward" else {"rtol": 2e-4, "atol": 1e-6}
    for batch, (weights, gradient) in zip(batches, expected, strict=True):
        result = reweighter.step(batch)
        torch.testing.assert_close(result.weights, weights, **close)
        assert (result.meta_gradient is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(result.meta_gradient, gradient, **close)
    assert reweighter.meta_updates == 3
    torch.testing.assert_close(weighting.state_dict(), phi.state_dict(), **close)
    torch.testing.assert_close(world.model.state_dict(), model.state_dict(), **close)


def test_the_meta_gradient_of_the_reference_equals_a_central_difference():
    model, batch, validation = net(), data(1), data(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    w = torch.linspace(0.4, 1.6, 6, dtype=torch.double)

    def after(weights):
        moved, own = copy.deepcopy((model, optimizer))
        (weights * per_sample(moved(batch[0]), batch[1])).mean().backward()
        own.step()
        return per_sample(moved(validation[0]), validation[1]).mean().item()

    shifts = 1e-5 * torch.eye(6, dtype=torch.double)
    expected = torch.tensor([(after(w + s) - after(w - s)) / 2e-5 for s in shifts], dtype=torch.double)
    torch.testing.assert_close(
        meta_gradient(model, optimizer, w, batch, validation, per_sample), expected, rtol=1e-6, atol=1e-9
    )


def test_weights_alone_change_nothing_of_the_reference_without_validation():
    model, reference = net(), net()
    world = world_of(model)
    reweighter_of(world, weighting=Given(), warmup_steps=5).step(world.batch)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9)
    weights, gradient = training_step(
        reference, optimizer, torch.ones_like, optimizer, world.batch, None, per_sample, order="after"
    )
    assert gradient is None and torch.equal(weights, torch.ones(6).double())
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-12, atol=1e-12)


def test_hard_instances_have_the_smallest_margins():
    assert sorted(hard_instances([0.3, -0.5, 0.9, -0.1], 0.5)) == [1, 3]
    assert hard_instances([0.3, -0.5], 0.01) == [1]

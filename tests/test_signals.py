"""What weightings and splitters see of an instance."""

import pytest
import torch
from some_samples import some_samples

from torch_molere.signals import SIGNALS, Signals, signal_network


def remembered(**changed):
    generator = torch.Generator().manual_seed(1)
    memory = dict(
        running_losses=3 * torch.rand(8, generator=generator),
        running_margins=2 * torch.rand(8, generator=generator) - 1,
        meta_gradients=4 * torch.randn(8, generator=generator),
        has_meta_gradient=torch.arange(8) % 2 == 0,
    )
    return some_samples(8, **{**memory, **changed})


def columns(samples):
    """Each signal by its definition."""
    return {
        "loss": [torch.log(samples.losses + (samples.losses**2 + 1).sqrt())],
        "running_loss": [torch.log(samples.running_losses + (samples.running_losses**2 + 1).sqrt())],
        "margin": [samples.margins],
        "running_margin": [samples.running_margins],
        "meta_gradient": [
            torch.minimum(torch.maximum(samples.meta_gradients, torch.tensor(-3.0)), torch.tensor(3.0)),
            samples.has_meta_gradient.float(),
        ],
        "probabilities": [samples.outputs[:, c].exp() / samples.outputs.exp().sum(dim=1) for c in range(3)],
        "label": [(samples.classes == c).float() for c in range(3)],
    }


@pytest.mark.parametrize("names", [[name] for name in SIGNALS] + [SIGNALS, SIGNALS[::-1], ("label", "loss")])
def test_signals_are_what_they_say_in_the_order_asked_for(names):
    samples = remembered()
    signals = Signals(names, num_classes=3)
    expected = torch.stack([column for name in names for column in columns(samples)[name]], dim=1)
    found = signals(samples)
    assert signals.width == found.shape[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(signals.double()(samples), expected.double(), rtol=1e-5, atol=1e-6)


def test_the_default_is_everything_with_a_memory_and_margins_of_zero_without_classes():
    samples = remembered()
    assert torch.equal(Signals()(samples), Signals(SIGNALS[:5])(samples))
    regression = some_samples(8, num_classes=None)
    found = Signals()(regression)
    torch.testing.assert_close(found[:, 0], regression.losses.asinh())
    assert found.shape == (8, 6) and not found[:, 2:].any()


def test_ignored_targets_have_no_label():
    samples = remembered(classes=torch.tensor([0, -1, 2, 1, 1, -1, 0, 0]))
    assert Signals(["label"], 3)(samples).sum(dim=1).tolist() == [1, 0, 1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("name", ["margin", "running_margin", "probabilities", "label"])
def test_a_signal_asked_for_needs_its_classes(name):
    with pytest.raises(ValueError, match=f"signal '{name}' needs .* class targets; use signals="):
        Signals([name], num_classes=3)(some_samples(8, num_classes=None))
    if name in ("probabilities", "label"):
        with pytest.raises(ValueError, match="num_classes=4, but the model has 3 outputs"):
            Signals([name], num_classes=4)(remembered())
        with pytest.raises(ValueError, match="need num_classes, got None"):
            Signals([name])


@pytest.mark.parametrize("names", [[], "loss", ["loss", "lose"]])
def test_unknown_signals_are_refused(names):
    with pytest.raises(ValueError, match="signals must be a sequence of some of"):
        Signals(names)


def test_a_network_starts_alike_for_everyone():
    torch.manual_seed(0)
    network = signal_network(Signals(), hidden=7, bias=0.25)
    assert torch.equal(network(remembered()), torch.full((8, 1), 0.25))

"""The published baselines against their definitions, written out another way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from benchmarks import models, peers
from benchmarks.methods import PLAIN, Method
from benchmarks.problems import Setting
from benchmarks.training import plain_epochs, train

TINY = Setting("tiny", data="digits", epochs=3, batch_size=16)
EVERYTHING = torch.arange(60)


def first(problem):
    return lambda rows: plain_epochs(TINY, problem, rows, 7)


def losses_of(model, problem, rows):
    return F.cross_entropy(model(problem.inputs[rows]), problem.labels[rows], reduction="none")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build("mlp", (5,), 3)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_is_torchvision_s(gamma):
    """Of two classes, a softmax over (0, x) is a sigmoid of x."""
    logits = torch.linspace(-4, 4, 9, dtype=torch.double).requires_grad_()
    labels = torch.arange(9) % 2
    ours = peers.focal(torch.stack([torch.zeros_like(logits), logits], dim=1), labels, gamma)
    theirs = sigmoid_focal_loss(logits, labels.double(), alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_focal_loss_of_a_certain_instance_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    peers.focal(logits, torch.tensor([0]), 0.5).backward()
    assert logits.grad.tolist() == [[0.0, 0.0]]


def test_generalised_cross_entropy_lies_between_cross_entropy_and_the_expected_error():
    logits = torch.randn(50, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    missing = 1 - logits.softmax(dim=1).gather(1, labels[:, None])
    torch.testing.assert_close(peers.generalised(logits, labels, 1.0), missing.mean())
    torch.testing.assert_close(
        peers.generalised(logits, labels, 1e-7), F.cross_entropy(logits, labels), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(peers.generalised(logits, labels, 0.7), ((1 - (1 - missing) ** 0.7) / 0.7).mean())


def test_rgd_weights_by_hand_and_without_a_gradient():
    by_hand = np.exp(np.array([0.0, 0.5, 2.0, 2.0]) / 3.0)
    weights = peers.rgd_weights(torch.tensor([0.0, 0.5, 2.0, 9.0], requires_grad=True), tau=2.0)
    assert not weights.requires_grad
    np.testing.assert_allclose(weights.numpy(), by_hand / by_hand.mean(), rtol=1e-6)


def test_class_balanced_weights_by_hand():
    labels = torch.tensor([0] * 9 + [1] * 3)
    weights = peers.balanced_weights(labels, 3, 0.5)
    effective = np.array([(1 - 0.5**9) / 0.5, (1 - 0.5**3) / 0.5])
    expected = 1 / effective / ((9 / effective[0] + 3 / effective[1]) / 12)
    np.testing.assert_allclose(weights[:2], expected, rtol=1e-6)
    assert weights[2] == 0
    np.testing.assert_allclose(
        peers.balanced_weights(labels, 2, 1 - 1e-9)[1] / peers.balanced_weights(labels, 2, 1 - 1e-9)[0], 3, rtol=1e-5
    )


def test_training_twice_weighs_as_copies_of_the_errors_of_a_first_model(problem, model):
    one = next(first(problem)(EVERYTHING))
    wrong = one(problem.inputs).argmax(dim=1) != problem.labels
    assert 5 < wrong.sum() < 50
    copied = torch.cat([EVERYTHING, *[wrong.nonzero().squeeze(1)] * 3])
    ours = peers.objective("twice", 4.0, problem, first(problem))(model(problem.inputs), problem.labels, EVERYTHING)
    copies = losses_of(model, problem, copied).mean()
    torch.testing.assert_close(ours, copies)
    torch.testing.assert_close(*(torch.autograd.grad(loss, model.parameters()) for loss in (ours, copies)))


def test_most_reducible_by_hand():
    losses, irreducible = torch.tensor([5.0, 1.0, 2.0, 3.0]), torch.tensor([4.9, 0.2, 0.1, 3.5])
    assert peers.most_reducible(losses, irreducible, 0.5).tolist() == [2, 1]


def test_irreducible_losses_are_of_models_that_did_not_train_on_the_row(problem):
    trained = []

    def recording(rows):
        left_out = torch.tensor(sorted(set(range(60)) - set(rows.tolist())))
        best, lowest = None, float("inf")
        for epoch in first(problem)(rows):
            losses = losses_of(epoch, problem, left_out).detach()
            if losses.mean() < lowest:
                best, lowest = losses, losses.mean()
            yield epoch
        trained.append((rows, left_out, best))

    found = peers.irreducible_losses(problem, recording, seed=0)
    assert [len(rows) for rows, _, _ in trained] == [30, 30]
    assert trained[0][0].tolist() == trained[1][1].tolist()
    for _, left_out, best in trained:
        torch.testing.assert_close(found[left_out], best)


def test_batches_are_chosen_by_the_model_as_it_is(problem, model):
    irreducible = peers.irreducible_losses(problem, first(problem), seed=0)
    stream = iter(peers.reducible_batches(problem, TINY, model, first(problem), 0.5, seed=0))
    larger = peers.passes(EVERYTHING, 32, seed=0)
    for _ in range(4):
        batch = next(larger)
        gap = losses_of(model, problem, batch).detach() - irreducible[batch]
        expected = {row for _, row in sorted(zip(gap.tolist(), batch.tolist(), strict=True))[len(batch) // 2 :]}
        assert set(next(stream).tolist()) == expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_passes_meet_every_row_once_in_batches_alike():
    stream = peers.passes(torch.arange(10, 33), 8, seed=3)
    for _ in range(3):
        batches = [next(stream) for _ in range(3)]
        assert sorted(torch.cat(batches).tolist()) == list(range(10, 33))
        assert {len(batch) for batch in batches} == {7, 8}


@pytest.mark.parametrize(
    "kind, strength", [("focal", 0.0), ("rgd", 0.0), ("twice", 1.0), ("balanced", 0.0), ("rho", 1.0)]
)
def test_a_peer_of_no_strength_is_plain_training(problem, kind, strength):
    """Same initialisation, order of batches, schedule and number of updates."""
    none, plain = (train(TINY, method, problem, 0).model.state_dict() for method in (Method("", kind, strength), PLAIN))
    torch.testing.assert_close(none, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, strength", [("focal", 2.0), ("gce", 0.7), ("rgd", 1.0), ("twice", 4.0), ("rho", 0.5)])
def test_every_peer_learns_and_repeats(problem, kind, strength):
    problem = replace(problem, labels=problem.clean)
    method = Method("", kind, strength)
    run, again = (train(replace(TINY, epochs=10), method, problem, 0) for _ in range(2))
    assert (run.model(problem.inputs).argmax(dim=1) == problem.clean).double().mean() > 0.8
    torch.testing.assert_close(again.model.state_dict(), run.model.state_dict(), rtol=0, atol=0)

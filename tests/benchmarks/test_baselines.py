"""The published baselines against their definitions, written out another way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from benchmarks.study import baselines, budget
from benchmarks.study.methods import ERM, Method, reweighter
from benchmarks.study.problems import Problem, Setting
from benchmarks.study.studies import STUDIES
from benchmarks.study.training import train

CLASSES, ROWS = 3, 60
TINY = Setting("tiny", rows=ROWS, hidden=8, epochs=3, batch_size=16, lr=0.05)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NOBODY = np.empty(0, dtype=np.int64)


@pytest.fixture
def problem():
    """Separable classes, a quarter of the labels wrong."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.arange(ROWS) % CLASSES
    inputs = torch.randn(ROWS, 5, generator=generator) + 2.0 * F.one_hot(clean, 5)
    labels = torch.where(torch.arange(ROWS) % 4 == 0, (clean + 1) % CLASSES, clean)
    return Problem(inputs, labels, clean, np.arange(ROWS), np.arange(0, ROWS, 7), {})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return budget.classifier(TINY, torch.empty(0, 5), CLASSES)


def objective(method, problem, model, apart=NOBODY):
    return baselines.objective(method, TINY, problem, apart, model, CLASSES, seed=0)


def losses_of(model, problem, rows):
    return F.cross_entropy(model(problem.inputs[rows]), problem.labels[rows], reduction="none")


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_is_torchvision_s(gamma):
    """Of two classes, a softmax over (0, x) is a sigmoid of x."""
    logits = torch.linspace(-4, 4, 9, dtype=torch.double).requires_grad_()
    labels = torch.arange(9) % 2
    both = torch.stack([torch.zeros_like(logits), logits], dim=1)
    ours = baselines.focal(F.cross_entropy(both, labels, reduction="none"), gamma)
    theirs = sigmoid_focal_loss(logits, labels.double(), alpha=-1, gamma=gamma)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(losses.sum(), logits)[0] for losses in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_focal_loss_of_a_certain_instance_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    baselines.focal(F.cross_entropy(logits, torch.tensor([0]), reduction="none"), 0.5).sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.0]]


def test_rgd_weights_by_hand_and_without_a_gradient(problem, model):
    by_hand = np.exp(np.array([0.0, 0.5, 2.0, 2.0]) / 3.0)
    weights = baselines.rgd_weights(torch.tensor([0.0, 0.5, 2.0, 9.0], requires_grad=True), tau=2.0)
    assert not weights.requires_grad
    np.testing.assert_allclose(weights.numpy(), by_hand / by_hand.mean(), rtol=1e-6)
    losses, rows = torch.tensor([0.5, 9.0], requires_grad=True), torch.tensor([0, 1])
    objective(Method("", "rgd", arguments={"tau": 2.0}), problem, model)(losses, rows).backward()
    np.testing.assert_allclose(losses.grad, by_hand[[1, 2]] / by_hand[[1, 2]].sum(), rtol=1e-6)


def test_training_twice_weighs_as_copies_of_the_errors_of_a_first_model(problem, model):
    method = Method("", "twice", arguments={"epochs": 2, "factor": 4.0})
    first = train(replace(TINY, epochs=2), ERM, problem, CLASSES, seed=0).model
    wrong = first(problem.inputs).argmax(dim=1) != problem.labels
    assert 5 < wrong.sum() < 50
    copied = torch.cat([torch.arange(ROWS), *[wrong.nonzero().squeeze(1)] * 3])
    ours = objective(method, problem, model)(losses_of(model, problem, torch.arange(ROWS)), torch.arange(ROWS))
    copies = losses_of(model, problem, copied).mean()
    torch.testing.assert_close(ours, copies)
    torch.testing.assert_close(*(torch.autograd.grad(loss, model.parameters()) for loss in (ours, copies)))


def test_most_reducible_by_hand():
    losses, irreducible = torch.tensor([5.0, 1.0, 2.0, 3.0]), torch.tensor([4.9, 0.2, 0.1, 3.5])
    assert baselines.most_reducible(losses, irreducible, 0.5).tolist() == [2, 1]


def test_irreducible_losses_are_of_models_that_did_not_train_on_the_row(problem, monkeypatch):
    trained = []

    def recording(setting, problem, rows, *others):
        best, lowest = None, float("inf")
        left_out = np.setdiff1d(np.arange(ROWS), rows)
        for model in budget.plain_training(setting, problem, rows, *others):
            losses = losses_of(model, problem, left_out).detach()
            if losses.mean() < lowest:
                best, lowest = losses, losses.mean()
            yield model
        trained.append((rows, left_out, best))

    monkeypatch.setattr(baselines, "plain_training", recording)
    found = baselines.irreducible_losses(replace(TINY, epochs=40, lr=0.5), problem, CLASSES, seed=0)
    assert [len(rows) for rows, _, _ in trained] == [30, 30]
    assert set(trained[0][0]) == set(trained[1][1])
    for _, left_out, best in trained:
        torch.testing.assert_close(found[left_out], best)


def test_batches_are_chosen_by_the_model_as_it_is(problem, model):
    irreducible = torch.linspace(0, 1, ROWS)
    stream = baselines.reducible_batches(TINY, problem, np.arange(ROWS), model, irreducible, 0.5, seed=0)
    larger = list(budget.passes(np.arange(ROWS), 6, 32, seed=0))
    for batch in larger:
        gap = losses_of(model, problem, batch).detach() - irreducible[batch]
        expected = {row for _, row in sorted(zip(gap.tolist(), batch.tolist(), strict=True))[len(batch) // 2 :]}
        assert set(next(stream).tolist()) == expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    plain = list(budget.passes(np.arange(ROWS), TINY.epochs, TINY.batch_size, seed=0))
    assert len(larger) == len(plain) == 12 and next(stream, None) is None


def test_learning_to_reweight_is_a_look_ahead_by_brute_force(problem, model):
    model.double()
    problem = replace(problem, inputs=problem.inputs.double())
    rows, held = torch.arange(12), torch.arange(20, 30)
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]

    def validation_loss(epsilon):
        losses = losses_of(model, problem, rows)
        gradients = torch.autograd.grad((epsilon * losses).sum(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.1 * gradient)
            value = losses_of(model, problem, held).mean().item()
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
        return value

    step = 1e-5
    slopes = [(validation_loss(step * e) - validation_loss(-step * e)) / (2 * step) for e in torch.eye(12)]
    expected = np.maximum(0.0, -np.array(slopes))
    assert 0 < (expected > 0).sum() < 12
    batch, validation = [(problem.inputs[chosen], problem.labels[chosen]) for chosen in (rows, held)]
    weights = baselines.l2rw_weights(model, batch, validation)
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-4, atol=1e-6)
    opposite = baselines.l2rw_weights(model, (batch[0][:1], torch.tensor([0])), (batch[0][:1], torch.tensor([1])))
    assert opposite.tolist() == [0.0]


def test_learning_to_reweight_judges_by_the_rows_apart_alone(problem, model, monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "l2rw_weights", lambda model, batch, held: seen.append(held) or torch.ones(4))
    apart = np.array([3, 8, 20, 41, 50])
    method = Method("", "l2rw", arguments={"val_batch_size": 2})
    minimised = objective(method, problem, model, apart)
    for _ in range(6):
        assert minimised(torch.arange(4.0), torch.arange(4)) == 1.5
    for inputs, labels in (map(torch.cat, zip(*seen[i : i + 3], strict=True)) for i in (0, 3)):
        order = torch.cdist(inputs, problem.inputs).argmin(dim=1)
        assert sorted(order.tolist()) == apart.tolist()
        assert torch.equal(labels, problem.labels[order])


def test_meta_weight_net_learns_at_every_step_before_the_classifier(problem, model):
    method = baselines.TRIED["meta-weight-net"][-1]
    apart = method.rows_apart(problem, 0, None)
    optimizer, _ = budget.optimisation(model, TINY, 10)
    weighing = reweighter(method, problem, apart, model, optimizer, CLASSES, 16, warmup_steps=5, seed=0)
    for _ in range(2):
        result = weighing.step((problem.inputs[:16], problem.labels[:16]))
        assert result.val_loss is not None and result.weights.std() > 0


@pytest.mark.parametrize("kind", baselines.TRIED)
def test_every_baseline_learns_and_repeats(problem, kind):
    method = baselines.TRIED[kind][1]
    problem = replace(problem, labels=problem.clean)
    trained, again = (train(replace(TINY, epochs=30), method, problem, CLASSES, seed=0) for _ in range(2))
    assert len(trained.rows) == (54 if method.apart == "random" else 60)
    right = trained.model(problem.inputs).argmax(dim=1) == problem.clean
    assert right.double().mean() > 0.8
    torch.testing.assert_close(again.model.state_dict(), trained.model.state_dict(), rtol=0, atol=0)


def test_trusted_rows_can_be_what_is_judged_by(problem):
    method = replace(baselines.TRIED["l2rw"][0], apart="trusted", held_out=False)
    assert len(train(TINY, method, problem, CLASSES, seed=0).rows) == ROWS
    assert method.rows_apart(problem, 0, None).tolist() == list(range(0, ROWS, 7))


@pytest.mark.parametrize(
    "method",
    [
        Method("", "focal", arguments={"gamma": 0.0}),
        Method("", "rgd", arguments={"tau": 0.0}),
        Method("", "twice", arguments={"epochs": 1, "factor": 1.0}),
        Method("", "rho", arguments={"share": 1.0}),
    ],
    ids=lambda method: method.weighs,
)
def test_a_baseline_of_no_strength_is_plain_training(problem, method):
    """Same initialisation, order of batches, schedule and number of updates."""
    none, plain = (train(TINY, m, problem, CLASSES, seed=0).model.state_dict() for m in (method, ERM))
    torch.testing.assert_close(none, plain, rtol=1e-5, atol=1e-6)


def test_the_winner_is_the_most_accurate_over_all_settings():
    frame = pd.DataFrame(
        [("a", "one", 0.5), ("b", "one", 0.7), ("a", "two", 0.6), ("b", "two", 0.5), ("a", "three", 0.9)],
        columns=["setting", "method", "accuracy"],
    )
    assert baselines.winner([Method("one"), Method("two")], frame).name == "one"


def test_the_strengths_reported_are_those_that_won_the_stored_selection():
    frame = pd.read_csv(RESULTS / "study-select-baselines" / "results.csv")
    selection = STUDIES["select-baselines"]
    runs = {(setting.name, method.name, seed) for setting, method, seed in selection.runs(selection.seeds)}
    assert set(frame[["setting", "method", "seed"]].itertuples(index=False, name=None)) == runs
    assert not selection.on_test
    reported = {method.name for method in STUDIES["baselines"].methods}
    for tried in baselines.TRIED.values():
        assert {method.name for method in tried} & reported == {baselines.winner(tried, frame).name}

"""Splits and single runs."""

import pytest
import torch

from benchmarks import models, training
from benchmarks.batches import LabelledImages, Normalisation, TensorImages
from benchmarks.datasets import DataOptions, load
from benchmarks.training import METHODS, WEIGHTINGS, Recipe, evaluate, run, split

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.05, weight_decay=1e-4, augment=False)


@pytest.fixture(scope="module")
def task():
    return load(DataOptions(subset=200))


def silent(step, steps, loss, accuracy):
    pass


def go(task, method, seed=0, recipe=RECIPE, report=silent):
    margins = torch.linspace(-1.0, 1.0, len(task.train))
    return run(method, seed, task, lambda: models.build("mlp", (1, 8, 8), 10), recipe, CPU, margins, report)


def some_images(count=20):
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    return LabelledImages(TensorImages(pixels), torch.zeros(count, dtype=torch.long), Normalisation((0.0,), (1.0,)))


def test_hard_and_easy_splits_are_the_ends_of_erms_margins():
    margins = torch.randperm(20, generator=torch.Generator().manual_seed(0)) / 20.0
    order = margins.argsort().tolist()
    for method, extreme in (("LRW-Hard", order[:4]), ("LRW-Easy", order[-4:])):
        train, validation = split(method, some_images(), 0.2, 0, margins)
        assert sorted(validation) == sorted(extreme)
        assert sorted([*train, *validation]) == list(range(20))


def test_random_splits_follow_the_seed():
    train, validation = split("LRW-Random", some_images(), 0.2, 3, None)
    assert (len(train), len(validation)) == (16, 4)
    assert sorted([*train, *validation]) == list(range(20))
    assert split("LRW-Random", some_images(), 0.2, 3, None) == (train, validation)
    assert split("LRW-Random", some_images(), 0.2, 4, None)[1] != validation


@pytest.mark.parametrize("method", ["ERM", "MOLERE"])
def test_all_rows_are_trained_on_without_a_fixed_validation_set(method):
    train, validation = split(method, some_images(), 0.2, 0, None)
    assert (list(train), list(validation)) == (list(range(20)), [])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_exactly_and_leaves_its_numbers(task, method):
    reports = []
    first = go(task, method, report=lambda *values: reports.append(values))
    again = go(task, method)
    assert torch.equal(first.test_margins, again.test_margins)
    assert torch.equal(first.train_margins, again.train_margins)
    assert not torch.equal(first.test_margins, go(task, method, seed=1).test_margins)
    numbers = first.numbers
    fixed = method.startswith("LRW")
    assert (numbers["train_rows"], numbers["validation_rows"]) == ((180, 20) if fixed else (200, 0))
    assert numbers["steps"] == len(reports) == (6 if fixed else 7)
    assert numbers["engine"] == ("none" if method == "ERM" else "finite")
    assert numbers["test_margin"] == pytest.approx(first.test_margins.mean().item(), abs=1e-6)
    assert numbers["accuracy"] == (first.test_margins > 0).double().mean()
    assert reports[-1][:2] == (numbers["steps"], numbers["steps"])


def test_a_warm_up_without_end_is_erm_on_the_same_rows(task):
    """LRW that never leaves its warm-up trains plainly: the loops differ in nothing else."""
    plain = go(task, "LRW-Random", recipe=Recipe(**{**vars(RECIPE), "warmup": 1.0}))
    rows, _ = split("LRW-Random", task.train, RECIPE.val_fraction, 0, None)
    torch.manual_seed(0)
    model = models.build("mlp", (1, 8, 8), 10)
    batches = task.train.batches(rows, RECIPE.batch_size, 0, augment=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=RECIPE.lr, momentum=0.9, weight_decay=RECIPE.weight_decay)
    training.train(model, optimizer, lambda o, t, i: torch.nn.functional.cross_entropy(o, t), batches, RECIPE, silent)
    torch.testing.assert_close(evaluate(model, task.test).margins, plain.test_margins, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
def test_every_weighting_learns(task, weighting):
    assert go(task, "MOLERE", recipe=Recipe(**{**vars(RECIPE), "weighting": weighting})).numbers["accuracy"] > 0.2


@pytest.mark.parametrize("method", ["ERM", "LRW-Random", "MOLERE"])
def test_bf16(task, method):
    rounded = go(task, method, recipe=Recipe(**{**vars(RECIPE), "amp": "bf16"}))
    exact = go(task, method)
    assert not torch.equal(rounded.test_margins, exact.test_margins)
    assert rounded.numbers["accuracy"] == pytest.approx(exact.numbers["accuracy"], abs=0.1)


@pytest.mark.parametrize("method", ["ERM", "MOLERE"])
def test_a_diverging_run_says_so(task, method):
    with pytest.raises(FloatingPointError):
        go(task, method, recipe=Recipe(**{**vars(RECIPE), "lr": 1e30}))


def test_evaluation_counts_each_class_alike():
    data = LabelledImages(
        TensorImages(torch.tensor([1, 1, 1, 1], dtype=torch.uint8).view(4, 1, 1, 1)),
        torch.tensor([0, 0, 0, 1]),
        Normalisation((0.0,), (1.0,)),
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
    found = evaluate(model, data)
    assert (found.accuracy, found.balanced_accuracy) == (0.75, 0.5)
    p = torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(found.margins, (p[0] - p[1]) * torch.tensor([1.0, 1.0, 1.0, -1.0]))
    assert found.loss == pytest.approx((-(3 * p[0].log() + p[1].log()) / 4).item())

"""What is measured, by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from benchmarks.measures import found, judged, measure, ranked
from benchmarks.methods import DEFAULT, PLAIN
from benchmarks.problems import Judged, Setting
from benchmarks.training import train

TINY = Setting("tiny", data="digits", epochs=4, batch_size=16)


def test_accuracies_and_margins_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.3, 0.3, 0.4]])
    on = Judged(torch.empty(4), torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, True, True]))
    reference = torch.tensor([0.95, -0.95, 0.1, -0.5])
    numbers = judged(probabilities.log(), on, reference)
    assert numbers["accuracy"] == 0.5 and numbers["worst_class"] == 0.0
    assert numbers["balanced"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert numbers["margin"] == pytest.approx((0.5 - 0.1 + 0.3 - 0.1) / 4)
    assert numbers["nll"] == pytest.approx(-np.log([0.7, 0.4, 0.6, 0.3]).mean())
    assert numbers["worst_group"] == 0.0
    # By the reference the second and fourth are hard, the third middle, the first easy.
    assert [numbers[f"{name}_third"] for name in ("hard", "middle", "easy")] == [0.0, 1.0, 1.0]
    assert numbers["margin_9"] == pytest.approx(0.5) and numbers["margin_0"] == pytest.approx(-0.1)
    assert np.isnan(numbers["margin_1"])


def test_by_class_as_scikit_learn_has_it():
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(200, 4, generator=generator), torch.randint(4, (200,), generator=generator)
    numbers = judged(outputs, Judged(torch.empty(200), labels), None)
    predictions = outputs.argmax(dim=1)
    assert numbers["balanced"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert numbers["worst_class"] == pytest.approx(recall_score(labels, predictions, average=None).min())
    assert "worst_group" not in numbers and "hard_third" not in numbers


def test_a_run_s_columns(problem):
    others = {"noise": Judged(problem.test.inputs, (problem.test.labels + 1) % 3)}
    run = train(replace(TINY, epochs=20), PLAIN, problem, 0)
    numbers = measure(run, replace(problem, others=others))
    assert numbers["accuracy"] > 0.8 and numbers["accuracy_noise"] < 0.2
    assert numbers["accuracy"] == numbers["selection"]  # the same instances here
    assert numbers["best_accuracy"] >= numbers["accuracy"] and 1 <= numbers["best_epoch"] <= 20
    assert numbers["label_errors"] == pytest.approx(12 / 60) and numbers["rows"] == 60


def test_a_run_that_diverged_is_refused(problem):
    with pytest.raises(FloatingPointError, match="not finite"):
        measure(train(replace(TINY, lr=1e20), PLAIN, problem, 0), problem)


def test_scores_that_know_the_wrong_labels_have_all_of_the_area(problem):
    wrong = (problem.labels != problem.clean).double().numpy()
    numbers = ranked({"right": wrong, "reversed": -wrong, "half": np.arange(60) % 2}, problem, wrong.astype(int))
    assert (numbers["auroc: right"], numbers["auroc: reversed"]) == (1.0, 0.0)
    assert (
        numbers["precision: right"] == 1.0
        and numbers["people: right"] == pytest.approx(1.0)
        and numbers["auroc: half"] < 0.5
    )
    clean = replace(problem, labels=problem.clean)
    assert not ranked({"right": wrong}, clean, None)


def test_both_kinds_of_training_find_wrong_labels(problem):
    setting = replace(TINY, epochs=20)
    for method, names in ((PLAIN, {"mean loss", "last loss"}), (DEFAULT, {"mean loss", "running margin", "weight"})):
        numbers = found(train(setting, method, problem, 0), problem, None)
        assert {f"auroc: {name}" for name in names} <= set(numbers)
        assert numbers["auroc: mean loss"] > 0.9
        assert method is PLAIN or (0.0 < numbers["estimated"] < 1.0 and numbers["called_right"] > 0.5)

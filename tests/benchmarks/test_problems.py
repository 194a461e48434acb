"""What each kind of problem does to the rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import typer

from benchmarks.data import Corpus, Part, read
from benchmarks.problems import SHIFTS, Drawing, Setting, first_of_each, long_tail, marked, mislabelled, shifted

DIGITS = Setting("digits", data="digits")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return read("digits", tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("cache"))


def drawn(digits, seed=0, **changes):
    return Drawing(replace(DIGITS, **changes), digits).problem(seed)


def test_a_long_tail_keeps_the_first_rows_of_each_class():
    labels = np.array([2, 0, 1] * 100)
    kept = long_tail(labels, 100.0)
    assert np.bincount(labels[kept]).tolist() == [100, 10, 1]
    assert all((kept[labels[kept] == c] == np.flatnonzero(labels == c)[:n]).all() for c, n in enumerate((100, 10, 1)))
    assert len(long_tail(labels, 1.0)) == 300
    assert first_of_each(np.array([1, 1, 0, 1]), np.array([5, 2])).tolist() == [0, 1, 2]


def test_wrong_labels_are_so_many_and_always_wrong():
    labels = np.arange(1000) % 10
    random = mislabelled(labels, "random", 0.4, 10, np.random.default_rng(0))
    following = mislabelled(labels, "next", 0.45, 10, np.random.default_rng(0))
    assert (random != labels).sum() == 400 and (following != labels).sum() == 450
    moved = following != labels
    assert (following[moved] == (labels[moved] + 1) % 10).all()
    assert len(set((random - labels)[random != labels] % 10)) == 9


def test_marks_tell_the_classes_apart_and_touch_nothing_else():
    for height, width in ((8, 8), (14, 14), (16, 16)):
        inputs = marked(torch.zeros(10, 1, height, width), np.arange(10), torch.ones(1))
        assert inputs.sum().item() == 40
        assert len({tuple(image.flatten().tolist()) for image in inputs}) == 10


def test_marked_images_have_the_same_marks_in_the_test_for_everyone_and_groups_where_they_mislead(digits):
    first, second = (drawn(digits, seed, cue=0.9) for seed in (0, 1))
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert 0.85 < first.test.groups.double().mean() < 0.95
    assert drawn(digits).test.groups is None


def test_every_seed_draws_its_own_rows_and_the_selection_rows_are_nobody_s(digits):
    first, again, other = drawn(digits, 0, rows=300), drawn(digits, 0, rows=300), drawn(digits, 1, rows=300)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.labels, again.labels)
    assert set(first.source) != set(other.source) and len(first.labels) == 300
    assert not set(first.source) & set(digits.selection)
    assert sorted([*digits.selection, *digits.pool]) == list(range(len(digits.train)))


def test_trusted_rows_are_further_ones_with_clean_labels_evenly_by_class(digits):
    problem = drawn(digits, labels="random:0.5", trusted=50, rows=400)
    assert len(problem.labels) == 450 and len(set(problem.source)) == 450
    assert torch.equal(problem.labels[problem.trusted], problem.clean[problem.trusted])
    assert problem.labels[problem.trusted].bincount().tolist() == [5] * 10
    assert (problem.labels != problem.clean).sum() == 200
    true = digits.train.labels["label"][problem.source]
    assert problem.clean.tolist() == true.tolist()


def test_some_classes_alone_are_numbered_anew(digits):
    problem = drawn(digits, classes=(4, 9), counts=(5, 40))
    assert problem.labels.bincount().tolist() == [5, 40] and problem.classes == 2
    assert set(digits.train.labels["label"][problem.source[problem.labels.numpy() == 1]]) == {9}
    assert problem.test.labels.bincount(minlength=2).min() > 80


def test_inputs_are_standardised_or_from_zero_to_one(digits):
    standard, unit = drawn(digits), drawn(digits, standardised=False)
    assert abs(standard.inputs.mean().item()) < 0.05 and abs(standard.inputs.std().item() - 1) < 0.05
    assert (unit.inputs.min().item(), unit.inputs.max().item()) == (0.0, 1.0)
    assert drawn(digits, side=4).inputs.shape[1:] == (1, 4, 4)


def test_shifted_training_rows_and_further_test_sets(digits):
    plain, blurred = drawn(digits), drawn(digits, shift="contrast", trusted=10)
    assert torch.equal(plain.test.inputs, blurred.test.inputs)
    assert blurred.inputs[:-10].std() < 0.5 * blurred.inputs[-10:].std()
    assert set(blurred.others) == set(SHIFTS) and not plain.others


@pytest.mark.parametrize("kind", SHIFTS)
def test_every_shift_changes_images_and_repeats(kind):
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    changed = shifted(pixels, kind, 0)
    assert changed.shape == pixels.shape and not torch.allclose(changed, pixels)
    assert torch.equal(changed, shifted(pixels, kind, 0))
    assert (changed.min() >= -1e-3) and (changed.max() <= 255.001)


def test_label_columns(digits):
    noisy = Part(digits.train.values, {**digits.train.labels, "label_worst": 9 - digits.train.labels["label"]})
    problem = Drawing(replace(DIGITS, labels="label_worst"), Corpus(noisy, digits.test, 10)).problem(0)
    assert torch.equal(problem.labels, 9 - problem.clean)
    with pytest.raises(typer.BadParameter, match="no label column 'label_worst'; it has label"):
        drawn(digits, labels="label_worst")

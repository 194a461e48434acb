"""Subsets, long tails and label noise against their closed forms."""

import numpy as np
import pytest
import typer

from benchmarks.sampling import balanced_subset, long_tail, noise_rate, symmetric_noise


def labels_of(*counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(1).permutation(labels)


def test_a_subset_is_balanced_and_repeatable():
    labels = labels_of(50, 60, 70)
    rows = balanced_subset(labels, 31)
    assert sorted(np.bincount(labels[rows])) == [10, 10, 11]
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, balanced_subset(labels, 31))


def test_a_subset_takes_what_small_classes_have():
    labels = labels_of(3, 50, 50)
    assert np.bincount(labels[balanced_subset(labels, 63)]).tolist() == [3, 30, 30]
    assert np.array_equal(balanced_subset(labels, len(labels)), np.arange(len(labels)))


@pytest.mark.parametrize("size", [0, -1, 111])
def test_a_subset_larger_than_the_data_is_refused(size):
    with pytest.raises(typer.BadParameter, match=r"1 to 110"):
        balanced_subset(labels_of(50, 60), size)


def test_long_tail_counts():
    labels = labels_of(*[500] * 10)
    counts = np.bincount(labels[long_tail(labels, 100.0)])
    assert counts.tolist() == [round(500 * 100 ** (-c / 9)) for c in range(10)]
    assert (counts[0], counts[-1]) == (500, 5)


def test_long_tail_never_empties_a_class_nor_invents_rows():
    labels = labels_of(40, 7, 40)
    assert np.bincount(labels[long_tail(labels, 1000.0)]).tolist() == [40, 1, 1]
    assert np.bincount(labels[long_tail(labels, 1.0)]).tolist() == [40, 7, 40]


@pytest.mark.parametrize("imbalance", [0.5, -1.0, float("nan"), float("inf")])
def test_an_imbalance_below_one_is_refused(imbalance):
    with pytest.raises(typer.BadParameter, match="≥ 1"):
        long_tail(labels_of(4, 4), imbalance)


def test_noise_hits_exactly_its_share_and_spreads_over_the_other_classes():
    labels = np.repeat(np.arange(5), 2000)
    noisy = symmetric_noise(labels, 0.4, 5)
    wrong = noisy != labels
    assert wrong.sum() == 4000
    shift = (noisy - labels)[wrong] % 5
    # Four other classes, 1,000 expected for each, standard deviation √(4000 · ¼ · ¾) ≈ 27.
    assert np.abs(np.bincount(shift, minlength=5)[1:] - 1000).max() < 5 * 27.4
    assert np.array_equal(noisy, symmetric_noise(labels, 0.4, 5))


def test_noise_rate():
    assert noise_rate("symmetric:0.4") == 0.4
    assert noise_rate("symmetric:.25") == 0.25


@pytest.mark.parametrize("text", ["0.4", "symmetric", "symmetric:1.5", "symmetric:0", "asymmetric:0.2", "symmetric:x"])
def test_a_noise_out_of_range_is_refused(text):
    with pytest.raises(typer.BadParameter, match="symmetric:RATE"):
        noise_rate(text)

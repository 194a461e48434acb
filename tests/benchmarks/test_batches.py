"""Orders, augmentation and normalisation."""

import torch

from benchmarks.batches import LabelledImages, Normalisation, Order, TensorImages, augmented


def test_an_order_covers_its_rows_in_batches_of_nearly_one_size():
    order = Order([3, 5, 8, 13, 21, 34, 55], 3, seed=0)
    first, second = list(order), list(order)
    assert [len(part) for part in first] == [3, 2, 2]
    assert len(order) == 3
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == [3, 5, 8, 13, 21, 34, 55]
    assert first != second
    assert first == list(Order([3, 5, 8, 13, 21, 34, 55], 3, seed=0))
    assert list(Order(range(4), 3, seed=None)) == [[0, 1], [2, 3]]


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror():
    pixels = torch.arange(1, 16 * 16 * 2 * 6 + 1).reshape(6, 2, 16, 16)
    changed = augmented(pixels, torch.Generator().manual_seed(0))
    assert changed.shape == pixels.shape
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    for before, after in zip(padded, changed, strict=True):
        crops = [before[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
        assert sum(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops) == 1


def test_augmentation_flips_half_and_shifts_everywhere():
    pixels = torch.arange(64).reshape(1, 1, 8, 8).expand(2000, 1, 8, 8) + 1
    changed = augmented(pixels, torch.Generator().manual_seed(0))
    centre = changed[:, 0, 3, 2:6]
    flipped = (centre[:, 0] > centre[:, 3]).float().mean()
    assert abs(flipped - 0.5) < 5 * 0.5 / 2000**0.5
    assert len(changed.flatten(1).unique(dim=0)) == 3 * 3 * 2


def test_normalisation_gives_each_channel_mean_zero_and_spread_one():
    pixels = torch.randint(0, 256, (40, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[:, 1] //= 4
    inputs = Normalisation.of(pixels)(pixels)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_batches_carry_the_rows_of_what_they_show():
    pixels = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 1, 8, 8)
    data = LabelledImages(TensorImages(pixels), torch.arange(10) % 3, Normalisation((0.0,), (1.0,)))
    for inputs, targets, indices in data.batches([1, 4, 7, 9], 3, seed=5, augment=False):
        assert torch.equal(inputs[:, 0, 0, 0], indices.float())
        assert torch.equal(targets, indices % 3)
    assert torch.cat([indices for *_, indices in data.in_order(4)]).tolist() == list(range(10))

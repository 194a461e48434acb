"""The k-means features against a slow count by hand, and what is kept of them on disk."""

import pytest
import torch

from benchmarks import features
from benchmarks.features import FeatureCache, PatchOptions, learn

TINY = PatchOptions(patches=5, size=3, samples=400, iterations=4)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_equal_a_count_by_hand(pixels):
    dictionary = learn(pixels, TINY)
    image = pixels[0].double()
    maps = torch.zeros(5, 6, 6, dtype=torch.double)
    for top in range(6):
        for left in range(6):
            patch = image[:, top : top + 3, left : left + 3].flatten()
            patch = (patch - patch.mean()) / (patch.var() + 10.0).sqrt()
            whitened = (patch - dictionary.centre.double()) @ dictionary.whitening.double()
            distance = (whitened - dictionary.centroids.double()).norm(dim=1)
            maps[:, top, left] = (distance.mean() - distance).clamp_min(0.0)
    quadrants = maps.reshape(5, 2, 3, 2, 3).mean(dim=(2, 4)) * 4.0
    expected = (quadrants.flatten() - dictionary.mean) / dictionary.std
    torch.testing.assert_close(dictionary.encode(pixels[:1])[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_whitened_patches_are_white(pixels):
    many = PatchOptions(patches=5, size=3, samples=20_000, iterations=1)
    dictionary = learn(pixels, many)
    generator = torch.Generator().manual_seed(0)
    patches = features._contrast_normalised(features._sampled_patches(pixels, many, generator))
    covariance = ((patches - dictionary.centre) @ dictionary.whitening).T.cov()
    # One direction is left out: contrast normalisation takes each patch's mean away.
    values = torch.linalg.eigvalsh(covariance)
    assert values[0] < 0.05
    torch.testing.assert_close(values[1:], torch.ones(26), rtol=0.2, atol=0.0)


def test_k_means_finds_what_is_there():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 2, generator=generator))[
        torch.randperm(150, generator=generator)
    ]
    found = min(
        (features._k_means(points, 3, 20, torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda c: torch.cdist(points, c).amin(dim=1).sum(),
    )
    assert torch.cdist(centres, found).amin(dim=1).max() < 0.1


def test_features_do_not_depend_on_the_batch_and_are_alike_for_alike_options(pixels):
    dictionary = learn(pixels, TINY)
    torch.testing.assert_close(dictionary.encode(pixels, 7), dictionary.encode(pixels, 30), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learn(pixels, TINY).encode(pixels), dictionary.encode(pixels))


def test_the_cache_knows_its_content(tmp_path, pixels, monkeypatch):
    first = FeatureCache(tmp_path, pixels, TINY).features(pixels[:20])
    assert first.shape == (20, 20)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy"}
    monkeypatch.setattr(features, "learn", lambda *_: pytest.fail("what is on disk is not made again"))
    torch.testing.assert_close(FeatureCache(tmp_path, pixels, TINY).features(pixels[:20]), first, rtol=0, atol=0)
    monkeypatch.undo()
    FeatureCache(tmp_path, pixels, TINY).features(pixels[:19])
    FeatureCache(tmp_path, pixels, PatchOptions(patches=5, size=3, samples=400, iterations=5)).features(pixels[:20])
    FeatureCache(tmp_path, pixels.flip(0), TINY).features(pixels[:20])
    assert len(list(tmp_path.iterdir())) == 4

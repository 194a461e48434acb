"""Reading each kind of data set, from small files made here, and from the real ones where they lie beside."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
import typer
from PIL import Image

from benchmarks import datasets
from benchmarks.datasets import DataOptions, load

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png")
    return stream.getvalue()


def colours(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_parquet(path, images, labels, names=("cat", "dog", "owl"), **columns):
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    image = pa.array(
        [{"bytes": png(i), "path": None} for i in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    arrays = {"image": image, "label": pa.array(labels, pa.int8())}
    arrays |= {name: pa.array(values) for name, values in columns.items()}
    table = pa.table(arrays)
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.fixture
def parquet(tmp_path):
    """Six training rows, the second of them grey, with noisy labels; three validation rows."""
    images = list(colours(6))
    images[1] = images[1][..., 0]
    noisy = pa.array([0, 1, 2, 0, 1, 0], pa.int8())
    write_parquet(tmp_path / "train.parquet", images, [0, 1, 2, 0, 1, 2], label_worst=noisy, text=["x"] * 6)
    write_parquet(tmp_path / "val.parquet", colours(3, seed=1), [2, 1, 0])
    return tmp_path


def test_parquet(parquet):
    task = load(DataOptions(data=f"parquet:{parquet}"))
    assert task.classes == ("cat", "dog", "owl")
    assert task.image_shape == (3, 8, 8)
    assert task.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert task.test.labels.tolist() == [2, 1, 0]
    expected = torch.from_numpy(colours(6)).permute(0, 3, 1, 2)
    assert torch.equal(task.train.images.pixels[0], expected[0])
    assert torch.equal(task.train.images.pixels[1], expected[1, :1].expand(3, 8, 8))


def test_parquet_trains_on_a_label_column_and_tests_on_the_clean_one(parquet):
    task = load(DataOptions(data=f"parquet:{parquet}", label_column="label_worst"))
    assert task.train.labels.tolist() == [0, 1, 2, 0, 1, 0]
    assert task.test.labels.tolist() == [2, 1, 0]
    # The subset is balanced by the clean class: one row of each.
    small = load(DataOptions(data=f"parquet:{parquet}", label_column="label_worst", subset=3))
    assert len(small.train) == 3
    rows = [
        int(i)
        for i, image in enumerate(task.train.images.pixels)
        if any(torch.equal(image, p) for p in small.train.images.pixels)
    ]
    assert sorted(np.array([0, 1, 2, 0, 1, 2])[rows]) == [0, 1, 2]
    assert small.train.labels.tolist() == task.train.labels[rows].tolist()


def test_parquet_without_class_names_and_with_a_test_part(tmp_path):
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", colours(4), [0, 1, 2, 3], names=None)
    assert load(DataOptions(data=f"parquet:{tmp_path}")).classes == ("0", "1", "2", "3")


def test_parquet_images_of_several_sizes_need_a_size(tmp_path):
    images = [colours(1, 8)[0], colours(1, 12)[0]]
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", images, [0, 1])
    with pytest.raises(typer.BadParameter, match="2 different sizes") as error:
        load(DataOptions(data=f"parquet:{tmp_path}"))
    assert error.value.param_hint == "--image-size"
    assert load(DataOptions(data=f"parquet:{tmp_path}", image_size=10)).image_shape == (3, 10, 10)


def test_parquet_complaints(parquet, tmp_path_factory):
    with pytest.raises(typer.BadParameter, match="label, label_worst"):
        load(DataOptions(data=f"parquet:{parquet}", label_column="label_best"))
    with pytest.raises(typer.BadParameter, match="label, label_worst"):
        load(DataOptions(data=f"parquet:{parquet}", label_column="text"))
    with pytest.raises(typer.BadParameter, match=r"needs train\.parquet"):
        load(DataOptions(data=f"parquet:{tmp_path_factory.mktemp('empty')}"))
    write_parquet(parquet / "train.parquet", colours(2), [0, -1])
    with pytest.raises(typer.BadParameter, match="negative"):
        load(DataOptions(data=f"parquet:{parquet}"))
    write_parquet(parquet / "train.parquet", colours(2), [0, 7])
    with pytest.raises(typer.BadParameter, match="label 7 has no name"):
        load(DataOptions(data=f"parquet:{parquet}"))


def test_an_unreadable_parquet_image_is_named(parquet):
    table = pq.read_table(parquet / "train.parquet")
    broken = [{"bytes": b"no image", "path": None}, *table.column("image").to_pylist()[1:]]
    table = table.set_column(0, "image", pa.array(broken, table.schema.field("image").type))
    pq.write_table(table, parquet / "train.parquet")
    with pytest.raises(typer.BadParameter, match="row 0 holds no readable image"):
        load(DataOptions(data=f"parquet:{parquet}"))


def write_folder(root, classes=("ant", "bee"), sizes=((20, 30), (16, 16), (40, 16))):
    for part in ("train", "val"):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index, (width, height) in enumerate(sizes):
                Image.new("RGB", (width, height), (100 * label, index, 7)).save(root / part / name / f"{index}.png")


def test_image_folder(tmp_path):
    write_folder(tmp_path)
    task = load(DataOptions(data=f"imagefolder:{tmp_path}", image_size=16, workers=0))
    assert (task.classes, task.image_shape) == (("ant", "bee"), (3, 16, 16))
    assert task.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for inputs, targets, indices in task.train.batches(range(6), 4, seed=0, augment=False):
        assert inputs.shape[1:] == (3, 16, 16)
        pixels = inputs * torch.tensor(datasets.IMAGENET.std).view(3, 1, 1) + torch.tensor(datasets.IMAGENET.mean).view(
            3, 1, 1
        )
        assert torch.equal(pixels[:, 0, 0, 0].round(), 100.0 * targets)
        assert torch.equal(pixels[:, 1, 0, 0].round(), indices % 3.0)


def test_image_folder_subset_and_worker_processes(tmp_path):
    write_folder(tmp_path)
    task = load(DataOptions(data=f"imagefolder:{tmp_path}", image_size=16, workers=1, subset=4))
    batches = task.train.batches(range(4), 2, seed=0, augment=True)
    for _ in range(2):
        assert sorted(torch.cat([rows for *_, rows in batches]).tolist()) == [0, 1, 2, 3]


def test_image_folder_complaints(tmp_path):
    with pytest.raises(typer.BadParameter, match="train/<class>"):
        load(DataOptions(data=f"imagefolder:{tmp_path}"))
    write_folder(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cow")
    with pytest.raises(typer.BadParameter, match="bee, cow"):
        load(DataOptions(data=f"imagefolder:{tmp_path}"))


def write_cifar10(root, per_file=20):
    """torchvision's CIFAR-10 layout with a few random images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.random.default_rng(index).integers(0, 256, (per_file, 3072), dtype=np.uint8)
        entry = {"data": pixels, "labels": [i % 10 for i in range(per_file)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = torchvision.datasets.CIFAR10.__name__  # any ten names will do
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"{names}-{i}" for i in range(10)]}))
    return folder


def test_cifar10(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path)
    # The files are not the real ones, so their checksums cannot match.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).exists())
    task = load(DataOptions(data="cifar10", root=tmp_path, label_noise="symmetric:0.3"))
    assert (len(task.train), len(task.test), len(task.classes)) == (100, 20, 10)
    assert task.image_shape == (3, 32, 32)
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0]
    assert torch.equal(task.train.images.pixels[0], torch.from_numpy(first).view(3, 32, 32))
    assert (task.train.labels != torch.arange(100) % 20 % 10).sum() == 30
    assert task.test.labels.tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_not_there(tmp_path, name):
    with pytest.raises(typer.BadParameter, match="--download"):
        load(DataOptions(data=name, root=tmp_path))


def test_digits():
    task = load(DataOptions())
    assert (len(task.train), len(task.test), len(task.classes)) == (898, 899, 10)
    assert task.image_shape == (1, 8, 8)
    counts = torch.bincount(task.train.labels)
    assert (counts - torch.bincount(task.test.labels)).abs().max() <= 1
    tail = load(DataOptions(imbalance=10.0))
    assert torch.bincount(tail.train.labels)[[0, 9]].tolist() == [counts[0], round(counts.max().item() / 10)]
    assert torch.equal(tail.test.labels, task.test.labels)


@pytest.mark.parametrize("data", ["mnist", "parquet", "imagefolder", "digits:x"])
def test_unknown_data(data):
    with pytest.raises(typer.BadParameter, match="take digits, cifar10"):
        load(DataOptions(data=data))


def test_options_that_do_not_apply():
    with pytest.raises(typer.BadParameter, match="only --data parquet"):
        load(DataOptions(label_column="label"))
    with pytest.raises(typer.BadParameter, match="images of one size"):
        load(DataOptions(image_size=16))


@pytest.mark.skipif(not (REAL / "train.parquet").is_file(), reason="the real CIFAR-10 is not beside this repository")
def test_real_cifar10_with_human_label_noise():
    options = DataOptions(data=f"parquet:{REAL}", subset=500)
    clean = load(options)
    worst = load(DataOptions(**{**vars(options), "label_column": "label_worst"}))
    assert clean.classes[:3] == ("airplane", "automobile", "bird")
    assert (clean.image_shape, len(clean.test)) == ((3, 32, 32), 10_000)
    assert torch.bincount(clean.train.labels).tolist() == [50] * 10
    assert torch.equal(clean.train.images.pixels, worst.train.images.pixels)
    # CIFAR-10N: 40.2 % of the worst labels are wrong; 500 rows, five standard deviations.
    wrong = (clean.train.labels != worst.train.labels).float().mean()
    assert abs(wrong - 0.402) < 5 * (0.402 * 0.598 / 500) ** 0.5
    # The first training image of CIFAR-10 is a frog on brown ground: a picture, not noise.
    assert 100 < torch.tensor(clean.train.normalisation.mean).mean() < 140

"""The command for real scale, on small folders: it reads, trains, stops, goes on and runs on two ranks."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from ranks import in_ranks
from test_corpora import write_parquet
from typer.testing import CliRunner

from benchmarks import __main__ as main
from benchmarks import models, real
from benchmarks.real import Options, load, train


def coloured(label, random):
    """A class is a colour."""
    pixels = random.integers(0, 80, (16, 16, 3), dtype=np.uint8)
    pixels[..., label] += 150
    return pixels


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same images as an image folder and as parquet: 3 classes, 30 rows each to train on, 6 to test."""
    root = tmp_path_factory.mktemp("folders")
    random = np.random.default_rng(0)
    for part, name, count in (("train", "train", 30), ("val", "test", 6)):
        labels = np.arange(3 * count) % 3
        images = [coloured(label, random) for label in labels]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / "images" / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03}.png")
        (root / "rows").mkdir(exist_ok=True)
        write_parquet(root / "rows" / f"{name}.parquet", images, label=labels, label_worst=(labels + 1) % 3)
    return root


@pytest.fixture
def options(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(models._BUILDERS, "small", lambda shape, classes: models.ConvNet(3, classes, width=4))
    return Options(
        data=f"imagefolder:{folders}/images",
        root=tmp_path,
        out=tmp_path / "out",
        model="small",
        epochs=2,
        batch_size=16,
        lr=0.02,
        every=2,
        warmup_steps=2,
        workers=0,
        device="cpu",
    )


def silent(line):
    pass


def test_both_layouts_hold_the_same(folders, options):
    by_folder, by_rows = load(options), load(replace(options, data=f"parquet:{folders}/rows"))
    for data in (by_folder, by_rows):
        assert (len(data.train), len(data.test), data.classes, data.size) == (90, 18, 3, 16)
        image, label = data.test[4]
        pixels = image * torch.tensor(real.IMAGENET[1])[:, None, None] + torch.tensor(real.IMAGENET[0])[:, None, None]
        assert image.shape == (3, 16, 16) and pixels[label].mean() > 0.55 > pixels.mean()


def test_rows_are_cut_down_and_relabelled(folders, options):
    worst = load(replace(options, data=f"parquet:{folders}/rows", labels="label_worst", trusted=6, rows=40))
    assert (len(worst.train), len(worst.trusted)) == (46, 6)
    assert sorted(worst.trusted.labels) == [0, 0, 1, 1, 2, 2]
    image, label = worst.train[0]
    assert image[label - 1].mean() > image[label].mean()  # the class after the true one
    assert all(image[label].mean() == image.mean(dim=(1, 2)).max() for image, label in worst.trusted)
    assert len(load(replace(options, imbalance=10.0)).train) == 30 + 9 + 3
    wrong = load(replace(options, labels="random:0.5"))
    assert sum(int(image.mean(dim=(1, 2)).argmax() != label) for image, label in wrong.train) == 45


@pytest.mark.parametrize("method", get_args(real.Method))
def test_every_method_learns(options, method):
    lines = []
    numbers = train(replace(options, method=method, trusted=9, epochs=4), lines.append)
    assert numbers["accuracy"] > 0.6 and numbers["worst_class"] <= numbers["balanced"] == pytest.approx(
        numbers["accuracy"]
    )
    assert len(lines) == 4 and lines[3].startswith("epoch 4: loss ")


@pytest.mark.parametrize("method, amp", [("plain", "bf16"), ("default", "off"), ("trusted", "off")])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(options, method, amp, monkeypatch):
    options = replace(options, method=method, amp=amp, trusted=9, epochs=3)
    whole = train(options, silent)
    parameters = torch.load(options.out / "checkpoint-0.pt", weights_only=True)["model"]
    epoch = real._epoch

    def stopping(run, *others):
        if run.epoch == 1:
            raise KeyboardInterrupt
        return epoch(run, *others)

    monkeypatch.setattr(real, "_epoch", stopping)
    stopped = replace(options, out=options.out / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, silent)
    monkeypatch.setattr(real, "_epoch", epoch)
    resumed = train(replace(stopped, resume=True), silent)
    assert resumed["accuracy"] == whole["accuracy"]
    again = torch.load(stopped.out / "checkpoint-0.pt", weights_only=True)["model"]
    torch.testing.assert_close(again, parameters, rtol=0, atol=0)
    assert train(replace(stopped, resume=True), silent)["accuracy"] == whole["accuracy"]  # nothing left to do


def train_on_rank(rank, options):
    models._BUILDERS["small"] = lambda shape, classes: models.ConvNet(3, classes, width=4)
    return train(options, silent)


def test_two_ranks_keep_one_model(options):
    options = replace(options, method="trusted", trusted=9, epochs=6)
    first, second = in_ranks(2, train_on_rank, options)
    assert first["ranks"] == 2 and first["accuracy"] > 0.6 and second is None
    states = [torch.load(options.out / f"checkpoint-{rank}.pt", weights_only=True)["model"] for rank in (0, 1)]
    for name, value in states[0].items():
        if "running" not in name:  # batch norm's statistics are each rank's own
            torch.testing.assert_close(value, states[1][name])


def test_the_command_line(folders, options):
    arguments = ["real", "--data", f"parquet:{folders}/rows", "--model", "small", "--method", "plain", "--epochs", "1"]
    arguments += ["--batch-size", "16", "--workers", "0", "--device", "cpu", "--out", str(options.out)]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("result.json")
    refused = CliRunner().invoke(main.app, [*arguments, "--method", "erm"])
    assert refused.exit_code == 2 and "'erm' is not one of" in refused.output
    stored = json.loads((options.out / "result.json").read_text())
    assert set(stored["result"]) >= {"accuracy", "worst_class", "seconds", "ranks"} and "command" in stored["made_by"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "cifar10"}, "--download or another --root"),
        ({"data": "imagefolder:/nowhere"}, "DIR needs train"),
        ({"data": "parquet:/nowhere"}, "needs train.parquet"),
        ({"data": "imagenet"}, "is unknown; take cifar10"),
        ({"method": "trusted"}, "needs trusted rows"),
        ({"labels": "label_worst"}, "no label column 'label_worst'"),
        ({"batch_size": 200}, "fewer rows than a batch of 200"),
    ],
)
def test_what_cannot_be_run_is_refused(options, changes, message):
    with pytest.raises(typer.BadParameter, match=message):
        train(replace(options, **changes), silent)

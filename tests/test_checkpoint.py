"""Checkpoints under fire: killed writers, damaged files, objects that refuse."""

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import training_run
from same import assert_same
from torch import nn
from training_run import COMPLETE, PLACES, SAVE_EVERY, digest, start, train

import torch_molere
from torch_molere import checkpoint, load_checkpoint, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]
KILLS = int(os.environ.get("TORCH_MOLERE_KILLS", "40"))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Starts a training process in a folder; returns its number and what waits for so many steps, or for its death."""
    root = Path(torch_molere.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, training_run.__file__, str(tmp_path_factory.mktemp("warm") / "warm.pt")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )

    def begin(folder, place="anywhere"):
        process.stdin.write(f"{folder}\t{place}\n")
        process.stdin.flush()
        number = int(process.stdout.readline())

        def wait(steps=None):
            while steps != 0 and process.stdout.readline() != "dead\n":
                steps = steps and steps - 1

        return number, wait

    yield begin
    process.stdin.close()
    process.wait()


class Uninterrupted:
    """The digests of a run that nobody kills, by step; it goes as far as it is asked for."""

    def __init__(self):
        self.objects = start()
        self.digests = [digest(self.objects)]
        self.streams = checkpoint._random_streams()

    def __getitem__(self, step):
        checkpoint._set_random_streams(self.streams)
        while len(self.digests) <= step:
            train(self.objects)
            self.digests.append(digest(self.objects))
        self.streams = checkpoint._random_streams()
        return self.digests[step]


@pytest.fixture(scope="module")
def uninterrupted():
    return Uninterrupted()


def check_resumes(path, uninterrupted, steps=5):
    """What is in the file goes on bit-equal; returns the step it was saved at."""
    objects = start(seed=99)
    step = load_checkpoint(path, **objects)["step"]
    found = digest(objects)
    for _ in range(steps):
        train(objects)
    went_on = digest(objects)
    assert found == uninterrupted[step]
    assert went_on == uninterrupted[step + steps]
    return step


def test_killed_at_any_moment_training_goes_on_bit_equal(nursery, uninterrupted, tmp_path):
    delays = random.Random(0)
    path, saved, while_writing = tmp_path / "checkpoint.pt", 0, 0
    for _ in range(KILLS):
        number, wait = nursery(tmp_path)
        wait(steps=delays.randrange(6))
        time.sleep(delays.uniform(0.0, 0.03))
        os.kill(number, signal.SIGKILL)
        wait()
        while_writing += any(entry.name.endswith(".unfinished") for entry in tmp_path.iterdir())
        if path.exists():
            step = check_resumes(path, uninterrupted)
            assert step >= saved
            saved = step
    assert saved > KILLS // 4  # it has got somewhere between its deaths
    print(f"{KILLS} kills, {while_writing} while writing, {saved} steps")


@pytest.mark.parametrize("place", PLACES)
def test_killed_inside_a_write_one_of_two_checkpoints_is_there(nursery, uninterrupted, tmp_path, place):
    path = tmp_path / "checkpoint.pt"
    objects = start()
    for _ in range(4):
        train(objects)
    save_checkpoint(path, step=4, **objects)
    _, wait = nursery(tmp_path, place)
    wait()
    assert check_resumes(path, uninterrupted) == (4 + SAVE_EVERY if place in COMPLETE else 4)
    left = [entry for entry in tmp_path.iterdir() if entry != path]
    assert bool(left) == (place not in COMPLETE)
    save_checkpoint(path, step=4, **objects)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_another_process_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with checkpoint._replacing(path) as file:
        file.write(b"slow")
        save_checkpoint(path, epoch=1)
        assert Path(file.name).exists()
        save_checkpoint(path, epoch=2)
    assert path.read_bytes() == b"slow"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error, place):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, epoch=1)

    def fail(*_):
        raise error

    monkeypatch.setattr(f"torch_molere.checkpoint.{place}", fail)
    with pytest.raises(type(error)):
        save_checkpoint(path, epoch=2)
    assert list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path) == {"epoch": 1}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a run at its sixth step, and the objects of another one."""
    objects = start()
    for _ in range(6):
        train(objects)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, step=6, best=torch.tensor([0.5]), **objects)
    others = start(seed=1)
    for _ in range(3):
        train(others)
    return path, others


def assert_refused(path, objects, message=""):
    before = digest(objects)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path, **objects)
    assert str(path) in str(caught.value)
    assert digest(objects) == before


def test_values_come_back(saved):
    path, objects = saved
    values = load_checkpoint(path, **objects)
    assert values.keys() == {"step", "best"}
    assert values["step"] == 6
    assert torch.equal(values["best"], torch.tensor([0.5]))


def test_truncated_at_any_length(saved):
    path, objects = saved
    whole = path.read_bytes()
    lengths = {
        0,
        1,
        4,
        22,
        *range(100, len(whole), len(whole) // 25),
        *(len(whole) - k for k in (1, 2, 21, 22, 23, 64)),
    }
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert_refused(path, objects, "empty|truncated|damaged")


def test_a_flipped_bit_is_found_or_harmless(saved):
    """Every byte of content has a checksum; a flip may only go unnoticed where nothing is stored (padding, dates)."""
    path, objects = saved
    whole = path.read_bytes()
    load_checkpoint(path, **objects)
    right = digest(objects)
    others = start(seed=1)
    before, streams = digest(others), checkpoint._random_streams()
    generator = random.Random(0)
    refused = 0
    places = [generator.randrange(len(whole)) for _ in range(150)] + list(range(len(whole) - 40, len(whole)))
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << generator.randrange(8))]) + whole[place + 1 :])
        checkpoint._set_random_streams(streams)
        try:
            load_checkpoint(path, **others)
        except ValueError as error:
            assert str(path) in str(error)
            assert digest(others) == before
            refused += 1
        else:
            assert digest(others) == right
            others = start(seed=1)
    assert refused > len(places) // 3


def test_every_flip_of_stored_content_is_found(saved):
    path, objects = saved
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [
            (info.filename, whole.index(content, info.header_offset) + len(content) // 2)
            for info in archive.infolist()
            if (content := archive.read(info))
        ]
    assert len(places) > 30
    for name, place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert_refused(path, objects, f"checksum of {name}")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_is_never_executed(saved, tmp_path):
    path, objects = saved
    mark = tmp_path / "exploded"
    genuine = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "values": {}, "random": {}}
    torch.save({**genuine, "states": {"model": Bomb(mark)}}, path)
    assert_refused(path, objects, "damaged or none")
    path.write_bytes(pickle.dumps(Bomb(mark)))
    assert_refused(path, objects, "truncated, damaged or none")
    assert not mark.exists()
    torch.save(Bomb(mark), path)
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have


def test_what_is_no_checkpoint(saved, tmp_path):
    path, objects = saved
    torch.save(objects["model"].state_dict(), path)
    assert_refused(path, objects, "no checkpoint of torch_molere")
    torch.save([1, 2], path)
    assert_refused(path, objects, "no checkpoint of torch_molere")
    path.write_bytes(b"")
    assert_refused(path, objects, "empty")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    assert_refused(path, objects, "damaged or none")
    assert_refused(tmp_path, objects, "is a folder")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pt", **objects)
    with pytest.raises(ValueError, match="is a folder"):
        save_checkpoint(tmp_path, epoch=1)
    with pytest.raises(ValueError, match="objects is empty"):
        save_checkpoint(path)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_other_versions(saved, version):
    path, objects = saved
    torch.save({**torch.load(path), "version": version}, path)
    assert_refused(path, objects, f"has version {version!r} of the format, this torch_molere reads 1")


@pytest.mark.parametrize("part", ["states", "values", "random"])
def test_parts_that_are_missing(saved, part):
    path, objects = saved
    content = torch.load(path)
    del content[part]
    torch.save(content, path)
    assert_refused(path, objects, "incomplete")


@pytest.mark.parametrize("stream", ["torch", "numpy", "python", "cuda"])
@pytest.mark.parametrize("found", [None, "gone", torch.zeros(3), [1, 2]])
def test_malformed_random_streams_change_nothing(saved, stream, found):
    path, objects = saved
    content = torch.load(path)
    content["random"][stream] = found
    torch.save(content, path)
    assert_refused(path, objects, "the random streams refused")


def test_names_must_agree(saved):
    path, objects = saved
    fewer = {name: thing for name, thing in objects.items() if name != "scheduler"}
    assert_refused(path, fewer, "holds the states of .*scheduler.*, got objects for")
    assert_refused(path, {**objects, "average": nn.Linear(2, 2)}, "got objects for .*average")
    with pytest.raises(ValueError, match="step is a plain value; it is returned"):
        load_checkpoint(path, step=0, **objects)
    with pytest.raises(ValueError, match="model must be an object with a load_state_dict, got int"):
        load_checkpoint(path, **{**objects, "model": 3})


class Refuses:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        raise KeyError("never")


@pytest.mark.parametrize("refusing", ["model", "optimizer", "reweighter", "last"])
def test_all_objects_are_loaded_or_none(saved, refusing):
    path, objects = saved
    trained = start()
    train(trained)
    if refusing == "model":
        trained["model"] = nn.Sequential(*trained["model"][:-1], nn.Linear(8, 4))
    elif refusing == "optimizer":
        trained["optimizer"] = torch.optim.AdamW([torch.ones(1)])
    elif refusing == "reweighter":
        trained["reweighter"] = torch_molere.MetaReweighter(objects["model"], objects["optimizer"], every=7)
    else:
        trained["last"] = objects["last"] = Refuses()
    save_checkpoint(path, **trained)
    if refusing == "last":
        objects["last"] = Refuses()
    with_last = digest(objects)
    assert_refused(path, objects, f"{refusing} refused")
    assert digest(objects) == with_last


@pytest.mark.parametrize("value", [Path("here"), object(), lambda: 1, np.float64(1), {"a": [Bomb("x")]}])
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, epoch=1)
    try:
        save_checkpoint(path, epoch=2, thing=value)
    except ValueError as error:
        assert "thing holds what a checkpoint cannot" in str(error)
        assert load_checkpoint(path) == {"epoch": 1}
    else:
        assert load_checkpoint(path)["thing"] == value


def test_random_streams_generators_and_scalers(tmp_path):
    path = tmp_path / "checkpoint.pt"
    generator = torch.Generator().manual_seed(5)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    random.gauss(0, 1)  # leaves a number behind for the next call
    np.random.standard_normal()

    def draw():
        return [torch.rand(2), np.random.standard_normal(3), random.gauss(0, 1), torch.rand(2, generator=generator)]

    save_checkpoint(path, generator=generator, scaler=scaler)
    first = [np.asarray(x).tolist() for x in draw()]
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0})
    assert load_checkpoint(path, generator=generator, scaler=scaler) == {}
    assert [np.asarray(x).tolist() for x in draw()] == first
    assert scaler.state_dict()["scale"] == 512.0


def test_checksums_are_written_whatever_the_global_option_says(tmp_path):
    path = tmp_path / "checkpoint.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(path, numbers=torch.arange(10))
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(load_checkpoint(path)["numbers"], torch.arange(10))


def test_a_link_is_followed_and_permissions_are_ordinary(tmp_path):
    target, link, plain = tmp_path / "runs.pt", tmp_path / "latest.pt", tmp_path / "plain"
    link.symlink_to(target)
    save_checkpoint(link, epoch=1)
    plain.touch()
    assert link.is_symlink()
    assert load_checkpoint(target) == {"epoch": 1}
    assert target.stat().st_mode == plain.stat().st_mode


def test_loading_leaves_objects_usable_elsewhere(tmp_path):
    """A state dict is copied, not shared: going on with one object does not move another."""
    path, (first, second) = tmp_path / "checkpoint.pt", (start(), start())
    train(first)
    save_checkpoint(path, **first)
    load_checkpoint(path, **second)
    before = digest(second)
    streams = checkpoint._random_streams()
    train(first)
    checkpoint._set_random_streams(streams)
    assert digest(second) == before


def test_memory_files_are_not_taken():
    with pytest.raises(TypeError):
        save_checkpoint(io.BytesIO(), epoch=1)

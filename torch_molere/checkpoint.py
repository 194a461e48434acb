"""Checkpoints that survive: one file, whole or not there at all, from which training goes on bit-equal."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import random
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("torch_molere")

FORMAT = "torch_molere.checkpoint"
VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], **objects: Any) -> None:
    """Store the state of a training run in one file, so that it can go on bit-equal.

    The file is complete or not there: it is written beside ``path``, forced to the disk and then put in its place.
    Until that moment, and whatever happens before, ``path`` is the earlier checkpoint. What killed writers left behind
    is removed by the next call.

    Args:
        path: the file; a symbolic link is followed.
        objects: what to store, by name: the ``state_dict()`` of everything that has one (model, optimizer, scheduler,
            scaler, reweighter, …), the state of a :class:`torch.Generator`, and anything else as it is (``epoch=3``;
            numbers, strings, tensors and containers of them). The global random streams (PyTorch's on the CPU and on
            every CUDA device, NumPy's and Python's) are stored with them.

    Several processes each need a path of their own: their random streams differ.

    Raises:
        ValueError: if an object holds what ``torch.load(weights_only=True)`` would not read back, if there is nothing
            to store, or if ``path`` is a folder.
        OSError: if the file cannot be written. The earlier checkpoint is still there then.
    """
    if not objects:
        raise ValueError("objects is empty: save_checkpoint(path, model=model, optimizer=optimizer, …)")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"path must be a file, but {path} is a folder")
    states = {name: _state_of(value) for name, value in objects.items() if _has_state(value)}
    values = {name: value for name, value in objects.items() if not _has_state(value)}
    for name, content in (*states.items(), *values.items()):
        _check_readable(name, content)
    with _replacing(target) as file:
        torch.save(
            {"format": FORMAT, "version": VERSION, "states": states, "values": values, "random": _random_streams()},
            file,
        )


def load_checkpoint(path: str | os.PathLike[str], **objects: Any) -> dict[str, Any]:
    """Put the state of a training run back into ``objects``, all of them or none, and the random streams after them.

    Nothing in the file is executed, and a damaged one is refused. Each object keeps its device, whichever the
    checkpoint was saved from.

    Args:
        path: what :func:`save_checkpoint` wrote.
        objects: by the names they were saved under, every one that has a state; freshly built is good.

    Returns:
        The plain values that were saved, by name; their tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, damaged, of another version, of other names than ``objects``, or an object
            refuses its state; names the path and the cause. Objects and random streams are then as they were.
    """
    content = _read(path)
    states: dict[str, Any] = content["states"]
    for name in objects:
        if name in content["values"]:
            raise ValueError(f"checkpoint {path}: {name} is a plain value; it is returned, do not pass it")
        if not _has_state(objects[name]):
            kind = type(objects[name]).__name__
            raise ValueError(f"checkpoint {path}: {name} must be an object with a load_state_dict, got {kind}")
    if objects.keys() != states.keys():
        raise ValueError(f"checkpoint {path} holds the states of {sorted(states)}, got objects for {sorted(objects)}")
    before = {name: _on_cpu(_state_of(value)) for name, value in objects.items()}
    streams = _random_streams()
    touched = []
    try:
        for name in objects:
            touched.append(name)
            _load_state(objects[name], states[name])
        name = "the random streams"
        _set_random_streams(content["random"])
    except BaseException as error:
        for done in touched:
            try:
                _load_state(objects[done], before[done])
            except Exception:
                logger.exception("%s refuses even the state that it was in and may have changed", done)
        _set_random_streams(streams)
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"checkpoint {path} cannot be loaded, {name} refused: {error}") from error
    values: dict[str, Any] = content["values"]
    return values


def _has_state(value: Any) -> bool:
    return isinstance(value, torch.Generator) or (hasattr(value, "state_dict") and hasattr(value, "load_state_dict"))


def _state_of(value: Any) -> Any:
    return value.get_state() if isinstance(value, torch.Generator) else value.state_dict()


def _load_state(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(state)
    else:
        value.load_state_dict(state)


def _on_cpu(state: Any) -> Any:
    """A copy that takes no memory of an accelerator."""
    leaves, spec = pytree.tree_flatten(state)
    copies = [
        leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf) for leaf in leaves
    ]
    copied = pytree.tree_unflatten(copies, spec)
    if hasattr(state, "_metadata"):  # a module's state: the versions of its parts
        copied._metadata = copy.deepcopy(state._metadata)
    return copied


def _check_readable(name: str, content: Any) -> None:
    """Refuse now what loading would refuse later: everything but the tensors' numbers goes there and back."""
    hollow = pytree.tree_map(lambda leaf: torch.empty(0) if isinstance(leaf, Tensor) else leaf, content)
    memory = io.BytesIO()
    try:
        torch.save(hollow, memory)
        memory.seek(0)
        torch.load(memory, weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(
            f"{name} holds what a checkpoint cannot: {cause}; store numbers, strings, tensors and containers of them, "
            "or objects with a state_dict()"
        ) from error


# The file.


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``target`` once it is complete and on the disk."""
    _remove_left_overs(target)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            if fcntl is not None:  # held until the file is closed or the process has ended: "this one is being written"
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            with _checksums():
                yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(unfinished, target)  # while it is still held
        if fcntl is None:
            os.replace(unfinished, target)  # Windows moves closed files only
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    if os.name == "posix":  # the folder's own entry
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove_left_overs(target: Path) -> None:
    """Files of killed writers: those that nobody holds."""
    prefix = f".{target.name}."
    for entry in target.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(".unfinished"):
            with suppress(OSError), open(entry, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()


@contextmanager
def _checksums() -> Iterator[None]:
    """Reading checks them, so writing must compute them, whatever ``set_crc32_options`` said."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if os.path.isdir(path):
        raise ValueError(f"path must be a checkpoint, but {path} is a folder")
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"checkpoint {path} is empty")
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # PyTorch's reader does not look at the checksums
        except Exception as error:
            raise ValueError(f"checkpoint {path} is truncated, damaged or none: {error}") from error
        if damaged is not None:
            raise ValueError(f"checkpoint {path} is damaged: the checksum of {damaged} does not fit")
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"checkpoint {path} is damaged or none of torch_molere: {cause}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of torch_molere; save_checkpoint makes them")
    if content.get("version") != VERSION:
        raise ValueError(
            f"checkpoint {path} has version {content.get('version')!r} of the format, this torch_molere reads {VERSION}"
        )
    if any(not isinstance(content.get(part), dict) for part in ("states", "values", "random")):
        raise ValueError(f"checkpoint {path} is incomplete: it needs states, values and random streams")
    return content


# The global random streams.


def _random_streams() -> dict[str, Any]:
    """In types that ``torch.load(weights_only=True)`` reads."""
    numbers = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": pytree.tree_map_only(np.ndarray, np.ndarray.tolist, numbers),
        "python": random.getstate(),
    }


def _set_random_streams(streams: dict[str, Any]) -> None:
    torch.set_rng_state(streams["torch"])
    if not isinstance(streams["numpy"], dict):
        raise TypeError("NumPy's must be a dict")
    np.random.set_state(_with_arrays(streams["numpy"]))
    random.setstate(streams["python"])
    if not all(isinstance(state, Tensor) for state in streams["cuda"]):
        raise TypeError("those of CUDA devices must be tensors")
    here = torch.cuda.device_count() if streams["cuda"] else 0
    for device, state in enumerate(streams["cuda"][:here]):
        torch.cuda.set_rng_state(state, device)
    if here < len(streams["cuda"]):
        logger.warning(
            "the checkpoint was saved with %d CUDA devices, here are %d: the others' random streams are left out",
            len(streams["cuda"]),
            here,
        )


def _with_arrays(numbers: dict[str, Any]) -> dict[str, Any]:
    key = numbers["state"].get("key")
    if key is None:  # another bit generator than the Mersenne Twister keeps no array
        return numbers
    return {**numbers, "state": {**numbers["state"], "key": np.asarray(key, dtype=np.uint32)}}

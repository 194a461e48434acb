"""Functions run by several ranks that train together (gloo on the CPU)."""

import datetime
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_processes = []


class Messages(TorchDispatchMode):
    """Counts the collectives inside, and the bytes that this rank gives to them."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "barrier" not in func.__name__:
            gathers = "gather" in func.__name__ or "scatter" in func.__name__  # (outputs, inputs, ...)
            given = args[1] if gathers else args[0]
            self.names.append(func.__name__)
            tensors = [given] if isinstance(given, torch.Tensor) else given
            self.nbytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _process(rank):
    """One process a rank, kept for all tests: importing PyTorch takes longer than they do."""
    while len(_processes) <= rank:
        _processes.append(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
    return _processes[rank]


def end_processes():
    """Wait for them to end, so that what they covered is known before the tests are over."""
    while _processes:
        _processes.pop().shutdown()


def _run(rank, number, meeting, function, positional, named):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=number,
        timeout=datetime.timedelta(seconds=60),  # where one has failed the others must not wait for long
    )
    try:
        result = function(rank, *positional, **named)
        if dist.is_initialized():  # a function that tests a rank's end leaves by itself
            dist.barrier()
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_ranks(number, function, *positional, **named):
    """What ``function(rank, ...)`` returned in each of ``number`` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        ran = [
            _process(rank).submit(_run, rank, number, meeting, function, positional, named) for rank in range(number)
        ]
        errors = [future.exception() for future in ran]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in ran]

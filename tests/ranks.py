"""Functions run by several processes that train together (gloo on the CPU)."""

import datetime
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

_processes = []


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
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def in_processes(number, function, *positional, **named):
    """What ``function(rank, ...)`` returned in each of ``number`` processes."""
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

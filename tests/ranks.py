"""Functions run by several processes that train together (gloo on the CPU)."""

import datetime
import functools
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist


@functools.cache
def _process(rank):
    """One process a rank, kept for all tests: importing PyTorch takes longer than they do."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


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

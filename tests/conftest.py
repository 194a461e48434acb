"""One Hypothesis profile for all: no deadlines (machines differ), the same examples everywhere."""

import logging

import pytest
import ranks
import torch
from hypothesis import settings

settings.register_profile("molere", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("molere")


@pytest.fixture(scope="module")
def one_thread():
    """For modules whose networks are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def ranks_end():
    yield
    ranks.end_processes()


@pytest.fixture(autouse=True)
def left_as_found():
    """The library's log level and PyTorch's gradient mode, which a command or an interrupt in a test may change."""
    logger = logging.getLogger("torch_molere")
    level = logger.level
    yield
    logger.setLevel(level)
    torch.set_grad_enabled(True)

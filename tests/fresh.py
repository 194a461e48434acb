"""Functions run in fresh processes, which have imported what they need and done nothing yet."""

import multiprocessing

import torch

context = multiprocessing.get_context("forkserver")
# One server imports PyTorch, which takes seconds; the processes are forked from it.
context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.utils._pytree", "numpy", "hypothesis", "pytest", "torch_molere"]
)


def _alone(function, arguments):
    torch.set_num_threads(1)
    function(*arguments)


def process(function, *arguments):
    """A process that runs ``function(*arguments)``, started; the function is one of a module."""
    started = context.Process(target=_alone, args=(function, arguments), daemon=True)
    started.start()
    return started


def in_fresh_processes(function, calls):
    """Run ``function`` once for each tuple of arguments, each in a process of its own, two at a time."""
    waiting, running = list(calls), []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append((waiting[0], process(function, *waiting.pop(0))))
        arguments, first = running.pop(0)
        first.join()
        assert first.exitcode == 0, f"{function.__name__}{arguments} failed in its process"

"""Where the time of a MOLERE step goes: its parts, labelled for ``torch.profiler``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from torch_molere import MetaReweighter, engines, reweighter
from torch_molere.update import Update

PARTS: dict[str, list[tuple[Any, str]]] = {
    "validation forward and backward": [(reweighter, "validation_gradient")],
    "training losses along the direction": [(engines, "finite_difference"), (engines, "forward_mode")],
    "look-ahead and its transpose": [(Update, "look_ahead"), (Update, "transpose")],
    "learning φ and Θ": [(MetaReweighter, "_learn")],
    "drawing the validation batch": [(MetaReweighter, "_draw_validation")],
    "signals, split, weights, buffer": [(MetaReweighter, "_weighted_loss")],
    "notes to repeat or take back the step": [(MetaReweighter, "_record_call"), (MetaReweighter, "_keep_gradients")],
}
"""By name, the functions that are timed together; none of them runs inside another."""

WHOLE = "step"


@contextmanager
def labelled() -> Iterator[None]:
    """Every part under its name in the profiler."""
    with ExitStack() as patches:
        for name, functions in PARTS.items():
            for owner, attribute in functions:
                patches.enter_context(mock.patch.object(owner, attribute, _under(name, getattr(owner, attribute))))
        yield


def _under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return timed


def seconds_by_part(step: Callable[[], object], count: int) -> dict[str, float]:
    """Seconds a step, of the whole (:data:`WHOLE`) and of each part, mean over ``count`` steps."""
    with labelled(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(count):
            with record_function(WHOLE):
                step()
    totals = {event.key: event.cpu_time_total for event in profiled.key_averages()}
    return {name: totals.get(name, 0.0) / count / 1e6 for name in (WHOLE, *PARTS)}

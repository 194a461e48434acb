"""Where the time of a MOLERE step goes, by the ranges that the library marks for ``torch.profiler``."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("plan", "check", "meta_update", "commit")
WHOLE = "step"


def seconds_by_part(step: Callable[[], object], count: int) -> dict[str, float]:
    """Seconds a step, of the whole (:data:`WHOLE`) and of each part, mean over ``count`` steps.

    A check of the engine runs within the plan and is not counted there.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(count):
            with record_function(WHOLE):
                step()
    totals = {event.key.removeprefix("torch_molere."): event.cpu_time_total for event in profiled.key_averages()}
    found = {name: totals.get(name, 0.0) / count / 1e6 for name in (WHOLE, *PARTS)}
    return found | {"plan": found["plan"] - found["check"]}

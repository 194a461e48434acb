"""The state of a reweighter: taken, checked and put back."""

from __future__ import annotations

import copy
from typing import Any

from torch_molere.arguments import check_count
from torch_molere.core import Core
from torch_molere.distributed.collectives import rank, ranks
from torch_molere.networks import check_states

STATE_VERSION = 2


def state_of(r: Core) -> dict[str, Any]:
    """Everything but the classifier and its optimizer, in types that ``torch.load(weights_only=True)`` reads."""
    return {
        "version": STATE_VERSION,
        "configuration": dict(r.configuration),
        "rank": [rank(), ranks()],
        "seed": r.seed,
        "steps": r.steps,
        "engines": r.engines.state_dict(),
        "weighting": r.weighting.state_dict(),
        "weighting_optimizer": None if r.weighting_optimizer is None else r.weighting_optimizer.state_dict(),
        "validation": r.validation.state_dict(),
        "history": r.history.state_dict(),
        "shrinkage": r.shrinkage.state_dict(),
    }


def load(r: Core, state: dict[str, Any]) -> None:
    """Put back what :func:`state_of` gave.

    Raises:
        ValueError: as :meth:`MetaReweighter.load_state_dict`. Nothing has changed then.
    """
    present = None
    try:
        _check_state(state, r.configuration)
        present = copy.deepcopy(state_of(r))
        _load(r, copy.deepcopy(state))
    except Exception as error:
        if present is not None:
            _load(r, present)
        elif isinstance(error, ValueError):
            raise
        cause = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"state_dict does not fit this reweighter: {cause}") from error


def _load(r: Core, state: dict[str, Any]) -> None:
    check_states(r.weighting, r.weighting_optimizer, state["weighting"], state["weighting_optimizer"])
    r.weighting.load_state_dict(state["weighting"])
    if r.weighting_optimizer is not None:
        r.weighting_optimizer.load_state_dict(state["weighting_optimizer"])
    r.validation.load_state_dict(state["validation"])
    r.history.load_state_dict(state["history"])
    r.shrinkage.load_state_dict(state["shrinkage"])
    r.engines.load_state_dict(state["engines"])
    r.seed, r.steps = state["seed"], state["steps"]


def _check_state(state: Any, configuration: dict[str, Any]) -> None:
    found = state.get("version") if isinstance(state, dict) else type(state).__name__
    if type(found) is not int or found != STATE_VERSION:
        raise ValueError(f"state_dict must be one of MetaReweighter, version {STATE_VERSION}, got {found!r}")
    theirs = state.get("configuration")
    if not isinstance(theirs, dict):
        raise ValueError(f"state_dict must have a configuration, got {theirs!r:.60}")
    different = [
        f"{name}={theirs.get(name)!r:.60} (here {mine!r})"
        for name, mine in configuration.items()
        if type(theirs.get(name)) is not type(mine) or theirs.get(name) != mine
    ]
    if different:
        raise ValueError(
            f"state_dict is of another configuration: {', '.join(different)}; make the reweighter with the same "
            "arguments before loading"
        )
    if list(state.get("rank", ())) != [rank(), ranks()]:
        raise ValueError(
            f"state_dict is of rank and world size {state.get('rank')!r}, here is rank {rank()} of {ranks()}: each "
            "rank loads its own; for another number of ranks save with torch_molere.DistributedState"
        )
    for name, least in (("seed", 0), ("steps", 0)):
        check_count(name, state.get(name), least)
    if state["seed"] >= 2**63:
        raise ValueError(f"seed must be less than 2**63, got {state['seed']}")
    engines = state.get("engines")
    check_count("the number of meta-updates", engines.get("updates") if isinstance(engines, dict) else engines, 0)

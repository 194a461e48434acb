r"""The reverse-mode check: which engine is right for this model, asked of the user's own backward.

An engine that replays the forward is right if it differentiates what the user's own backward differentiated. For any
direction v, and :math:`g = ∇_θ \frac1n \sum_i \bar w_i ℓ_i` taken through the graph that the loss was made in,

.. math:: \frac1n \sum_i \bar w_i ⟨v, ∇ℓ_i⟩ = ⟨v, g⟩.

This is asked for v = g, where both sides are large, and for v = u, the direction of the meta-gradient. Besides, the
replayed losses must equal training's: a sum alone is blind to what averages out. It runs at the 1st, 10th, 100th, …
meta-update, and whenever autocast, a mode, a dtype or the compilation of the model changes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_molere.distributed import fsdp
from torch_molere.distributed.collectives import anywhere, summed
from torch_molere.hypergradients.engines import Engine, OwnGraph, finite_difference, forward_mode
from torch_molere.hypergradients.functional import Replay, all_modules, gradients_apart, reached_leaves, user_hooks
from torch_molere.hypergradients.precision import full_precision

logger = logging.getLogger("torch_molere")

TOLERANCE: dict[Engine, float] = {"finite": 0.01, "forward": 0.002, "reverse": 0.002}
"""How far the two sides may differ, relative. Right replays of float32 models stay below 0.001, wrong ones that were
tried were off by 0.19 and more."""

ROUNDING = 0.003
"""The same, relative to the mean size of the summands, which may be much larger than their sum."""

REDUCED, DOUBLE = 10.0, 0.01
"""Both are this much wider where autocast reduces the precision of backward, and in double precision."""

SAME_LOSSES = 1e-4
REPEATED_LOSSES = 1e-5
"""Replayed losses within the first are training's; within the second a difference may start from training's."""


@dataclass(frozen=True)
class Found:
    """What a check found.

    Attributes:
        engine: the engine to use.
        error: how far the two sides differ, relative.
        repeats: the replayed losses are training's to rounding.
        observers: the user's hooks have to run in replays, as the losses depend on them.
        key: what was visible of the model then.
        own: the user's own graph, where the engine is ``"reverse"``.
        armed: the gradients in ``.grad`` were those of the weighted loss alone, so that they serve as a check.
    """

    engine: Engine
    error: float
    repeats: bool
    observers: bool
    key: Any = None
    own: OwnGraph | None = field(default=None, repr=False)
    armed: bool = False


ROUNDED = 0.2
"""Where reverse mode, differentiated once more, is this near to itself and no nearer, gradients are rounding."""


FITTED = 1e-4
"""So are those of a mean loss below this, which are left over from the difference of numbers near one."""


class LostInRoundingError(RuntimeError):
    """No engine agrees with backward, and backward hardly with itself: the gradients of a batch that is fitted."""


class EngineChoice:
    """The engine in use, and when it is to be checked again.

    Args:
        requested: ``"auto"`` for the fastest that is right, or one of the engines.
    """

    def __init__(self, requested: Engine) -> None:
        self.requested = requested
        self.found: Found | None = None
        self.updates = 0
        self._doubted = False
        self.only_reverse = False
        self._skipped = self._rest = 0

    @property
    def engine(self) -> Engine:
        """The engine in use; ``"auto"`` before the first meta-update has found one."""
        return self.requested if self.found is None else self.found.engine

    def due(self, key: Any) -> bool:
        """Whether the next meta-update is to be checked."""
        number = self.updates + 1
        power = 10 ** round(math.log10(number)) == number
        return self.found is None or self._doubted or power or self.found.key != key

    def proven(self, key: Any) -> bool:
        """Whether an engine was right before, of the model as it is."""
        return self.updates > 0 and (self.found is None or self.found.key == key)

    @property
    def resting(self) -> bool:
        """Whether a meta-update that is due is passed over, as checks before it found no engine."""
        return self._rest > 0

    def passed_over(self, skipped: bool) -> None:
        """A step that was due had no meta-update: ``skipped``, as no engine agreed with backward, or resting."""
        if skipped:
            self._skipped += 1
            self._rest = min(2**self._skipped, 32)
        else:
            self._rest = max(self._rest - 1, 0)

    def doubt(self, only_reverse: bool = False) -> None:
        """A meta-gradient did not fit backward's: check the next one, or do without replays from now on."""
        self._doubted = True
        self.only_reverse = only_reverse

    def commit(self, found: Found) -> None:
        """A meta-update was made with what was found."""
        self.updates += 1
        self._doubted = self.only_reverse = False
        self._skipped = 0
        if self.found is None or self.found.engine != found.engine:
            logger.info(
                "hypergradient=%r uses the %r engine, within %.2g of reverse mode",
                self.requested,
                found.engine,
                found.error,
            )
        self.found = replace(found, own=None)

    def state_dict(self) -> dict[str, Any]:
        """How many meta-updates there were. The engine is found anew after loading."""
        return {"updates": self.updates, "skipped": self._skipped, "rest": self._rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self.updates, self._skipped, self._rest = state["updates"], state["skipped"], state["rest"]
        self.found = None


def visible(model: nn.Module, replay: Replay) -> Any:
    """What can be seen of a model that changes what its forward computes."""
    return (
        replay.call.autocast,
        hash(
            tuple((m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in all_modules(replay.modules))
        ),
        hash(tuple((o.dtype, o.requires_grad, bool(o._backward_hooks), len(user_hooks(o))) for o in replay.owners)),
        hasattr(model, "_orig_mod") or model._compiled_call_impl is not None,
    )


def derivative(
    found: Found, replay: Replay, values: Sequence[Tensor], direction: Sequence[Tensor], losses: Tensor
) -> Tensor:
    """``(B,)`` ⟨u, ∇ℓ_i(θ)⟩ by the engine that was found; ``losses`` are training's."""
    if found.engine == "reverse":
        assert found.own is not None
        return found.own.derivative(direction)
    if found.engine == "forward":
        return forward_mode(replay, values, direction)
    return finite_difference(replay, values, direction, losses if found.repeats else None)


def agreement(
    engine: Engine,
    weights: Tensor,
    derivatives: Tensor,
    direction: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    reduced: bool,
    together: bool = False,
) -> tuple[float, bool]:
    """How far ``Σ w̄_i ⟨v, ∇ℓ_i⟩ / n`` is from ``⟨v, g⟩``, relative, and whether that is close enough.

    Args:
        engine: whose derivatives they are.
        weights: ``(B,)`` w̄ / n of this rank.
        derivatives: ``(B,)``.
        direction: v.
        gradients: g.
        reduced: backward ran in reduced precision.
        together: the gradients are the mean over the ranks, and each rank has a part of the direction (FSDP2).
    """
    terms = (weights * derivatives).double()
    pairs = [(fsdp.local(v), fsdp.local(g)) for v, g in zip(direction, gradients, strict=True) if g is not None]
    own = torch.stack([_dot(v, g) for v, g in pairs]).sum() if pairs else terms.new_zeros(())
    numbers = torch.stack([terms.sum(), terms.abs().sum(), own])
    if together:
        (numbers,) = summed([numbers])
    total, size, expected = numbers.tolist()
    wider = _wider(reduced, derivatives.dtype)
    allowed = wider * (TOLERANCE[engine] * abs(expected) + ROUNDING * size)
    distance = abs(total - expected)
    scale = max(abs(expected), ROUNDING / TOLERANCE[engine] * size)
    return distance / scale if scale > 0 else 0.0, distance <= allowed or not math.isfinite(expected + size)


def _dot(v: Tensor, g: Tensor) -> Tensor:
    """⟨v, g⟩, summed in their own precision within the first dimension's entries and in double precision over them."""
    return (v * g).flatten(min(1, v.ndim - 1)).sum(dim=-1).double().sum() if v.ndim else (v * g).double()


def examine(
    requested: Engine,
    replay: Replay,
    values: Sequence[Tensor],
    losses: Tensor,
    weights: Tensor,
    key: Any = None,
    only_reverse: bool = False,
    together: bool = True,
) -> tuple[Found, list[Tensor | None]]:
    """The fastest engine that agrees with the user's own backward along its gradient, and that gradient.

    Args:
        requested: ``"auto"`` or the only engine to try.
        replay: the training forward.
        values: its parameters, detached.
        losses: ``(B,)`` training's, with the graph that they were made in, which is kept.
        weights: ``(B,)`` w̄ / n.
        key: what is visible of the model.
        only_reverse: replays were found wrong along the direction of a meta-gradient.
        together: all ranks decide together.

    Raises:
        RuntimeError: if no engine is right; says why.
    """
    reached_leaves(losses)  # refuses reentrant checkpoints
    with full_precision(losses.device):
        gradients = gradients_apart(replay.modules, (weights * losses).sum(), replay.owners)
    direction = [torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]
    known, reduced = losses.detach(), replay.call.autocast.enabled
    causes: list[str] = []

    def wrong_for_one(flag: bool) -> bool:
        return anywhere(flag, known.device) if together else flag

    def tried(engine: Engine, repeats: bool, observers: bool) -> Found | None:
        found = Found(engine, 0.0, repeats, observers, key)
        error, right = 0.0, False
        try:
            if engine == "reverse":
                found = replace(found, own=OwnGraph(losses, replay.owners, replay.modules))
            derivatives = derivative(found, replace(replay, observers=observers), values, direction, known)
        except Exception as failure:
            if isinstance(failure, torch.OutOfMemoryError):
                raise
            causes.append(f"{engine!r} cannot be used ({_first_line(failure)})")
        else:
            error, right = agreement(engine, weights, derivatives, direction, gradients, reduced=reduced)
            if not right:
                causes.append(f"{engine!r} is {error:.2g} off")
                nearly.append(engine == "reverse" and error < ROUNDED)
        return None if wrong_for_one(not right) else replace(found, error=error)

    nearly: list[bool] = []
    known_engines: tuple[Engine, ...] = ("finite", "forward")
    engines = [engine for engine in known_engines if requested in ("auto", engine) and not only_reverse]
    same = False
    # Without the user's hooks if that is right too: hooks that only look on run once a step, as in plain training.
    with_hooks = (False, True) if replay.has_observers else (False,)
    for observers in with_hooks:
        causes = ["replays are off along the direction of the meta-gradient"] if only_reverse else []
        distance, cause = _distance(replace(replay, observers=observers), values, known)
        same = not wrong_for_one(not distance <= SAME_LOSSES)
        repeats = not reduced and not wrong_for_one(distance > REPEATED_LOSSES)
        if not same:
            causes.append(f"the forward does not repeat: {cause}")
        for engine in engines if same else ():
            if (found := tried(engine, repeats, observers)) is not None:
                return found, gradients
    if requested in ("auto", "reverse") and not fsdp.any_sharded(values):
        for observers in with_hooks:
            stray = unreached(replace(replay, observers=observers), values, weights, gradients, same)
            missed = wrong_for_one(stray is not None)
            if not missed:
                break
        if missed:
            causes.append(f"a replay does not reach all that training reaches: {stray or 'in another rank'}")
        elif (found := tried("reverse", False, observers)) is not None:
            if requested == "auto":
                logger.warning(
                    "hypergradient='auto' differentiates the training graph twice, at the cost of about two more "
                    "backwards a meta-update: %s",
                    "; ".join(causes),
                )
            return found, gradients
    fitted = any(nearly) or bool(known.abs().mean() < FITTED)
    raise (LostInRoundingError if fitted else RuntimeError)(refusal(requested, causes))


def examine_sharded(requested: Engine, replays: Sequence[tuple[Replay, Tensor]], values: Sequence[Tensor]) -> bool:
    """Whether replays of a model sharded by FSDP2 give training's losses, which come with them, to rounding: then a
    difference may start from these. Its gradients are known after backward alone: :func:`agreement` is asked then.

    Raises:
        RuntimeError: if they are other losses.
    """
    device = replays[0][1].device
    found = [_distance(replay, values, known) for replay, known in replays]
    wrong = [cause for distance, cause in found if not distance <= SAME_LOSSES]
    if anywhere(bool(wrong), device):
        raise RuntimeError(refusal(requested, [f"the forward does not repeat: {(wrong or ['in another rank'])[0]}"]))
    reduced = any(replay.call.autocast.enabled for replay, _ in replays)
    return not reduced and not anywhere(any(distance > REPEATED_LOSSES for distance, _ in found), device)


def refusal(requested: Engine, causes: Sequence[str]) -> str:
    """What is said where no engine is right."""
    return (
        f"hypergradient={requested!r} finds no engine that agrees with the model's own backward: {'; '.join(causes)}. "
        "Likely causes: random numbers or a hidden state in forward that are no attribute of a module; torch.compile "
        "with dropout (set torch._inductor.config.fallback_random = True); parameters that are no attributes of the "
        "model (lists, parametrize.cached()); an operation that cannot be differentiated twice"
        + ("" if requested == "auto" else ". hypergradient='auto' tries all engines")
    )


def _distance(replay: Replay, values: Sequence[Tensor], known: Tensor) -> tuple[float, str]:
    """How far the losses of a replay are from training's, relative; said in words."""
    try:
        with torch.no_grad():
            again = replay.losses(values, as_called=True)
        distance = float(((again - known).abs() / (1.0 + known.abs())).max()) if len(known) else 0.0
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return math.inf, f"it fails ({_first_line(error)})"
    return distance, f"the losses of training come out {distance:.2g} different"


def unreached(
    replay: Replay, values: Sequence[Tensor], weights: Tensor, gradients: Sequence[Tensor | None], same: bool
) -> str | None:
    """A parameter whose gradient is another one in a replay, so that a look-ahead would move only a part of it.

    Args:
        replay: the training forward.
        values: its parameters.
        weights: ``(B,)`` w̄ / n.
        gradients: of training, by the parameters.
        same: the losses repeat, so that gradients must; else it is only asked whether there are any.
    """
    leaves = [value.detach().requires_grad_() for value in values]
    try:
        with torch.enable_grad():
            total = (weights * replay.losses(leaves, as_called=True)).sum()
        with full_precision(total.device):
            found = gradients_apart(replay.modules, total, leaves)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"it fails ({_first_line(error)})"
    allowed = _wider(replay.call.autocast.enabled, total.dtype) * TOLERANCE["finite"]
    for owner, g, again in zip(replay.owners, gradients, found, strict=True):
        if g is None or not bool(g.any()) or not bool(g.isfinite().all()):
            continue
        for hook in (owner._backward_hooks or {}).values() if again is not None else ():
            changed = hook(again)  # type: ignore[arg-type]  # as in training
            again = again if changed is None else changed
        if again is None or (same and not bool((again - g).norm() <= allowed * g.norm())):
            return f"a parameter of shape {tuple(g.shape)}"
    return None


def _wider(reduced: bool, dtype: torch.dtype) -> float:
    return REDUCED if reduced else DOUBLE if dtype == torch.double else 1.0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

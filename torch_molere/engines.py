"""Which hypergradient engine serves a model: given by the user, or measured once."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from torch_molere.distributed import anywhere, gathered
from torch_molere.hypergradients import ENGINES, Engine, TrainingForward, finite_difference, forward_mode

logger = logging.getLogger("torch_molere")

AGREEMENT = 0.1
"""Relative error up to which ``auto`` takes the finite engine for the exact one."""

COMPARED = 32
"""How many instances it is measured on: enough to tell, few enough that forward mode's memory does not show."""

REPLAY_TOLERANCE = 1e-5
"""How closely the losses of training must be repeated for a difference to start from them: less than the difference
itself, more than rounding in single precision."""

REORDERED_TOLERANCE = 1e-4
"""The same where the forward runs in another order of memory than training's, in which convolutions round otherwise;
far less still than what reduced precision leaves."""


class DirectionalDerivative:
    """⟨u, ∇ℓ_i(θ)⟩ for every instance i, by the engine named or, for ``"auto"``, the fastest one that is right.

    For the first instances of the first batch the derivative is computed both ways. The finite engine (one plain
    forward) is taken if it agrees with forward mode or, where the model has no forward-mode rule, with itself at twice
    the step; else forward mode.

    The finite engine starts from the losses that training computed, if its first call finds that they can be repeated:
    in reduced precision (autocast, wherever it is entered) or with an unseeded forward they cannot.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = engine
        self.repeatable: bool | None = None

    def __call__(
        self,
        forward: TrainingForward,
        parameters: dict[str, Tensor],
        direction: dict[str, Tensor],
        losses: Tensor,
    ) -> Tensor:
        """``(B,)``; ``losses`` are ℓ(θ) as training computed them.

        Raises:
            RuntimeError: if ``"auto"`` finds no engine that is right.
        """
        engine = self.engine
        if engine == "auto":
            engine = self._chosen(forward.of_first(COMPARED), parameters, direction)
        if engine == "finite":
            known = losses if self._repeats(forward, parameters, losses) else None
            return finite_difference(forward, parameters, direction, known)
        return forward_mode(forward, parameters, direction)

    def _repeats(self, forward: TrainingForward, parameters: dict[str, Tensor], losses: Tensor) -> bool:
        """Whether the forward gives the losses of training again; found out once."""
        if self.repeatable is None:
            with torch.no_grad():
                again = forward.losses(parameters)
            distance = (again - losses).abs() / (1.0 + again.abs())
            tolerance = REORDERED_TOLERANCE if forward.in_channels_last else REPLAY_TOLERANCE
            self.repeatable = not anywhere(bool((distance > tolerance).any()), losses.device)
        return self.repeatable

    def _chosen(self, forward: TrainingForward, parameters: dict[str, Tensor], direction: dict[str, Tensor]) -> Engine:
        """The engine for this time, and for good unless there was nothing to compare."""
        try:
            exact, _ = gathered(forward_mode(forward, parameters, direction))  # every process must choose alike
        except (NotImplementedError, RuntimeError) as error:
            return self._finite_alone(forward, parameters, direction, str(error).splitlines()[0])
        try:
            approximate, _ = gathered(finite_difference(forward, parameters, direction))
        except TypeError as error:
            return self._take("forward", str(error).splitlines()[0])
        distance = _distance(approximate, exact)
        if distance is None:
            return "forward"
        reason = f"a finite difference is within {distance:.2g} of forward mode"
        return self._take("finite" if distance <= AGREEMENT else "forward", reason)

    def _finite_alone(
        self, forward: TrainingForward, parameters: dict[str, Tensor], direction: dict[str, Tensor], cause: str
    ) -> Engine:
        """With nothing exact to compare with, a difference must agree with one of twice its step."""
        once, twice = (gathered(finite_difference(forward, parameters, direction, scale=s))[0] for s in (1.0, 2.0))
        distance = _distance(twice, once)
        if distance is None:
            return "finite"
        if distance > AGREEMENT:
            raise RuntimeError(
                f"hypergradient='auto' finds no engine that is right: forward mode is not available ({cause}), and a "
                f"finite difference changes by {distance:.2g} of itself with its step. If the model enters autocast "
                "itself, enter it around the model instead; hypergradient='finite' takes the difference as it is"
            )
        return self._take("finite", f"forward mode is not available: {cause}")

    def _take(self, engine: Engine, reason: str) -> Engine:
        self.engine = engine
        logger.info("hypergradient='auto' takes the %r engine: %s", engine, reason)
        return engine

    def state_dict(self) -> dict[str, Any]:
        """What was found out."""
        return {"engine": self.engine, "repeatable": self.repeatable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: for another engine than there is.
        """
        engine, repeatable = state["engine"], state["repeatable"]
        if engine not in ENGINES or not (repeatable is None or isinstance(repeatable, bool)):
            raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}, repeatable={repeatable!r}")
        self.engine, self.repeatable = engine, repeatable


def _distance(found: Tensor, of: Tensor) -> float | None:
    """‖found − of‖ / ‖of‖; None where that is not defined."""
    norm = torch.linalg.vector_norm(of)
    if not bool(torch.isfinite(norm) & (norm > 0)):
        return None
    return float(torch.linalg.vector_norm(found - of) / norm)

"""Which hypergradient engine serves a model: given by the user, or measured once."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from torch_molere.hypergradients import Engine, TrainingForward, finite_difference, forward_mode

logger = logging.getLogger("torch_molere")

AGREEMENT = 0.1
"""Relative error up to which ``auto`` takes the finite engine for the exact one."""


class DirectionalDerivative:
    """⟨u, ∇ℓ_i(θ)⟩ for every instance i, by the engine named or, for ``"auto"``, the fastest one that is right.

    The first non-zero derivative is computed both ways. The finite engine (one plain forward) is taken from then on if
    it agrees with forward mode or if the model has no forward-mode rule; otherwise forward mode is.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = engine

    def __call__(
        self,
        forward: TrainingForward,
        parameters: dict[str, Tensor],
        direction: dict[str, Tensor],
        losses: Tensor | None,
    ) -> Tensor:
        """``(B,)``; ``losses`` are ℓ(θ) where they are known in the precision of the parameters."""
        if self.engine == "forward":
            return forward_mode(forward, parameters, direction)
        if self.engine == "finite":
            return finite_difference(forward, parameters, direction, losses)
        return self._choose(forward, parameters, direction, losses)

    def _choose(
        self,
        forward: TrainingForward,
        parameters: dict[str, Tensor],
        direction: dict[str, Tensor],
        losses: Tensor | None,
    ) -> Tensor:
        try:
            exact = forward_mode(forward, parameters, direction)
        except (NotImplementedError, RuntimeError) as error:
            approximate = finite_difference(forward, parameters, direction, losses)
            self._take("finite", f"forward mode is not available: {str(error).splitlines()[0]}")
            return approximate
        norm = torch.linalg.vector_norm(exact)
        if not bool(torch.isfinite(norm) & (norm > 0)):
            return exact  # nothing to compare; the next meta-update decides
        try:
            approximate = finite_difference(forward, parameters, direction, losses)
        except TypeError as error:
            self._take("forward", str(error).splitlines()[0])
            return exact
        distance = float(torch.linalg.vector_norm(approximate - exact) / norm)
        agree = distance <= AGREEMENT
        self._take("finite" if agree else "forward", f"a finite difference is within {distance:.2g} of forward mode")
        return exact

    def _take(self, engine: Engine, reason: str) -> None:
        self.engine = engine
        logger.info("hypergradient='auto' takes the %r engine: %s", engine, reason)

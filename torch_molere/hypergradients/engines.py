r"""The engines: ⟨u, ∇ℓ_i(θ)⟩ of every instance i, the directional derivative of the vector of losses along u.

- :func:`finite_difference`: one more plain forward, at θ + εu.
- :func:`forward_mode`: :func:`torch.func.jvp`, exact, no second-order graph.
- :class:`OwnGraph`: the user's own graph, differentiated twice. Right whenever backward is, at two to three times the
  cost of a backward.
- :func:`unrolled`: ``higher``, the reference, for any number of updates.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import higher
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from torch_molere.calls import Arguments
from torch_molere.distributed import fsdp
from torch_molere.hypergradients.functional import Replay, gradients_apart, preserved_randomness, run_apart
from torch_molere.hypergradients.precision import full_precision
from torch_molere.losses import PerSampleLoss

Engine = Literal["auto", "finite", "forward", "reverse", "unrolled"]

_FORWARD_AD = threading.RLock()
"""PyTorch's forward-mode levels are those of the process: one thread at a time."""


def finite_difference(
    replay: Replay, values: Sequence[Tensor], direction: Sequence[Tensor], losses: Tensor | None = None
) -> Tensor:
    """⟨u, ∇ℓ_i(θ)⟩ as (ℓ_i(θ + εu) − ℓ_i(θ)) / ε, one plain forward, when ``losses`` = ℓ(θ) is known; else as
    (ℓ_i(θ + εu) − ℓ_i(θ − εu)) / 2ε, two.

    ε‖u‖ is 3e-4 in single precision (of 3e-5 to 1e-3 the best on an MLP, a conv net and a ResNet-20 in training) and
    1e-6 in double precision, where truncation and rounding balance.

    Raises:
        TypeError: if the parameters have less than single precision, in which no step is both small and visible.
    """
    norm = fsdp.full(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(direction)))))
    precision = min((u.dtype for u in direction), key=lambda dtype: torch.finfo(dtype).bits)
    if torch.finfo(precision).bits < 32:
        raise TypeError(f"the finite engine needs float32 or float64 parameters, got {precision}; use 'forward'")
    radius = 1e-6 if precision == torch.float64 else 3e-4
    # A zero direction has a zero derivative; the clamp keeps 0/0 out without asking the device for the value.
    step = radius / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    with torch.no_grad():
        shifted = [torch.addcmul(value, u, step) for value, u in zip(values, direction, strict=True)]
        ahead = replay.losses(shifted)
        if losses is not None:
            return (ahead - losses) * (norm / radius)
        shifted = [torch.addcmul(value, u, step, value=-1) for value, u in zip(values, direction, strict=True)]
        return (ahead - replay.losses(shifted)) * (norm / (2 * radius))


def forward_mode(replay: Replay, values: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """⟨u, ∇ℓ_i(θ)⟩ by one pass of forward-mode differentiation.

    Attention runs on PyTorch's MATH kernel, the one that has a forward-mode rule.

    Raises:
        NotImplementedError: if an operation of the model has no forward-mode rule, or the model is sharded by FSDP2.
    """
    if fsdp.any_sharded(values):
        raise NotImplementedError("FSDP2 gathers the values of its own parameters, without their derivatives")
    with _FORWARD_AD, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch scripts its own forward-mode rules at the first use, and warns of its own deprecation.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        tangents: Tensor = torch.func.jvp(
            lambda *at: replay.losses(at), tuple(value.detach() for value in values), tuple(direction)
        )[1]
    return tangents.detach()


class OwnGraph:
    """The gradient of the weighted loss as a function of the weights, in the graph that the user's forward made.

    ⟨u, ∇_θ Σ_i w̄_i ℓ_i⟩ is linear in w̄, and its derivative by w̄_i is ⟨u, ∇ℓ_i⟩. Nothing is replayed.

    Args:
        losses: ``(B,)`` with their graph, whose memory the gradient's own graph holds from now on.
        owners: the parameters.
        modules: that the forward called.

    Raises:
        RuntimeError: if an operation of the model cannot be differentiated twice.
    """

    def __init__(self, losses: Tensor, owners: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._weights = torch.ones_like(losses, requires_grad=True)
        with torch.enable_grad(), full_precision(losses.device):
            self._gradients = gradients_apart(modules, (self._weights * losses).sum(), owners, create_graph=True)

    def derivative(self, direction: Sequence[Tensor]) -> Tensor:
        """``(B,)`` ⟨u, ∇ℓ_i(θ)⟩, detached."""
        pairs = [(g, u) for g, u in zip(self._gradients, direction, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(self._weights)
        gradients, along = zip(*pairs, strict=True)
        (found,) = gradients_apart(self._modules, gradients, [self._weights], along)
        return torch.zeros_like(self._weights) if found is None else found.detach()


def unrolled(
    replay: Replay,
    optimizer: Optimizer,
    validation: tuple[Arguments, Any],
    weights: Tensor,
    val_loss_fn: PerSampleLoss,
    seed: int,
    *,
    steps: int = 1,
) -> Tensor:
    """``(B,)`` ∂L_val/∂w by ``higher``: it unrolls the updates on ``mean(weights * losses)`` and differentiates them.

    Its Adam adds ``eps`` before the bias correction, PyTorch's after it.

    Args:
        replay: the training batch.
        optimizer: at its present state, of a kind that ``higher`` has.
        validation: the validation batch.
        weights: ``(B,)``.
        val_loss_fn: what validation is measured by.
        seed: of the random streams that the validation forward draws from.
        steps: how many updates, all on the training batch.

    Raises:
        TypeError: if ``higher`` does not have the optimizer.
        ValueError: if the optimizer uses an option that ``higher`` would ignore.
    """
    check_unrollable(optimizer)
    w = weights.detach().clone().requires_grad_()

    def run() -> Tensor | None:
        (positional, named), targets = replay.call.arguments, replay.targets
        with (
            torch.enable_grad(),
            warnings.catch_warnings(),
            preserved_randomness(replay.device, replay.call.random),
            full_precision(replay.device),
            sdpa_kernel(SDPBackend.MATH),  # the attention kernel that can be differentiated twice
        ):
            warnings.simplefilter("ignore")  # higher's own deprecation warnings
            with higher.innerloop_ctx(replay.model, optimizer, copy_initial_weights=True) as (functional, inner):
                for state in (state for group in inner.state for state in group.values()):
                    if isinstance(state.get("step"), Tensor):  # in single precision, of which higher takes powers
                        state["step"] = float(state["step"])
                for _ in range(steps):
                    losses = replay.criterion(functional(*positional, **named), targets)
                    inner.step((w * losses).mean())
                positional, named = validation[0]
                with preserved_randomness(replay.device, seed):
                    losses = val_loss_fn(functional(*positional, **named), validation[1])
                return torch.autograd.grad(losses.mean(), w, allow_unused=True)[0]

    gradient = run_apart(replay.modules, [], [], run)
    return torch.zeros_like(w) if gradient is None else gradient.detach()


# Options that higher 0.2.1 reads; it silently ignores any other.
_HIGHER_OPTIONS: dict[type[Optimizer], frozenset[str]] = {
    torch.optim.SGD: frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"}),
    torch.optim.Adam: frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"}),
    torch.optim.RMSprop: frozenset({"lr", "alpha", "eps", "weight_decay", "momentum", "centered"}),
    torch.optim.Adagrad: frozenset({"lr", "lr_decay", "weight_decay", "eps", "initial_accumulator_value"}),
    torch.optim.Adadelta: frozenset({"lr", "rho", "eps", "weight_decay"}),
    torch.optim.Adamax: frozenset({"lr", "betas", "eps", "weight_decay"}),
}
_IMPLEMENTATION_OPTIONS = frozenset({"params", "foreach", "fused", "differentiable", "capturable", "initial_lr"})


def check_unrollable(optimizer: Optimizer) -> None:
    """Refuse what ``higher`` does not have, or would silently compute otherwise."""
    options = _HIGHER_OPTIONS.get(type(optimizer))
    if options is None:
        raise TypeError(
            f"engine='unrolled' has no {type(optimizer).__name__}: higher covers "
            f"{', '.join(kind.__name__ for kind in _HIGHER_OPTIONS)}; use engine='forward'"
        )
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in options | _IMPLEMENTATION_OPTIONS and value not in (False, None, 0):
                raise ValueError(f"engine='unrolled' would ignore {name}={value!r} of the optimizer; use 'forward'")

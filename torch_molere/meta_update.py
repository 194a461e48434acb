"""The meta-update of a step: L_val(θ⁺), the meta-gradient, and the gradients of φ and Θ, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from torch_molere.calls import device_of
from torch_molere.core import Core
from torch_molere.distributed import fsdp
from torch_molere.distributed.collectives import anywhere, gathered, ranks, summed_gradients
from torch_molere.hypergradients.check import ROUNDED, Found, agreement, derivative, examine_sharded, refusal
from torch_molere.hypergradients.meta_gradient import Validated, meta_gradient, validate
from torch_molere.hypergradients.update import parameters_of, unscaled
from torch_molere.networks import learning_parameters, networks_apart
from torch_molere.plan import MetaUpdate, Plan
from torch_molere.planning import places_of, samples_of
from torch_molere.validation.source import Drawn
from torch_molere.weighting import standardised

SAME_FACTOR = 1e-3
"""How far the factors that a gradient was multiplied with may differ within a parameter, relative."""


ONE_LOSS = (
    "order='before' takes one loss for each optimizer step, as its look-ahead is of one batch; use order='after' to "
    "accumulate gradients"
)


def differentiate(r: Core, plans: Sequence[Plan], raw: list[tuple[Tensor, Tensor | None]] | None) -> MetaUpdate | None:
    """The meta-update of the step that is about to be taken; None where none is due.

    Args:
        r: the reweighter.
        plans: the losses that the step is made of.
        raw: each parameter's gradient as backward left it.
    """
    if any(plan.call.edited for plan in plans):
        raise RuntimeError(
            "inputs were written to between the model's forward and the optimizer's step: they are still needed, and "
            "would be kept for validation as they are now; give the model a copy, or write to them after the step"
        )
    if r.order == "before" and len(plans) > 1:
        raise RuntimeError(ONE_LOSS)
    r.validation.check_together([plan.sending for plan in plans])
    made = [plan for plan in plans if plan.update is not None]
    if made:
        _check_seen(r, made[0], raw)
        return made[0].update
    due = [plan for plan in plans if plan.replay is not None]
    if not due or r.order == "before":
        return None
    with record_function("torch_molere.meta_update"):
        owners = r.owners()
        for plan in due:
            assert plan.replay is not None
            if [id(o) for o in plan.replay.owners] != [id(o) for o in owners] or plan.places != places_of(plan.replay):
                raise RuntimeError(
                    "parameters changed between the forward and the step (another optimizer stepped first, or they "
                    "were written to): the meta-gradient would be taken at the wrong place. Give all optimizers of the "
                    "model to one MetaReweighter(model, [first, second]); for SAM see the documentation"
                )
        left, seen = _left(owners, raw), _seen(r.optimizers, owners)
        factors = _factors(owners, left, seen)
        return meta_update_of(r, due, seen, factors, left)


def _left(owners: Sequence[Tensor], raw: list[tuple[Tensor, Tensor | None]] | None) -> list[Tensor | None]:
    before = {id(parameter): gradient for parameter, gradient in raw or ()}
    return [before.get(id(owner)) for owner in owners]


def _check_seen(r: Core, plan: Plan, raw: list[tuple[Tensor, Tensor | None]] | None) -> None:
    """Refuse gradients that are not those of the loss, which the "before" order has looked ahead with."""
    assert plan.replay is not None
    owners = plan.replay.owners
    left, seen = _left(owners, raw), _seen(r.optimizers, owners)
    factors = _factors(owners, left, seen) or [1.0] * len(owners)
    for before, after, factor in zip(left, seen, factors, strict=True):
        if before is None:
            continue
        if after is None or bool((torch.as_tensor(factor * plan.scale - 1.0).abs() > SAME_FACTOR).any()):
            raise RuntimeError(
                "order='before' looks ahead with the loss's own gradients, before they are clipped, masked or scaled; "
                "use order='after', whose meta-gradient has such factors"
            )


def _seen(optimizers: Sequence[Optimizer], owners: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that the optimizers will use, one for each owner."""
    holder = {id(parameter): optimizer for optimizer in optimizers for parameter in parameters_of(optimizer)}
    return [unscaled(holder[id(owner)], [owner.grad])[0] for owner in owners]


def _factors(
    owners: Sequence[Tensor], left: Sequence[Tensor | None], seen: Sequence[Tensor | None]
) -> list[Tensor | float] | None:
    """m = (gradient that the optimizer sees) / (gradient that backward left), a number for each parameter times a mask.

    Raises:
        RuntimeError: if it is anything else.
    """
    pairs = [
        (i, fsdp.local(a), fsdp.local(b))
        for i, (a, b) in enumerate(zip(left, seen, strict=True))
        if a is not None and b is not None
    ]
    if not pairs or not bool(torch.stack([(a != b).any() for _, a, b in pairs]).any()):
        return None
    factors: list[Tensor | float] = [1.0] * len(owners)
    wrong: list[str] = []
    for i, a, b in pairs:
        kept = (b != 0) & (a != 0)
        whole, part = torch.where(kept, a.double(), 0.0), torch.where(kept, b.double(), 0.0)
        factor = (whole * part).sum() / (whole * whole).sum().clamp_min(torch.finfo(torch.double).tiny)
        distance = (part - factor * whole).abs().max() if a.numel() else factor * 0
        if float(distance) > SAME_FACTOR * float(part.abs().max() if a.numel() else 1.0) or bool(
            ((a == 0) & (b != 0)).any()
        ):
            wrong.append(f"{tuple(a.shape)}")
        mask = (kept | (a == 0)).to(a.dtype) * factor.to(a.dtype)
        factors[i] = mask if not fsdp.any_sharded([owners[i]]) else _like(owners[i], mask)
    if wrong:
        raise RuntimeError(
            "gradients were changed between backward() and the optimizer's step by more than a factor for each "
            f"parameter and a mask (parameters of shapes {', '.join(wrong[:5])}; clip_grad_value_, noise and centring "
            "are such changes), which the meta-gradient does not have; use clip_grad_norm_, or change the loss instead"
        )
    return factors


def _like(owner: Tensor, part: Tensor) -> Tensor:
    """A ``DTensor`` like ``owner`` of this rank's part."""
    from torch.distributed.tensor import DTensor

    assert isinstance(owner, DTensor)
    return DTensor.from_local(part, owner.device_mesh, owner.placements, shape=owner.shape, stride=owner.stride())


def meta_update_of(
    r: Core,
    plans: list[Plan],
    gradients: Sequence[Tensor | None],
    factors: list[Tensor | float] | None,
    left: Sequence[Tensor | None] | None = None,
    otherwise: Drawn | None = None,
) -> MetaUpdate | None:
    """L_val(θ⁺), the meta-gradient, and the gradients of φ and Θ; None where there is nothing to validate on.

    Args:
        r: the reweighter.
        plans: whose weights the meta-gradient is of.
        gradients: what the optimizers see.
        factors: m.
        left: the gradients as backward left them, as a check.
        otherwise: the validation batch while the source has none.
    """
    first = plans[0]
    seed = r.seed_of(1000)
    drawn = r.validation.draw(first.samples.losses.shape[0], seed) or otherwise
    if drawn is None or not (first.together.ready or otherwise is not None):
        r.messages.once(
            "empty",
            "no meta-update: the validation buffer holds fewer than two instances so far. It fills at the buffer's "
            "fraction of each batch, and one instance always stays on the training side, so batches of one never fill "
            "it; raise warmup_steps, use larger batches, or pass validation=",
        )
        return None
    assert first.replay is not None
    owners = first.replay.owners
    values = [owner.detach() for owner in owners]
    observers, select = first.found is None or first.found.observers, first.replay.select

    def at(after: list[Tensor]) -> Validated:
        batch = drawn.arguments, drawn.targets
        return validate(
            r.network,
            r.criterion_of_training,
            r.criterion_of_validation,
            batch,
            owners,
            after,
            seed,
            sign=r.sign,
            observers=observers,
            select=select,
        )

    validated, direction = meta_gradient(r.optimizers, owners, gradients, at, factors)
    if left is not None and fsdp.any_sharded(values) and first.found is not None and r.engines.due(first.found.key):
        own, engine = _checked_sharded(r, plans, values, direction, left)
    else:
        own = []
        for plan in plans:
            per_sample, found = _checked_derivative(r, plan, values, direction, left if len(plans) == 1 else None)
            if per_sample is None or found is None:
                return None
            own.append(per_sample)
            engine = found
    derivatives = [
        gathered(per_sample / plan.count * plan.scale, plan.together.sizes)[0]
        for plan, per_sample in zip(plans, own, strict=True)
    ]
    return _learned(r, plans, derivatives, validated, drawn, engine)


def _checked_derivative(
    r: Core,
    plan: Plan,
    values: list[Tensor],
    direction: list[Tensor],
    left: Sequence[Tensor | None] | None,
) -> tuple[Tensor | None, Found | None]:
    """``(B,)`` ⟨u, ∇ℓ_i⟩, where it agrees with reverse mode; None where another engine is to be found."""
    assert plan.replay is not None and plan.found is not None
    found, weights = plan.found, plan.weights / plan.share
    reduced = plan.replay.call.autocast.enabled
    device = weights.device
    result = derivative(found, plan.replay, values, direction, plan.samples.losses)
    if plan.gradients is not None:
        error, right = agreement(found.engine, weights, result, direction, plan.gradients, reduced=reduced)
        wrong = anywhere(not right, device)
        if wrong and r.engines.requested == "auto" and found.engine == "finite":
            found = replace(found, engine="forward")
            try:
                result = derivative(found, plan.replay, values, direction, plan.samples.losses)
                error, right = agreement("forward", weights, result, direction, plan.gradients, reduced=reduced)
            except (NotImplementedError, RuntimeError) as failure:
                if isinstance(failure, torch.OutOfMemoryError):
                    raise
                right = False
            wrong = anywhere(not right, device)
        if wrong:
            if r.engines.requested != "auto" or found.engine == "reverse":
                cause = f"{found.engine!r} is {error:.2g} off along the direction of the meta-gradient"
                disagreement = RuntimeError(refusal(r.engines.requested, [cause]))
                if not (r.engines.proven(found.key) or (found.engine == "reverse" and error < ROUNDED)):
                    raise disagreement
                r.messages.skipped(disagreement)
                plan.skipped = True
                return None, None
            r.engines.doubt(only_reverse=True)
            return None, None
        found = replace(found, error=max(error, found.error))
    if left is not None and isinstance(plan.scale, Tensor) and ranks() == 1 and not fsdp.any_sharded(values):
        scaled = [None if g is None else g / plan.scale for g in left]
        error, right = agreement(found.engine, weights, result, direction, scaled, reduced=reduced)
        if plan.gradients is not None:
            found = replace(found, armed=right)
        elif found.armed and not right:
            r.engines.doubt()
            return None, None
    return result, found


def _checked_sharded(
    r: Core,
    plans: Sequence[Plan],
    values: list[Tensor],
    direction: list[Tensor],
    left: Sequence[Tensor | None],
) -> tuple[list[Tensor], Found]:
    """The same of a model sharded by FSDP2, for each plan, checked against the gradients that backward left.

    Raises:
        RuntimeError: if replays do not agree with them.
    """
    replays = [(plan.replay, plan.samples.losses) for plan in plans if plan.replay is not None]
    repeats = examine_sharded(r.engines.requested, replays, values)
    weights = torch.cat([plan.weights / plan.count * plan.scale for plan in plans])
    reduced = any(replay.call.autocast.enabled for replay, _ in replays)
    assert plans[0].found is not None
    error = 0.0
    # From losses on both sides, at the cost of one more forward, a difference is more exact.
    for one_sided in (True, False) if repeats else (False,):
        found = replace(plans[0].found, repeats=one_sided)
        own = [derivative(found, replay, values, direction, losses) for replay, losses in replays]
        error, right = agreement(found.engine, weights, torch.cat(own), direction, left, reduced=reduced, together=True)
        if right:
            return own, replace(found, error=error)
    raise RuntimeError(refusal(r.engines.requested, [f"'finite' is {error:.2g} off"]))


def _learned(
    r: Core,
    plans: list[Plan],
    derivatives: list[Tensor],
    validated: Validated,
    drawn: Drawn,
    found: Found,
) -> MetaUpdate | None:
    """The gradients of φ and Θ."""
    evidence, signals = [], []
    strength = r.shrinkage.strength
    for plan, gradient in zip(plans, derivatives, strict=True):
        side = gradient if plan.training is None else gradient[plan.training]
        scaled = _spread_over(plan, standardised(side), gradient)
        evidence.append(scaled)
        if strength is None:
            signals.append(gradient)
        else:
            weights = plan.everyone.detach().to(gradient.dtype)
            pulled = scaled + strength * (
                weights - (1.0 if plan.training is None else plan.training.to(gradient.dtype))
            )
            signals.append(pulled / max(plan.count, 1))
    gradients = _weighting_gradients(r, plans, signals)
    with networks_apart(r.with_statistics, device_of(r.network), r.seed_of(1001)):
        held = samples_of(r, drawn.arguments, validated.outputs, drawn.targets, validated.losses)
        learned = r.validation.differentiate(held, plans[0].samples, drawn)
    numbers = [validated.mean, *(d.sum() for d in derivatives)]
    numbers += [fsdp.full(g.coalesce().values() if g.is_sparse else g).sum() for g in gradients or () if g is not None]
    own = [derivative[plan.own] for derivative, plan in zip(derivatives, plans, strict=True)]
    if not bool(torch.isfinite(torch.stack([number.double() for number in numbers])).all()):
        r.messages.once("nonfinite", "skipped a meta-update: the validation loss or its gradient is not finite")
        return MetaUpdate(validated.mean, [], own, [], None, drawn, None, found)
    return MetaUpdate(validated.mean, plans, own, evidence, gradients, drawn, learned, found, held=held)


def _spread_over(plan: Plan, side: Tensor, like: Tensor) -> Tensor:
    if plan.training is None:
        return side
    return torch.zeros_like(like).masked_scatter(plan.training, side)


def _weighting_gradients(r: Core, plans: list[Plan], signals: list[Tensor]) -> list[Tensor | None] | None:
    """∂/∂φ through the weights, their normalisation included, summed over plans and ranks."""
    parameters = learning_parameters(r.weighting)
    if not parameters or r.weighting_optimizer is None:
        return None
    total: list[Tensor | None] = [None] * len(parameters)
    for plan, signal in zip(plans, signals, strict=True):
        if not plan.everyone.requires_grad:
            continue
        found = torch.autograd.grad(
            plan.everyone, parameters, signal.to(plan.everyone.dtype), allow_unused=True, retain_graph=True
        )
        total = [
            old if new is None else new if old is None else old + new for old, new in zip(total, found, strict=True)
        ]
    return summed_gradients(total)

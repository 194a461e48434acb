"""One step: plan, differentiate, commit. Nothing the reweighter owns changes until the optimizer has stepped.

- :func:`plan_loss` is called by ``loss()``; in the "before" order it has the meta-update too.
- :func:`~torch_molere.meta_update.differentiate` is called before the optimizer's step.
- :func:`commit` is called after it, and is the only place where state changes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torch_molere.advice import advise
from torch_molere.calls import device_of
from torch_molere.core import Core
from torch_molere.distributed.collectives import averaged, gathered, ranks
from torch_molere.hypergradients.functional import Call, gradients_apart
from torch_molere.interrupts import uninterrupted
from torch_molere.meta_update import differentiate, meta_update_of
from torch_molere.networks import networks_apart, take_step
from torch_molere.plan import MetaUpdate, Plan
from torch_molere.planning import check_numbers, make_plan, raw_weights, weighted_loss
from torch_molere.result import Latest, StepResult
from torch_molere.weighting import normalised


def plan_loss(
    r: Core, call: Call, select: Any, outputs: Any, targets: Any, indices: Any, pending: Sequence[Plan]
) -> tuple[Plan, Tensor]:
    """The plan for one batch, and its weighted training loss."""
    plan, loss, losses = make_plan(r, call, select, outputs, targets, indices, pending)
    if plan.replay is not None and r.order == "before":
        loss = _before(r, plan, outputs, targets, losses, len(pending))
    return plan, loss


def _before(r: Core, plan: Plan, outputs: Any, targets: Any, losses: Tensor, number: int) -> Tensor:
    """The "before" order: a virtual step with the present φ, whose successor weighs this very batch."""
    assert plan.replay is not None
    owners = plan.replay.owners
    loss = (plan.weights.to(losses.dtype) * losses).sum() / max(plan.share, 1.0 / ranks())
    gradients = averaged(gradients_apart(plan.replay.modules, loss, owners), 1.0)
    update = meta_update_of(r, [plan], gradients, None)
    plan.update = update
    if update is None or not update.plans:
        return _loss_of(r, plan, outputs, targets, losses)
    plan.update, weighting = _stepped(r, update)
    rows = plan.sending.rows
    memory = r.history.recall(rows, plan.samples.losses, plan.samples.margins, update.evidence[0][plan.own])
    plan.samples = replace(
        plan.samples, meta_gradients=memory.meta_gradients, has_meta_gradient=memory.has_meta_gradient
    )
    with networks_apart(r.with_statistics, device_of(r.network), r.seed_of(number)):
        raw = raw_weights(weighting, plan.samples, graph=False)
    everyone = gathered(raw, plan.together.sizes)[0]
    check_numbers([], everyone.tolist(), plan.together.sizes)
    plan.everyone = normalised(everyone, plan.training, r.max_weight)
    loss = _loss_of(r, plan, outputs, targets, losses)
    plan.loss = loss.detach().clone()
    return loss


def _loss_of(r: Core, plan: Plan, outputs: Any, targets: Any, losses: Tensor) -> Tensor:
    """The weighted training loss of a plan, which is the plain one where all weights are one."""
    equal = len(set(plan.together.sizes)) == 1 and bool((plan.everyone == 1).all())
    return weighted_loss(r, outputs, targets, losses, plan.everyone, plan.own, plan.count, equal)[0]


def _stepped(r: Core, update: MetaUpdate) -> tuple[MetaUpdate, nn.Module]:
    """φ after its step, as a copy: φ itself moves when the optimizer has stepped."""
    if update.weighting_gradients is None or r.weighting_optimizer is None:
        return update, r.weighting
    weighting, optimizer = copy.deepcopy((r.weighting, r.weighting_optimizer))
    take_step(weighting, optimizer, update.weighting_gradients)
    return replace(update, weighting_state=(weighting.state_dict(), optimizer.state_dict())), weighting


def before_step(r: Core, plans: Sequence[Plan], raw: Any) -> MetaUpdate | None:
    """The meta-update of the step that is about to be taken; None where none is due."""
    started = time.perf_counter()
    update = differentiate(r, plans, raw)
    if update is not None:
        r.tally.seconds += time.perf_counter() - started
    return update


def after_step(r: Core, plans: Sequence[Plan], update: MetaUpdate | None) -> None:
    """The optimizer has stepped."""
    result = result_of(plans, update)
    with uninterrupted():
        commit(r, plans, update)
        r.result = result
        r.steps += 1
    r.tally.steps += 1
    if update is not None:
        held = update.held
        seen = (None, None) if held is None else (held.correct, held.classes)
        r.tally.latest = Latest(update.val_loss, torch.cat(update.meta_gradients), *seen)
    advise(r, plans[0].sending.rows, update is not None)


def commit(r: Core, plans: Sequence[Plan], update: MetaUpdate | None) -> None:
    """Take over what the step that was just taken has decided and learned."""
    with record_function("torch_molere.commit"):
        # First φ and Θ, whose optimizers may be the user's own, and fail.
        for plan in plans:
            for buffer, value in plan.statistics:
                buffer.copy_(value)
        if update is not None and r.weighting_optimizer is not None:
            if update.weighting_state is not None:
                state, optimizer_state = update.weighting_state
                r.weighting.load_state_dict(state)
                r.weighting_optimizer.load_state_dict(optimizer_state or {})
            elif update.weighting_gradients is not None:
                take_step(r.weighting, r.weighting_optimizer, update.weighting_gradients)
        r.validation.commit(
            [plan.sending for plan in plans],
            None if update is None else update.drawn,
            None if update is None else update.learned,
        )
        weighed = not r.warming_up
        for plan in plans:
            seen = plan.together
            held = None if plan.training is None else ~plan.training
            r.history.record(seen.rows, seen.samples, plan.everyone, held, plan.sent, weighed, seen.predictions)
        if update is not None:
            for plan, evidence in zip(update.plans, update.evidence, strict=True):
                samples = plan.together.samples
                r.shrinkage.observe(evidence, samples.meta_gradients, samples.has_meta_gradient)
                r.history.record_meta_gradients(plan.together.rows, evidence)
            r.engines.commit(update.found)
        elif r.meta_update_is_due:
            r.engines.passed_over(any(plan.skipped for plan in plans))


def result_of(plans: Sequence[Plan], update: MetaUpdate | None) -> StepResult:
    """The result of the losses of an optimizer step; without an update also that of a loss before its step."""
    losses = torch.stack([plan.loss for plan in plans])
    outputs = [plan.samples.outputs for plan in plans]
    alike = len(outputs) > 1 and all(
        isinstance(each, Tensor) and each.shape[1:] == outputs[0].shape[1:] for each in outputs
    )
    return StepResult(
        losses.mean() if len(plans) > 1 else plans[0].loss,
        outputs[0] if len(outputs) == 1 else torch.cat(outputs) if alike else outputs,
        torch.cat([plan.weights for plan in plans]),
        torch.cat([plan.held_out for plan in plans]),
        torch.cat([plan.sent[plan.own] for plan in plans]),
        None if update is None else update.val_loss,
        None if update is None else torch.cat(update.meta_gradients),
    )

"""How the plan of one batch is made: its samples, their weights with the graph to φ, and who is sent to validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torch_molere.calls import Arguments, detached, device_of
from torch_molere.core import Core
from torch_molere.distributed import fsdp
from torch_molere.distributed.collectives import own_slice, ranks
from torch_molere.history import indices_of
from torch_molere.hypergradients.check import Found, LostInRoundingError, examine, visible
from torch_molere.hypergradients.engines import OwnGraph
from torch_molere.hypergradients.functional import Call, Replay, reached_leaves, user_hooks
from torch_molere.hypergradients.precision import Autocast
from torch_molere.hypergradients.update import parameters_of
from torch_molere.networks import networks_apart
from torch_molere.plan import Plan, Together
from torch_molere.samples import Samples
from torch_molere.validation.source import Sending, held_out
from torch_molere.weighting import normalised


def make_plan(
    r: Core,
    call: Call,
    select: Any,
    outputs: Any,
    targets: Any,
    indices: Any,
    pending: Sequence[Plan] = (),
    *,
    check: bool = False,
) -> tuple[Plan, Tensor, Tensor]:
    """The plan for one batch, its weighted loss, and ``(B,)`` its losses.

    Args:
        r: the reweighter.
        call: of the model, which returned outputs.
        select: what takes ``outputs`` out of all that it returned.
        outputs, targets, indices: as the loop gives them.
        pending: earlier plans of the same step.
        check: makes a meta-update due.
    """
    with record_function("torch_molere.plan"):
        if call.edited:
            raise ValueError(
                "the model writes to its inputs in place, so that its forward cannot be repeated; clone them at its "
                "start (x = x.clone()) or use operations that are not in place"
            )
        if r.sharded is not None:
            fsdp.check_synchronised(r.network)
        r.start()
        losses = r.criterion_of_training(outputs, targets)
        size = losses.shape[0]
        if size == 0:
            raise ValueError("batch must have at least one instance, got none")
        rows = None if indices is None else indices_of(indices, size)
        row_list = None if rows is None else rows.tolist()
        samples = samples_of(r, call.arguments, outputs, targets, losses.detach(), rows, row_list)
        warming_up = r.warming_up and not check
        meta = call.repeatable and (check or (r.meta_update_is_due and not warming_up and not r.engines.resting))
        with networks_apart(r.with_statistics, device_of(r.network), r.seed_of(len(pending))) as statistics:
            with torch.no_grad():
                p = r.validation.probabilities(samples, warming_up)
            raw = raw_weights(r.weighting, samples, meta) if not warming_up else torch.ones_like(samples.losses)
        everyone, together, training, own, count, sending, mask, equal = _split(r, samples, raw, p, row_list, pending)
        weights = normalised(everyone, training, r.max_weight)
        loss, own_weights = weighted_loss(r, outputs, targets, losses, weights, own, count, equal)
        plan = Plan(call, samples, together, sending, mask, weights, training, own, count, loss.detach().clone())
        if meta:
            autocast = Autocast.now(losses.device)
            plan.replay = Replay(r.network, r.criterion_of_training, call, select, targets, r.owners(), autocast)
            plan.places = places_of(plan.replay)
            _find_engine(r, plan, losses, own_weights / plan.share)
        plan.statistics = statistics
        return plan, loss, losses


def samples_of(
    r: Core,
    arguments: Arguments,
    outputs: Any,
    targets: Any,
    losses: Tensor,
    rows: Tensor | None = None,
    row_list: list[int] | None = None,
) -> Samples:
    """What is known of a batch, with what is remembered of its rows."""
    correct, classes, margins = r.criterion_of_training.describe(outputs, targets, losses, r.correct_fn)
    memory = r.history.recall(row_list, losses, margins)
    on_device = None if rows is None else rows.to(losses.device, non_blocking=True)
    return Samples(arguments, targets, detached(outputs), losses, correct, classes, margins, *memory, on_device)


def raw_weights(weighting: nn.Module, samples: Samples, graph: bool) -> Tensor:
    """``(B,)`` w as φ gives them, with their graph to it if asked for."""
    with torch.set_grad_enabled(graph):
        weights = weighting(samples)
    size = samples.losses.shape[0]
    if not isinstance(weights, Tensor) or weights.shape != (size,):
        found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weighting must return ({size},) weights, got {found}")
    return weights


def _split(
    r: Core, samples: Samples, raw: Tensor, p: Tensor | None, rows: list[int] | None, pending: Sequence[Plan]
) -> tuple[Tensor, Together, Tensor | None, slice, int, Sending, Tensor, bool]:
    """Who is sent to validation and who is held out, of all ranks; reads the device once (with several ranks twice).

    Returns:
        Raw weights of all ranks, what else is known of all, the training side, this rank's part, n, what to send, this
        rank's held-out instances, and whether the loss is the plain one.
    """
    columns = [samples.losses, raw.detach().to(samples.losses.dtype)]
    labels = samples.classes if r.validation.balances_labels else None
    columns += [column.to(samples.losses.dtype) for column in (p, labels) if column is not None]
    losses, weights, *rest = torch.stack(columns).tolist()  # the one reading of the device
    probabilities = rest[0] if p is not None else None
    classes = None if labels is None else [int(label) for label in rest[-1]]
    size = len(losses)
    flags = [False] * size
    sent: list[int] = []
    if all(map(math.isfinite, losses)):
        sent = r.validation.choose(samples, probabilities, rows, classes, _decided_rows(pending))
    for position in sent:
        flags[position] = True
    if ranks() == 1:
        own, everyone, together = slice(0, size), raw, Together(samples, None, rows, flags, [size], r.validation.ready)
    else:
        everyone, together, losses, weights = _exchange(r, samples, raw, rows, flags)
        own = own_slice(together.sizes)
    check_numbers(losses, weights, together.sizes)
    # The mean over the ranks of their means is that of all where they have equally many.
    equal = weights[0] > 0 and all(weight == weights[0] for weight in weights) and len(set(together.sizes)) == 1
    pairs = [] if together.rows is None else list(zip(together.rows, together.sent, strict=True))
    if rows is not None and own.start > 0:  # of the ranks that send a row, the first keeps it
        kept_before = {row for row, flag in pairs[: own.start] if flag}
        sent = [position for position in sent if rows[position] not in kept_before]
    sending = Sending(
        samples.arguments,
        samples.targets,
        sent,
        classes,
        rows,
        frozenset(row for row, flag in pairs if flag),
        frozenset(row for row, flag in pairs if not flag),
        together.samples,
    )
    out = held_out(together.rows, together.sent) if r.validation.holds_out else None
    if out is None or not any(out):
        mask = torch.zeros(size, dtype=torch.bool, device=raw.device)
        return everyone, together, None, own, len(together.sent), sending, mask, equal
    held = torch.tensor(out).to(raw.device, non_blocking=True)
    return everyone, together, ~held, own, out.count(False), sending, held[own], False


def _decided_rows(pending: Sequence[Plan]) -> dict[int, bool]:
    """Rows that pending losses of this step have: whether they are sent to validation."""
    return {
        row: row in plan.sending.sent_rows
        for plan in pending
        for row in (*plan.sending.sent_rows, *plan.sending.trained_rows)
    }


def _exchange(
    r: Core, samples: Samples, raw: Tensor, rows: list[int] | None, flags: list[bool]
) -> tuple[Tensor, Together, list[float], list[float]]:
    """All that any rank has to know of the others' instances, in one message of 64-bit integers, so that nothing is
    rounded.

    Returns:
        Raw weights of all ranks, what else is known of all, and all losses and weights on the host.
    """
    size, device = len(flags), raw.device
    none = torch.full((size,), -1, device=device)
    nothing = torch.full((size,), math.nan, dtype=torch.double, device=device)
    outputs, classes = samples.outputs, samples.classes
    guesses = isinstance(outputs, Tensor) and outputs.ndim == 2 and classes is not None
    numbers = [raw.detach(), samples.losses, samples.running_losses, samples.meta_gradients]
    numbers += [nothing if margins is None else margins for margins in (samples.margins, samples.running_margins)]
    bits = torch.tensor([flag + 2 * r.validation.ready for flag in flags]).to(device, non_blocking=True)
    bits = bits + 4 * samples.correct.long() + 8 * samples.has_meta_gradient.long()
    labels = [none if classes is None else classes.long(), outputs.argmax(dim=1) if guesses else none]
    message = torch.stack(
        [
            *(number.double().view(torch.long) for number in numbers),
            none if samples.indices is None else samples.indices,
            *labels,
            bits,
        ],
        dim=1,
    )
    whole, known, sizes = r.gather(message)
    given = whole.T[:6].contiguous().view(torch.double)
    weights, losses, running_losses, meta_gradients, margins, running_margins = given
    indices, targets, predictions, bits = whole.T[6:].contiguous()
    own = own_slice(sizes)

    def like(column: Tensor | None, everyone: Tensor) -> Tensor | None:
        return None if column is None else everyone.to(column.dtype)

    together = Together(
        replace(
            samples,
            losses=losses.to(samples.losses.dtype),
            correct=(bits & 4) > 0,
            classes=like(classes, targets),
            margins=like(samples.margins, margins),
            running_losses=running_losses.to(samples.running_losses.dtype),
            running_margins=like(samples.running_margins, running_margins),
            meta_gradients=meta_gradients.to(samples.meta_gradients.dtype),
            has_meta_gradient=(bits & 8) > 0,
            indices=like(samples.indices, indices),
        ),
        predictions,
        None if rows is None else known[:, 6].tolist(),
        [bool(flags & 1) for flags in known[:, 9].tolist()],
        sizes,
        all(flags & 2 for flags in known[:, 9].tolist()),
    )
    everyone = weights.to(raw.dtype)
    everyone = torch.cat([everyone[: own.start], raw, everyone[own.stop :]])
    weights_read, losses_read = known.T[:2].contiguous().view(torch.double).tolist()
    return everyone, together, losses_read, weights_read


def weighted_loss(
    r: Core,
    outputs: Any,
    targets: Any,
    losses: Tensor,
    weights: Tensor,
    own: slice,
    count: int,
    equal: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted training loss, and the weights of this rank's instances."""
    own_weights = weights[own].detach().to(losses.dtype)
    if equal:
        return r.criterion_of_training.mean(outputs, targets, losses), own_weights
    return (own_weights * losses).sum() / (max(count, 1) / ranks()), own_weights


def check_numbers(losses: list[float], weights: list[float], sizes: list[int]) -> None:
    """Refuse losses that nothing can be made of and weights that are none, in every rank alike."""
    wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if wrong:
        where = f"instances {_some(wrong)} of the batch"
        if len(sizes) > 1:
            starts = [sum(sizes[:number]) for number in range(len(sizes))]
            ends = zip(starts, sizes, strict=True)
            of_rank = [[i - start for i in wrong if 0 <= i - start < size] for start, size in ends]
            where = "; ".join(f"instances {_some(own)} of rank {n}" for n, own in enumerate(of_rank) if own)
        raise FloatingPointError(f"loss is NaN or infinite for {where}; the step was refused, nothing has changed")
    if not all(0.0 <= weight < math.inf for weight in weights):
        raise ValueError("weighting must return finite weights ≥ 0, got negative, NaN or infinite ones")


def _some(numbers: list[int]) -> str:
    return f"{numbers[:20]} and {len(numbers) - 20} more" if len(numbers) > 20 else f"{numbers}"


def places_of(replay: Replay) -> list[tuple[int, int]]:
    """Where the values of all parameters lie, and how often they were written to."""
    parameters = [parameter for module in replay.modules for parameter in module.parameters()]
    if fsdp.any_sharded(replay.owners):
        parameters = list(replay.owners)  # type: ignore[arg-type]  # gathered ones stand in the modules for a while
    return [(part.data_ptr(), part._version) for part in map(fsdp.local, parameters)]


def _find_engine(r: Core, plan: Plan, losses: Tensor, weights: Tensor) -> None:
    """The engine for this meta-update, checked against reverse mode where that is due."""
    assert plan.replay is not None
    values = [owner.detach() for owner in plan.replay.owners]
    key = visible(r.model, plan.replay)
    known = None if r.engines.due(key) else r.engines.found
    if known is None:
        if fsdp.any_sharded(values):  # checked against the gradients that backward leaves
            plan.found = Found("finite", 0.0, False, True, key)
            return
        with record_function("torch_molere.check"):
            _check_owners(r, losses)
            try:
                plan.found, plan.gradients = examine(
                    r.engines.requested, plan.replay, values, losses, weights, key, r.engines.only_reverse
                )
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or not (
                    isinstance(error, LostInRoundingError) or r.engines.proven(key)
                ):
                    raise
                r.messages.skipped(error)
                plan.replay, plan.skipped = None, True
                return
    else:
        plan.found = known
        if known.engine == "reverse":
            plan.found = replace(known, own=OwnGraph(losses, plan.replay.owners, plan.replay.modules))
    plan.replay = replace(plan.replay, observers=plan.found.observers)


def _check_owners(r: Core, losses: Tensor) -> None:
    """Refuse parameters that the optimizer moves and a replay cannot."""
    owners, held = r.owners(), parameters_of(*r.optimizers)
    known = {id(owner) for owner in owners}
    strangers = [parameter for parameter in held if parameter.requires_grad and id(parameter) not in known]
    reached = reached_leaves(losses)
    shapes = [tuple(parameter.shape) for parameter in strangers if id(parameter) in reached]
    if shapes:
        raise RuntimeError(
            f"the optimizer holds {len(shapes)} parameters that the loss depends on and that are no parameters of "
            f"model or loss_fn (of shapes {shapes[:5]}): the look-ahead cannot move them. Make them attributes of a "
            "module in model (nn.ParameterList instead of a list), put networks that follow each other into "
            "one module, or pass the module that has them as loss_fn"
        )
    if any(user_hooks(owner) for owner in owners):
        raise RuntimeError(
            "parameters have post-accumulate-grad hooks, which may change .grad inside backward(), where the "
            "meta-gradient cannot see it; change gradients between backward() and the step, or by "
            "parameter.register_hook"
        )
    held_ids = {id(parameter) for parameter in held}
    unheld = [name for name, p in r.network.named_parameters() if id(p) in reached and id(p) not in held_ids]
    if unheld:
        r.messages.once(
            "unheld",
            f"no optimizer of this MetaReweighter holds {len(unheld)} parameters of the model that get gradients "
            f"({', '.join(unheld[:3])}): the meta-gradient takes them as constant. Freeze them, or give all optimizers "
            "of the model, MetaReweighter(model, [first, second])",
        )

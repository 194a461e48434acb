"""Checks of a whole batch: the dry run of ``check(batch)``, and of what validation will be made of."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_molere.calls import arguments_of, device_of
from torch_molere.core import Core
from torch_molere.distributed import fsdp
from torch_molere.distributed.collectives import averaged
from torch_molere.hooks import Attachment
from torch_molere.hypergradients.functional import Call, ModuleState, observed, preserved_randomness, run_apart
from torch_molere.meta_update import meta_update_of
from torch_molere.planning import make_plan
from torch_molere.validation.fixed import FixedValidation
from torch_molere.validation.source import Drawn
from torch_molere.validation.store import first_half, size_of


def dry_run(r: Core, attachment: Attachment, inputs: Any, targets: Any, indices: Any) -> str:
    """A few lines on what will be used; raises what the first meta-update would raise."""
    model, device = r.model, device_of(r.model)
    state = ModuleState((model, *r.criterion_of_training.modules), values=True)
    engines, result, calls = r.engines, r.result, attachment.calls
    positional, named = arguments_of(inputs)
    with preserved_randomness(device):
        try:
            r.checking, r.engines = True, copy.copy(engines)
            started = time.perf_counter()
            with torch.enable_grad():
                outputs = model(*positional, **named)
            call, select = attachment.call_of(outputs)
            _synchronize(device)
            forward = time.perf_counter() - started
            plan, loss, _ = make_plan(r, call, select, outputs, targets, indices, attachment.active, check=True)
            check_batch(r, call, select, targets)
            owners = r.owners()
            _synchronize(device)
            started = time.perf_counter()
            gradients = _gradients(loss, owners)
            _synchronize(device)
            plain = forward + time.perf_counter() - started
            held = Drawn(call.arguments, targets, list(range(len(plan.samples.losses))))
            started = time.perf_counter()
            update = meta_update_of(r, [plan], gradients, None, gradients, otherwise=held)
            _synchronize(device)
            cost = (time.perf_counter() - started) / plain
        finally:
            state.apply()
            r.checking, r.engines, r.result, attachment.calls = False, engines, result, calls
    if update is None:
        raise RuntimeError("engines disagree along the direction of the meta-gradient; pass hypergradient='reverse'")
    reached = sum(gradient is not None for gradient in gradients)
    sent = "held out of training" if r.validation.holds_out else "trained on too"
    return "\n".join(
        [
            f"engine: {update.found.engine!r}, {update.found.error:.1g} from reverse mode",
            f"cost of a meta-update: {cost:.1f} of a plain step, one every {r.every} steps",
            f"parameters reached: {reached} of {len(owners)} that the optimizer holds",
            f"validation: {type(r.validation).__name__}, loss {float(update.val_loss):.3g}, its rows are {sent}",
            "rows known by their index: " + ("yes" if indices is not None else "no; see with_indices(dataset)"),
        ]
    )


def _gradients(loss: Tensor, owners: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The mean over the ranks of the gradients of their losses; ``.grad`` stays as it is."""
    if not fsdp.any_sharded(owners):
        return averaged(torch.autograd.grad(loss, owners, allow_unused=True), 1.0)
    kept = [owner.grad for owner in owners]
    try:
        for owner in owners:
            owner.grad = None
        loss.backward()  # FSDP2 reduces gradients nowhere else
        return [owner.grad for owner in owners]
    finally:
        for owner, gradient in zip(owners, kept, strict=True):
            owner.grad = gradient


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def check_batch(r: Core, call: Call, select: Callable[[Any], Any], targets: Any) -> None:
    """Once: what validation will be made of must work: its first batch; or half of this one, as a buffer keeps it.

    Raises:
        ValueError: if it does not, as where the first dimension of a batch is not that of its instances.
    """
    if r.batch_checked:
        return
    if isinstance(r.validation, FixedValidation):
        what = "the first batch of validation"
        advice = (
            "it must yield (inputs, targets) as training does, with more than one instance for batch normalisation "
            "(give its DataLoader drop_last=True or another batch_size)"
        )
        drawn = r.validation.draw(0, 0)
        arguments, own_targets, expected = drawn.arguments, drawn.targets, None
    else:
        size = size_of(call.arguments, targets)
        if size < 4:
            return
        what, expected = "half of a batch", size // 2
        advice = (
            "a validation buffer keeps instances by the first dimension of every tensor. Give the batch first "
            "(transpose inside the model), keep what is shared by all instances (a mask) inside the model, or pass "
            "validation="
        )
        arguments, own_targets = first_half(call.arguments, targets)

    def run() -> Tensor:
        with torch.no_grad(), preserved_randomness(device_of(r.network)):
            return r.criterion_of_training(select(r.network(*arguments[0], **arguments[1])), own_targets)

    modules = (r.network, *r.criterion_of_training.modules)
    with_hooks = (False, True) if observed(modules) else (False,)
    for observers in with_hooks:  # the user's only where the model needs them
        try:
            found = len(run_apart(modules, [], [], run, observers=observers))
            break
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if observers == with_hooks[-1]:
                raise ValueError(f"the model does not take {what} ({error}); {advice}") from error
    if found != (found if expected is None else expected):
        raise ValueError(f"{what} gave {found} losses, not {expected}; {advice}")
    r.batch_checked = True

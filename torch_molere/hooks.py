"""Hooks on model and optimizers: which call a loss is of, which losses a step is made of, and when it has been made."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_molere.core import Core
from torch_molere.distributed import fsdp
from torch_molere.hypergradients.check import EngineChoice
from torch_molere.hypergradients.functional import Call, apart
from torch_molere.hypergradients.update import overflowed, parameters_of, refuse_sparse
from torch_molere.messages import say_end
from torch_molere.plan import MetaUpdate, Plan
from torch_molere.result import Tally
from torch_molere.step import after_step, before_step

logger = logging.getLogger("torch_molere")

CALLS = 16
"""How many calls of the model are remembered until one of them gets its loss."""

_ATTACHED: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and ``torch.compile``: what is evaluated aside from training."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


class Attachment:
    """What happens to a model and its optimizers between a forward and the step that follows it.

    A loss becomes part of the next step when its backward has reached a parameter's ``.grad``, and is dropped when
    these gradients are. Everything is held until the optimizer has stepped, and then committed.

    Args:
        owner: a reweighter; held weakly.
        model: as the loop calls it.
        modules: whose state a call is repeated from.
        device: where the model lies.
        optimizers: as PyTorch's own classes.
    """

    def __init__(
        self,
        owner: Core,
        model: nn.Module,
        modules: Sequence[nn.Module],
        device: torch.device,
        optimizers: Sequence[Optimizer],
    ) -> None:
        for optimizer in optimizers:
            reference = _ATTACHED.get(optimizer)
            other = None if reference is None else reference()
            if other is not None:
                logger.warning("optimizer had a MetaReweighter already; that one is closed, this one takes its place")
                other.close()
            _ATTACHED[optimizer] = weakref.ref(owner)
        self._owner = weakref.ref(owner)
        self._modules = modules
        self._device = device
        self._optimizers = optimizers
        self._open: list[Call] = []
        self.calls: list[Call] = []  # that may still get a loss
        self.active: list[Plan] = []  # that the next step is made of
        self._raw: list[tuple[Tensor, Tensor | None]] | None = None  # the gradients as backward left them
        self._watched = 0
        self._first = True
        self._task = self._other_task = -1  # the backward that is running
        self._listening: list[RemovableHandle] = []
        self._awaited: dict[Optimizer, list[tuple[Tensor, Tensor | None]]] = {}  # whose step was looked ahead at
        self._reached: list[tuple[Plan, Tensor]] = []  # the losses that it has come through
        self._before: list[tuple[Tensor, Tensor | None, int]] = []  # gradients and their versions when it came
        self._fresh = True  # there was no gradient then
        self._stepping: tuple[Optimizer, list[Plan], MetaUpdate | None] | None = None
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_ModelHook(self._called), with_kwargs=True),
            model.register_forward_hook(_ModelHook(self._returned), with_kwargs=True),
        ]
        for optimizer in optimizers:
            self.handles.append(optimizer.register_step_pre_hook(_weakly(self._before_step)))
            self.handles.append(optimizer.register_step_post_hook(_weakly(self._after_step)))

    # Forward: remember the calls.

    def _called(self, model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        owner = self._owner()
        if apart.active or owner is None or not torch.is_grad_enabled() or _is_traced():
            return
        if len(self._open) >= CALLS:
            self._open.clear()  # of forwards that failed
        repeatable = owner.checking or owner.meta_update_is_due
        self._open.append(Call(model, self._device, (positional, named), self._modules if repeatable else None))

    def _returned(self, model: nn.Module, positional: Any, named: Any, outputs: Any) -> None:
        if apart.active or not self._open or not torch.is_grad_enabled() or _is_traced():
            return
        call = self._open.pop()
        call.returned(outputs)
        self.calls = [earlier for earlier in self.calls[-CALLS:] if earlier.alive] + [call]

    def call_of(self, outputs: Any) -> tuple[Call, Callable[[Any], Any]]:
        """The call that returned ``outputs``, and what takes them out of all that it returned.

        Raises:
            RuntimeError: if no call did.
        """
        for call in reversed(self.calls):
            select = call.selection(outputs)
            if select is not None:
                return call, select
        raise RuntimeError(
            "outputs are not what a call of the model returned: loss(outputs, targets) must see how they were made to "
            "make them again. Call the very object that MetaReweighter was given (the compiled or DDP-wrapped one, if "
            "you call that), with gradients on, and pass its outputs, or some of them, as they are; what is done to "
            "them before the criterion (log_softmax, squeeze, view) belongs into loss_fn, and a forward hook that "
            "changes them must be registered before the MetaReweighter is made"
        )

    # Backward: which losses have reached the gradients.

    def watch(self, plan: Plan, loss: Tensor) -> None:
        """Let a loss become part of the next step once its backward has reached a gradient."""
        self._watched += 1
        plan.number = self._watched
        loss.register_hook(lambda gradient: self._loss_reached(plan, gradient))
        if plan.replay is not None and not self._listening:
            listen = _weakly(self._accumulated)
            leaves = [p for p in self._parameters() if p.requires_grad]
            self._listening = [p.register_post_accumulate_grad_hook(listen) for p in leaves]

    def _loss_reached(self, plan: Plan, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._reached = task, []
            self._before = _versions(self._parameters())
            self._fresh = not self.accumulating()
            queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
            # Once more from inside, so that it comes after the callbacks of DDP and FSDP.
            queue(lambda: queue(self._backward_ended))
        self._reached.append((plan, gradient.detach()))

    def _backward_ended(self) -> None:
        reached, self._reached, self._task = self._reached, [], -1
        before, self._before = self._before, []
        if not _changed(before):
            return  # autograd.grad, which leaves .grad alone
        owner = self._owner()
        if owner is None:
            return
        if self._fresh:
            self.active = []  # of a step that was given up: its gradients are gone
        for plan, scale in reached:
            plan.scale = plan.scale + scale if any(plan is other for other in self.active) else scale
            if not any(plan is other for other in self.active):
                self.active.append(plan)
        self.active.sort(key=lambda plan: plan.number)  # backward comes through the last one first
        self._keep_gradients()

    def _accumulated(self, parameter: Tensor) -> None:
        """A backward has reached a gradient: of another term of the loss perhaps, in a backward of its own."""
        task = torch._C._current_graph_task_id()
        if task not in (self._task, self._other_task):
            self._other_task = task
            queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
            queue(lambda: queue(self._keep_gradients))

    def _keep_gradients(self) -> None:
        if any(plan.replay is not None for plan in self.active):
            self._raw = _copies(self._parameters())

    def accumulating(self) -> bool:
        """Whether there are gradients of losses that no step has used yet."""
        return bool(self.active) and any(p.grad is not None and bool(p.grad.any()) for p in self._parameters())

    def _parameters(self) -> list[Tensor]:
        return parameters_of(*self._optimizers)

    # Step: differentiate before it, commit after it.

    def _before_step(
        self, optimizer: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A closure is called here, once, as these optimizers do; the step gets one that returns its loss."""
        owner = self._owner()
        if owner is None:
            return None
        closures = [a for a in (*positional, *named.values()) if a is not optimizer and a is not None]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        if closures:
            with torch.enable_grad():
                loss = closures[0]()
            arguments = (optimizer, lambda: loss), {}
        plans, raw = self.active, self._raw
        if plans and self._first:
            self._first = False
            refuse_sparse(p.grad for p in parameters_of(optimizer))
        if plans and self._awaited:
            self._awaited = {}
            owner.messages.once(
                "unstepped",
                "a meta-update looked ahead at one step of every optimizer, but not all of them have stepped since: "
                "give MetaReweighter those that always step together",
            )
        awaited = self._awaited.pop(optimizer, [])
        rescaled = bool(awaited) and getattr(optimizer, "grad_scale", None) is not None
        if not plans and (rescaled or not all(_equal(p.grad, gradient) for p, gradient in awaited)):
            raise RuntimeError(
                "gradients of one optimizer changed after another one had stepped, which had looked ahead at both: "
                "clip and unscale those of all optimizers (scaler.unscale_(optimizer) for each) before the first "
                "of them steps"
            )
        self.forget(calls=False)
        if plans and not overflowed(optimizer):
            update = before_step(owner, plans, raw)
            self._stepping = optimizer, plans, update
            if update is not None:
                others = [other for other in self._optimizers if other is not optimizer]
                self._awaited = {other: _copies(parameters_of(other)) for other in others}
        return arguments

    def _after_step(self, optimizer: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._stepping is None or self._stepping[0] is not optimizer:
            return
        (_, plans, update), self._stepping, self.calls = self._stepping, None, []
        owner = self._owner()
        if owner is not None:
            after_step(owner, plans, update)

    def forget(self, calls: bool = True) -> None:
        """Drop every pending loss, and the calls that may get one."""
        for handle in self._listening:
            handle.remove()
        self.active, self._raw, self._stepping, self._listening = [], None, None, []
        if calls:
            self.calls, self._open = [], []


def end(handles: Sequence[RemovableHandle], tally: Tally, engines: EngineChoice) -> None:
    """Take the hooks off, and say whether anything was done. What is given here must not hold the reweighter."""
    for handle in handles:
        handle.remove()
    say_end(tally, engines)


def _versions(parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None, int]]:
    """The gradients, and how often they were written to."""
    return [(p, p.grad, _version(p.grad)) for p in parameters]


def _copies(parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    return [(p, None if p.grad is None else p.grad.detach().clone()) for p in parameters]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and bool((a == b).all()))


def _changed(before: Sequence[tuple[Tensor, Tensor | None, int]]) -> bool:
    return any(p.grad is not g or _version(g) != version for p, g, version in before)


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else fsdp.local(gradient)._version  # a DTensor's own does not count


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on


def _is_traced() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class _ModelHook:
    """A hook on the model. Copies and pickles of the model carry one that does nothing."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *arguments: Any) -> None:
        if not _is_exporting():
            self._call(*arguments)

    @torch.compiler.disable  # a model that is compiled inside its hooks calls it between its graphs
    def _call(self, *arguments: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # which torch.jit.script asks for
            raise AttributeError(
                "torch.jit.script cannot take hooks of a MetaReweighter: call reweighter.close() first"
            )
        raise AttributeError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ModelHook:
        return _ModelHook()

    def __reduce__(self) -> tuple[type[_ModelHook], tuple[()]]:
        return _ModelHook, ()


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer hook that does not keep what it belongs to alive."""
    reference = weakref.WeakMethod(method)

    @torch.compiler.disable  # a compiled optimizer calls it between its graphs
    def hook(*arguments: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*arguments)

    return hook

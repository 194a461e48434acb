"""Running a model at other parameters, as one of its calls ran, without leaving a trace on it."""

from __future__ import annotations

import random
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from torch_molere.calls import Arguments, leaves_of, map_leaves, tensors_of
from torch_molere.distributed import fsdp
from torch_molere.hypergradients.precision import ACCELERATE, Autocast, own_forward
from torch_molere.hypergradients.update import refuse_sparse
from torch_molere.losses import PerSampleLoss

T = TypeVar("T")


@dataclass(frozen=True)
class RandomState:
    """The global random streams that a forward on one device may draw from: PyTorch's, NumPy's and Python's."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    numpy: Any
    python: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, accelerator, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Set the streams back to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


@contextmanager
def preserved_randomness(device: torch.device, start: RandomState | int | None = None) -> Iterator[None]:
    """Run a block from ``start`` (a state to replay, or a seed) and leave the global random streams as they were."""
    before = RandomState.now(device)
    try:
        if isinstance(start, RandomState):
            start.restore()
        elif start is not None:
            _seed_torch(device, start)
            np.random.seed(start % 2**32)
            random.seed(start)
        yield
    finally:
        before.restore()


@contextmanager
def own_stream(device: torch.device, seed: int) -> Iterator[None]:
    """Run a block that draws from PyTorch's stream alone from ``seed``, and leave the stream as it was."""
    cpu = torch.get_rng_state()
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        _seed_torch(device, seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if accelerator is not None:
            torch.cuda.set_rng_state(accelerator, device)


def _seed_torch(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, FunctionType))
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), lambda g, state: g.setstate(state)),
}
"""Generators of random numbers: how their state is read and set."""


class ModuleState:
    """What modules keep besides parameters: buffers and plain attributes (counters, hidden states, lists, generators).

    Looked into are modules, lists, dicts, sets, deques, tuples, namespaces and dataclasses. Of other objects it is
    known only which they are.

    Args:
        modules: with all that is in them.
        values: whether the values of tensors are kept too, as copies; else only which tensors they are.
    """

    def __init__(self, modules: Sequence[nn.Module], values: bool) -> None:
        # What can be written to, what was in it, and the keys of what can itself be written to or has such parts.
        self._places: list[tuple[Any, Any, list[Any]]] = []
        self._tensors: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._generators: list[tuple[Any, Any]] = []
        pending: list[Any] = list(modules)
        seen: set[int] = set()
        while pending:
            value = pending.pop()
            kind = type(value)
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if not (value.is_leaf and value.requires_grad):  # parameters are another matter
                    self._tensors[id(value)] = value, value.detach().clone() if values else None
            elif isinstance(value, nn.Module):
                attributes = vars(value)
                own = {name: attributes[name] for name in attributes if name not in _MODULE_ATTRIBUTES}
                pending += self._keep(attributes, own)
                pending += self._keep(value._buffers, value._buffers.copy())
                pending += value._modules.values()
            elif kind in _CONTAINERS:
                pending += self._keep(value, value.copy() if isinstance(value, dict) else list(value))
            elif kind is tuple:
                pending += value
            elif kind is SimpleNamespace or (is_dataclass(kind) and hasattr(value, "__dict__")):
                pending += self._keep(vars(value), vars(value).copy())
            elif kind in _GENERATORS:
                self._generators.append((value, _GENERATORS[kind][0](value)))

    def _keep(self, place: Any, content: Any) -> list[Any]:
        items = content.items() if isinstance(content, dict) else enumerate(content)
        keys = [key for key, item in items if not _is_plain(item)]
        self._places.append((place, content, keys))
        return [content[key] for key in keys]

    def apply(self) -> None:
        """Put all of it back: the same tensors, with their values where these are kept."""
        self._fill({})
        with torch.no_grad():
            for tensor, copy in self._tensors.values():
                if copy is not None:
                    tensor.copy_(copy)

    def stand_in(self) -> None:
        """The modules start from this state, with copies of the tensors, so that a forward leaves these alone."""
        self._fill(
            {
                number: (tensor if copy is None else copy).detach().clone()
                for number, (tensor, copy) in self._tensors.items()
            }
        )

    def _fill(self, copies: dict[int, Tensor]) -> None:
        for place, content, keys in self._places:
            if copies and keys:
                content = content.copy()
                for key in keys:
                    content[key] = _standing(content[key], copies)
            if isinstance(place, dict):
                _fill_dict(place, content)
            elif len(place) != len(content) or any(a is not b for a, b in zip(place, content, strict=True)):
                place.clear()
                (place.update if isinstance(place, set) else place.extend)(content)
        for generator, state in self._generators:
            _GENERATORS[type(generator)][1](generator, state)


def _fill_dict(place: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    """``place`` with what is ``wanted`` in it, in that order; ``vars`` of a module keep what every module has."""
    kept = _MODULE_ATTRIBUTES if "_parameters" in place else frozenset()
    for key in [key for key in place if key not in kept and key not in wanted]:
        del place[key]
    for key, value in wanted.items():
        if place.get(key, place) is not value:
            place[key] = value
    if not kept and any(a is not b for a, b in zip(place, wanted, strict=True)):
        place.clear()
        place.update(wanted)


def _is_plain(value: Any) -> bool:
    """Whether nothing can be written to it."""
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value))


def _standing(value: Any, copies: dict[int, Tensor]) -> Any:
    """``value`` with copies in place of tensors."""
    if type(value) is tuple and copies:
        items = tuple(_standing(item, copies) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return copies.get(id(value), value)


def all_modules(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Every module once."""
    seen: set[nn.Module] = set()
    for root in modules:
        yield from (module for module in root.modules() if not (module in seen or seen.add(module)))  # type: ignore[func-returns-value]


class _Apart(threading.local):
    """Whether this thread is in :func:`run_apart`: calls of the model are then not the user's."""

    active = False


apart = _Apart()


def run_apart(
    modules: Sequence[nn.Module],
    owners: Sequence[Tensor],
    values: Sequence[Tensor],
    run: Callable[[], T],
    start: ModuleState | None = None,
    observers: bool = True,
) -> T:
    """``run()`` while ``values`` stand where the parameters ``owners`` are, with a backward in ``run`` if it has one.

    Buffers and attributes start from ``start`` (None: as they are) and are put back, as the parameters are: the very
    same objects, whatever is raised, also by Ctrl-C.

    Args:
        modules: what ``run`` calls.
        owners: their parameters.
        values: one for each.
        run: is called once.
        start: where buffers and attributes start from.
        observers: whether the user's hooks of the modules run.
    """
    was_apart = apart.active
    if fsdp.any_sharded(owners):
        everything = ModuleState(modules, values=True)
        with fsdp.standing_in(modules[0], owners, values):
            try:
                apart.active = True
                if start is not None:
                    start.apply()
                return run()
            finally:
                apart.active = was_apart
                everything.apply()
    value_of = {id(owner): value for owner, value in zip(owners, values, strict=True)}
    places = [
        (module._parameters, name, parameter)
        for module in all_modules(modules)
        for name, parameter in module._parameters.items()
        if id(parameter) in value_of
    ]
    present = ModuleState(modules, values=False)
    silenced = [] if observers else [(hooks, dict(hooks)) for hooks in observed(modules)]

    def put_back() -> None:
        for hooks, own in silenced:
            hooks.clear()
            hooks.update(own)
        for parameters, name, parameter in places:
            parameters[name] = parameter
        present.apply()
        apart.active = was_apart

    try:
        apart.active = True
        for hooks, own in silenced:
            for number in [number for number, hook in own.items() if not _is_torchs(hook)]:
                del hooks[number]
        (start or present).stand_in()
        for parameters, name, parameter in places:
            parameters[name] = value_of[id(parameter)]  # type: ignore[assignment]
        return run()
    finally:
        try:
            put_back()
        except KeyboardInterrupt:
            put_back()
            raise


def keep_backward_buffers(model: nn.Module) -> None:
    """Let a compiled model's backward be run twice, as the check against reverse mode does.

    PyTorch's compiler reuses buffers of backward ("donated buffers") unless it is told not to, for the whole process.
    """
    modules = [model, *model.modules()]
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules):
        from torch._functorch import config

        config.donated_buffer = False  # type: ignore[attr-defined]


def gradients_apart(
    modules: Sequence[nn.Module],
    outputs: Any,
    inputs: Sequence[Tensor],
    along: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` through a graph that is kept; modules that checkpoints call again are left alone."""

    def run() -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                outputs, list(inputs), along, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
        )

    try:
        gradients = run_apart(modules, [], [], run)
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "the model was compiled so that its backward runs once, and the check against reverse mode runs it once "
            "more: give MetaReweighter the compiled model, or set torch._functorch.config.donated_buffer = False "
            "before its first call"
        ) from error
    refuse_sparse(gradients)
    return gradients


def reached_leaves(tensor: Tensor) -> set[int]:
    """The ids of the leaves that the graph of ``tensor`` leads to.

    Raises:
        RuntimeError: if it leads through a reentrant checkpoint, past which nothing can be asked for.
    """
    found: set[int] = set()
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(id(node.variable))  # type: ignore[attr-defined]
        elif node.name().startswith("CheckpointFunction"):  # PyTorch's, DeepSpeed's, Megatron's
            raise RuntimeError(
                "the model uses torch.utils.checkpoint(..., use_reentrant=True), through which no gradient can be "
                "asked for by itself; pass use_reentrant=False (in transformers: "
                "gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        pending += [following for following, _ in node.next_functions]
    return found


def observed(modules: Sequence[nn.Module]) -> list[dict[int, Any]]:
    """The hooks of modules that have some of the user's."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    found = [vars(module)[kind] for module in all_modules(modules) for kind in kinds]
    return [hooks for hooks in found if not all(_is_torchs(hook) for hook in hooks.values())]


def user_hooks(parameter: Tensor) -> list[Any]:
    """What runs inside backward once it has written to the parameter's ``.grad``."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if not _is_torchs(hook)]


def _is_torchs(hook: Any) -> bool:
    """Whether a hook is PyTorch's own (spectral norm, pruning) or this library's."""
    place = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return place.split(".")[0] in ("torch", "torch_molere")


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs, also those that are attributes of an object."""
    found: list[Tensor] = []
    for leaf in leaves_of(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += tensors_of(list(vars(leaf).values()))
    return found


class Call:
    """One call of the user's model, with what it takes to repeat it.

    Args:
        model: what was called.
        device: where it lies.
        arguments: what it was called with.
        modules: whose buffers and attributes a repetition starts from; None where it will not be repeated.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, arguments: Arguments, modules: Sequence[nn.Module] | None
    ) -> None:
        self.arguments = arguments
        self.autocast = Autocast.now(device)
        if modules is not None and ACCELERATE in vars(modules[0]):
            self.autocast = Autocast(True, self.autocast.dtype)
        self.random = None if modules is None else RandomState.now(device)
        self.state = None if modules is None else ModuleState(modules, values=True)
        self._versions = [(tensor, _version(tensor)) for tensor in tensors_of(arguments)]
        self._kind: type | None = None
        self._outputs: list[weakref.ref[Tensor]] = []

    @property
    def repeatable(self) -> bool:
        """Whether it kept what a repetition starts from."""
        return self.state is not None

    def returned(self, outputs: Any) -> None:
        """Note what it returned, weakly: a call whose outputs nobody holds will not be asked for."""
        self._kind = type(outputs)
        self._outputs = [weakref.ref(tensor) for tensor in output_tensors(outputs)]

    @property
    def alive(self) -> bool:
        """Whether somebody still holds its outputs."""
        return any(reference() is not None for reference in self._outputs)

    @property
    def edited(self) -> bool:
        """Whether a tensor that it was given has been written to since."""
        return any(_version(tensor) != version for tensor, version in self._versions)

    def selection(self, outputs: Any) -> Callable[[Any], Any] | None:
        """What takes ``outputs`` out of all that this call returns; None if they are not of this call."""
        place = {id(tensor): i for i, reference in enumerate(self._outputs) if (tensor := reference()) is not None}
        given = output_tensors(outputs)
        if not given or any(id(tensor) not in place for tensor in given):
            return None
        if type(outputs) is self._kind and len(given) == len(self._outputs):
            return _whole
        if any(not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__") for leaf in leaves_of(outputs)):
            return None
        where = map_leaves(lambda leaf: place[id(leaf)] if isinstance(leaf, Tensor) else None, outputs)
        if isinstance(outputs, Tensor):
            return lambda repeated: output_tensors(repeated)[where]

        def select(repeated: Any) -> Any:
            tensors = output_tensors(repeated)
            return map_leaves(lambda i: None if i is None else tensors[i], where)

        return select


def _whole(outputs: Any) -> Any:
    return outputs


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Replay:
    """A training forward that can be repeated at other parameters as it ran: on the same inputs, from the same random
    streams, buffers and attributes.

    Attributes:
        model: what is called: the user's module inside DDP and ``torch.compile``.
        criterion: its loss.
        call: the call to repeat.
        select: what the loss saw of what the call returned.
        targets: the targets.
        owners: the parameters.
        criterion_autocast: the precision that the criterion ran in.
        observers: whether the user's hooks run.
    """

    model: nn.Module
    criterion: PerSampleLoss
    call: Call
    select: Callable[[Any], Any]
    targets: Any
    owners: Sequence[Tensor]
    criterion_autocast: Autocast
    observers: bool = True

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.model, *self.criterion.modules)

    @property
    def has_observers(self) -> bool:
        """Whether a module has hooks of the user's."""
        return bool(observed(self.modules))

    @property
    def device(self) -> torch.device:
        assert self.call.random is not None
        return self.call.random.device

    def losses(self, values: Sequence[Tensor], *, as_called: bool = False) -> Tensor:
        """``(B,)`` losses at ``values``, one for each of the owners, in the parameters' own precision.

        Args:
            values: of the parameters.
            as_called: in the precision of the call, which autocast may have reduced.
        """
        positional, named = self.call.arguments

        def run() -> Tensor:
            with preserved_randomness(self.device, self.call.random):
                with self.call.autocast.on(self.device, as_called), own_forward(self.model, not as_called):
                    outputs = self.select(self.model(*positional, **named))
                with self.criterion_autocast.on(self.device, as_called):
                    return self.criterion(outputs, self.targets)

        return run_apart(self.modules, self.owners, values, run, self.call.state, self.observers)

"""The meta-optimisation of learned reweighting, around a user's own model, optimizer and loop."""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_molere.buffer import ValidationBuffer
from torch_molere.distributed import anywhere, averaged, broadcast, gathered, processes, sum_gradients
from torch_molere.engines import DirectionalDerivative
from torch_molere.evaluation import (
    Arguments,
    LossFn,
    RandomState,
    arguments_of,
    buffer_copies,
    cross_entropy,
    detached,
    device_of,
    per_sample_losses,
    preserved_randomness,
)
from torch_molere.history import SampleHistory
from torch_molere.holdout import HoldOut, HoldsOut
from torch_molere.hypergradients import (
    ENGINES,
    Engine,
    TrainingForward,
    ValidationGradient,
    check_unrollable,
    trained_parameters,
    unrolled,
    validation_gradient,
)
from torch_molere.journal import Journal
from torch_molere.layout import ChannelsLast
from torch_molere.samples import CorrectFn, Samples, default_correct
from torch_molere.sharded import check_sharded, check_synchronised
from torch_molere.splitting import LearnedSplitter
from torch_molere.states import finite_gradients, load_optimizer, whole
from torch_molere.update import Update, check_differentiable, inner_optimizer, overflowed, unscaled
from torch_molere.validation import FixedValidation
from torch_molere.weighting import SignalWeighting, normalised

logger = logging.getLogger("torch_molere")

Order = Literal["after", "before"]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]

STATE_VERSION = 1


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: scalar, the weighted training loss, detached.
        outputs: the model's outputs for the whole batch, detached (the ``.logits`` of an output object).
        weights: ``(B,)`` with mean one over the training side and 0 for instances held out of it.
        val_mask: ``(B,)`` bool, the instances sent to validation.
        val_loss: scalar, the mean validation loss (``val_loss_fn``) after the update, or None on steps without a
            meta-update.
    """

    loss: Tensor
    outputs: Any
    weights: Tensor
    val_mask: Tensor
    val_loss: Tensor | None


@dataclass(frozen=True)
class _Call:
    """A call of the user's model, with what it takes to repeat it exactly."""

    arguments: Arguments
    random_state: RandomState
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class _Weights:
    """Normalised weights of a batch, which processes that train together have in parts."""

    everyone: Tensor  # w̄ of all processes, of which the own ones have a graph to φ
    own: slice  # this process's
    count: int  # n, the size of the training side, of all processes

    @property
    def share(self) -> float:
        """What a process divides its sum by, so that the processes' mean is the mean of the batch."""
        return self.count / processes()


@dataclass
class _Weighted:
    """A weighted training loss handed out, between ``loss`` and the optimizer's step."""

    forward: TrainingForward
    samples: Samples
    weights: _Weights
    losses: Tensor  # ℓ(θ), (B,), detached
    scale: Tensor | float = 1.0  # d(what backward was called on) / d(this loss)


class MetaReweighter:
    """Learned reweighting of training instances by MOLERE (CVPR 2024) or against a fixed validation set.

    Give it your model and optimizer and call :meth:`step` where your loop did forward, backward and
    ``optimizer.step()``; or put :meth:`loss` where your ``criterion`` stood and keep the rest of your loop.

    Without ``validation=`` a splitter sends a fraction of each batch, the hardest instances, to a validation buffer
    (MOLERE); with it, your own batches are the validation set and every instance is trained on.

    Args:
        model: the classifier θ, any ``nn.Module``.
        optimizer: any optimizer of ``torch.optim`` with a ``differentiable`` flag that holds the model's parameters;
            Accelerate's and Lightning's wrappers of one are seen through.
        loss_fn: ``loss_fn(outputs, targets) -> (B,)`` per-sample losses; default cross-entropy.
        val_loss_fn: what φ is to make small on the validation set; default ``loss_fn``. Cross-entropy is unbounded: of
            a fitted classifier a few confidently wrong validation instances rule its gradient; of
            :func:`expected_error` they do not.
        weighting: the meta-network φ, ``forward(samples) -> (B,)`` weights ≥ 0; default :class:`SignalWeighting`.
        splitter: Θ, ``forward(samples) -> (B,)`` probabilities of the training side; default
            :class:`LearnedSplitter`. Not together with ``validation``.
        validation: an iterable of ``(inputs, targets)`` batches, cycled.
        hypergradient: the engine: ``"auto"`` takes the fastest that the model supports, which is a finite difference
            where its first result agrees with the exact one, and says which in the log; ``"forward"``, ``"finite"``
            and ``"unrolled"`` as in :func:`torch_molere.hypergradient`.
        order: ``"after"`` updates φ after the optimizer's step, which serves as the look-ahead; ``"before"`` takes a
            virtual look-ahead first, so that the new φ weighs this very batch, as in the paper, at a higher cost.
        val_fraction: δ, the share of the stream that the splitter sends to validation, in (0, 1).
        hold_out: whether instances sent to validation are left out of training. True: always, as in the paper, which
            costs accuracy where the classifier does not fit its training set; False: never, they have a weight like
            all others; ``"auto"``: from the moment the classifier overfits. That shows in the loss of a fifth of δ,
            chosen at random, which is left out all the time; it takes ``indices`` in the batches, and without them
            nothing is left out.
        every: Q, a meta-update at every Q-th step.
        warmup_steps: steps of plain training first, with a random split; the paper warms up for a quarter of training.
        val_batch_size: instances drawn from the buffer for a meta-update; default as many as the training batch has.
        buffer_size: the most instances the buffer holds, over all processes that train together.
        buffer_bytes: the most memory it takes, over all of them.
        weighting_lr, splitter_lr: learning rates of the default optimizers of φ and Θ (Adam).
        weighting_optimizer, splitter_optimizer: make another one from a list of parameters, for instance
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        correct_fn: ``correct_fn(outputs, targets) -> (B,)`` bool, the classifier is right; the default knows class
            indices and multi-label targets and otherwise asks whether the loss is at most the batch's median.
        scaler: the gradient scaler of a float16 loop of your own. An update that it skips is skipped here too.
        seed: of everything random here. The global random streams are neither read nor moved.

    A step that raises has not happened: parameters, buffers, gradients, the optimizer's and all other state and the
    random streams are as before it, and the next step works. In a loop of your own the same is true of :meth:`loss`
    (which takes back the forward, too) and of the meta-update inside ``optimizer.step()``. What your optimizer itself
    leaves half done when it fails is its own.

    Threads: reweighters of models of their own do not disturb each other, but PyTorch's random stream is one for the
    process, and a step borrows it. With other threads that draw from it (dropout, a random split without ``indices``)
    nothing is repeatable, and the stream is not left as it was. Use processes there.

    Attributes:
        result: the latest step's :class:`StepResult`, or None.
        history: the :class:`~torch_molere.history.SampleHistory` of rows that came with ``indices``: which are hard.
        steps: optimizer steps so far.
        weighting, splitter, buffer, validation: φ, Θ, and where validation instances come from.

    Raises:
        TypeError: for a model, optimizer or callable of another kind, or an optimizer that cannot be differentiated.
        ValueError: for an argument out of its range, or an optimizer that holds none of the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss_fn: LossFn | None = None,
        val_loss_fn: LossFn | None = None,
        weighting: nn.Module | None = None,
        splitter: nn.Module | None = None,
        validation: Iterable[Any] | None = None,
        hypergradient: Engine = "auto",
        order: Order = "after",
        val_fraction: float = 0.1,
        hold_out: HoldsOut = "auto",
        every: int = 5,
        warmup_steps: int = 500,
        val_batch_size: int | None = None,
        buffer_size: int = 2048,
        buffer_bytes: int = 256 * 2**20,
        weighting_lr: float = 1e-4,
        splitter_lr: float = 1e-3,
        weighting_optimizer: OptimizerFactory | None = None,
        splitter_optimizer: OptimizerFactory | None = None,
        correct_fn: CorrectFn | None = None,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, module in (("weighting", weighting), ("splitter", splitter)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        for name, function in (("loss_fn", loss_fn), ("val_loss_fn", val_loss_fn), ("correct_fn", correct_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if splitter is not None and validation is not None:
            raise ValueError("splitter and validation exclude each other: a fixed validation set needs no splitter")
        if hypergradient not in ENGINES:
            raise ValueError(f"hypergradient must be one of {ENGINES}, got {hypergradient!r}")
        if order not in ("after", "before"):
            raise ValueError(f"order must be 'after' or 'before', got {order!r}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie in (0, 1), got {val_fraction}")
        if not isinstance(hold_out, bool) and hold_out != "auto":
            raise ValueError(f"hold_out must be True, False or 'auto', got {hold_out!r}")
        _check_count("every", every, 1)
        _check_count("warmup_steps", warmup_steps, 0)
        if val_batch_size is not None:
            _check_count("val_batch_size", val_batch_size, 1)
        _check_count("seed", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {seed}")
        scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler  # Accelerate's wrapper has it
        optimizer = inner_optimizer(optimizer)
        trained_parameters(model, optimizer)
        check_differentiable(optimizer)
        check_sharded(model, hypergradient, order)
        if hypergradient == "unrolled":
            check_unrollable(optimizer)

        self.model = model
        self._network = _unwrapped(model)
        self.optimizer = optimizer
        self.loss_fn = cross_entropy if loss_fn is None else loss_fn
        self.val_loss_fn = self.loss_fn if val_loss_fn is None else val_loss_fn
        self.correct_fn = correct_fn
        self.scaler = scaler
        self.order = order
        self.every = every
        self.warmup_steps = warmup_steps
        self.val_batch_size = val_batch_size
        self.seed = seed
        self.steps = 0
        self.result: StepResult | None = None
        self._journal = Journal()
        self.history = SampleHistory(self._journal)

        device = device_of(model)
        self.holdout: HoldOut | None = None
        self.validation: FixedValidation | None = None
        with preserved_randomness(device, seed):
            self.weighting = (SignalWeighting() if weighting is None else weighting).to(device)
            self.weighting_optimizer = _optimizer_of(self.weighting, weighting_optimizer, weighting_lr)
            if validation is None:
                splitter = (LearnedSplitter() if splitter is None else splitter).to(device)
                buffer = ValidationBuffer(buffer_size, buffer_bytes, seed, self._journal)
                theta_optimizer = _optimizer_of(splitter, splitter_optimizer, splitter_lr)
                self.holdout = HoldOut(splitter, theta_optimizer, buffer, val_fraction, seed, hold_out, self._journal)
            else:
                self.validation = FixedValidation(validation, device, seed)
        self._configuration = {
            "hypergradient": hypergradient,
            "order": order,
            "every": every,
            "warmup_steps": warmup_steps,
            "val_batch_size": val_batch_size,
            "weighting": type(self.weighting).__name__,
            "splitter": None if self.holdout is None else type(self.holdout.splitter).__name__,
            "validation": "buffer" if self.holdout is not None else "fixed",
            "val_fraction": None if self.holdout is None else val_fraction,
            "hold_out": None if self.holdout is None else hold_out,
        }

        self._directional_derivative = DirectionalDerivative(hypergradient)
        self._channels_last = ChannelsLast()
        self._draws = 0  # how many random states were taken from the seed
        self._alike = False  # whether φ and Θ are known to be the same in every process
        self._observing = True
        self._call: _Call | None = None
        self._weighted: list[_Weighted] = []  # that the gradients of the next update come from
        self._said: set[str] = set()
        hooks = [
            model.register_forward_pre_hook(_Recorder(self), with_kwargs=True),
            optimizer.register_step_pre_hook(_weakly(self._before_update)),
            optimizer.register_step_post_hook(_weakly(self._after_update)),
        ]
        # Hooks hold this object weakly: one that is closed or let go of leaves nothing behind.
        self._detach = weakref.finalize(self, _remove, hooks)

    # What users call.

    def step(self, batch: Any) -> StepResult:
        """Forward, weight, backward, update, and a meta-update where one is due.

        Args:
            batch: ``(inputs, targets)`` or ``(inputs, targets, indices)``, on the model's device; inputs a tensor, a
                tuple (``model(*inputs)``) or a dict (``model(**inputs)``); indices ``(B,)`` integers, each instance's
                row in its dataset: with them an instance stays on its side across epochs.

        Returns:
            A :class:`StepResult`.

        Raises:
            TypeError, ValueError: for a batch of another form, or losses of another shape than ``(B,)``.
            FloatingPointError: if a loss is NaN or infinite; names the rows. Nothing has changed then.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise TypeError(
                "batch must be (inputs, targets) or (inputs, targets, indices), got "
                + (f"{len(batch)} elements" if isinstance(batch, (tuple, list)) else type(batch).__name__)
            )
        positional, named = arguments_of(batch[0])
        with self._all_or_nothing():
            with torch.enable_grad():
                self._call = None
                self._keep_gradients()
                self.optimizer.zero_grad()
                loss = self.loss(self.model(*positional, **named), *batch[1:])
                loss.backward()
            self.optimizer.step()
        assert self.result is not None
        return self.result

    def loss(self, outputs: Any, targets: Any, indices: Tensor | None = None) -> Tensor:
        """The weighted training loss, in place of ``criterion(outputs, targets)`` in a loop of your own.

        The meta-update runs inside ``optimizer.step()``. Where gradients are off (an evaluation loop) this is the
        plain mean loss and nothing else happens. After ``optimizer.step()`` the step's details are in :attr:`result`.

        Args:
            outputs: what the model returned for its latest batch.
            targets: its targets.
            indices: its rows in the dataset, optional.

        Returns:
            A scalar to call ``backward`` on.

        Raises:
            As :meth:`step`; RuntimeError if ``model`` has not been called since the last loss.
        """
        if not torch.is_grad_enabled():
            return per_sample_losses(self.loss_fn, outputs, targets).mean()
        call, self._call = self._call, None
        if call is None:
            raise RuntimeError("loss(outputs, targets) needs outputs of a call of the model made since the last loss")
        with self._all_or_nothing():
            self._journal.note(self._undo, call)
            losses = per_sample_losses(self.loss_fn, outputs, targets)
            return self._weighted_loss(call, outputs, targets, losses, indices)

    @property
    def engine(self) -> Engine:
        """The hypergradient engine in use; ``"auto"`` until the first meta-update has chosen one."""
        return self._directional_derivative.engine

    @property
    def splitter(self) -> nn.Module | None:
        """Θ, or None with a fixed validation set."""
        return None if self.holdout is None else self.holdout.splitter

    @property
    def buffer(self) -> ValidationBuffer | None:
        """The splitter-managed validation buffer, or None with a fixed validation set."""
        return None if self.holdout is None else self.holdout.buffer

    @property
    def holding_out(self) -> bool:
        """Whether validation instances are left out of training at present; never with a fixed validation set."""
        return self.holdout is not None and self.holdout.holding_out

    @property
    def warming_up(self) -> bool:
        """Whether the next step still is one of plain training with a random split."""
        return self.steps < self.warmup_steps

    def state_dict(self) -> dict[str, Any]:
        """Everything but the classifier and its optimizer: φ, Θ, their optimizers, the buffer, counters, generators.

        Take it between steps. ``torch.load(..., weights_only=True)`` reads it.
        """
        return {
            "version": STATE_VERSION,
            "configuration": dict(self._configuration),
            "seed": self.seed,
            "steps": self.steps,
            "draws": self._draws,
            "engine": self._directional_derivative.state_dict(),
            "channels_last": self._channels_last.state_dict(),
            "weighting": self.weighting.state_dict(),
            "weighting_optimizer": None if self.weighting_optimizer is None else self.weighting_optimizer.state_dict(),
            "holdout": None if self.holdout is None else self.holdout.state_dict(),
            "validation": None if self.validation is None else self.validation.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave, in a reweighter made with the same arguments.

        Raises:
            ValueError: if ``state`` is of another kind, version or configuration, or does not fit the networks; names
                what differs. Nothing has changed then.
        """
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        if type(found) is not int or found != STATE_VERSION:
            raise ValueError(f"state_dict must be one of MetaReweighter, version {STATE_VERSION}, got {found!r}")
        theirs = state.get("configuration")
        if not isinstance(theirs, dict):
            raise ValueError(f"state_dict must have a configuration, got {theirs!r:.60}")
        different = [
            f"{name}={theirs.get(name)!r:.60} (here {mine!r})"
            for name, mine in self._configuration.items()
            if type(theirs.get(name)) is not type(mine) or theirs.get(name) != mine
        ]
        if different:
            raise ValueError(
                f"state_dict is of another configuration: {', '.join(different)}; make the reweighter with the same "
                "arguments before loading"
            )
        present = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except Exception as error:
            self._load(present)
            cause = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"state_dict does not fit this reweighter: {cause}") from error
        self._weighted, self._call = [], None

    def _load(self, state: dict[str, Any]) -> None:
        self.weighting.load_state_dict(state["weighting"])
        load_optimizer(self.weighting_optimizer, state["weighting_optimizer"])
        if self.holdout is not None:
            self.holdout.load_state_dict(state["holdout"], device_of(self.model))
        if self.validation is not None:
            self.validation.load_state_dict(state["validation"])
        self.history.load_state_dict(state["history"], device_of(self.model))
        self._directional_derivative.load_state_dict(state["engine"])
        self._channels_last.load_state_dict(state["channels_last"])
        self.seed, self.steps, self._draws = (whole(state[name], name) for name in ("seed", "steps", "draws"))

    def close(self) -> None:
        """Take the hooks off model and optimizer; both are then as if they had never been wrapped.

        A reweighter that nothing refers to any more does so by itself.
        """
        self._detach()
        self._weighted, self._call = [], None

    def __enter__(self) -> MetaReweighter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "MetaReweighter is tied to its model's and optimizer's hooks and cannot be copied or pickled; "
            "save state_dict() and load it into a new MetaReweighter(model, optimizer)"
        )

    # Before the update: split and weigh.

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Keeps what a step or a loss may change of this object itself; the rest is noted where it is changed."""
        inside_another = self._journal.recording
        with self._journal.all_or_nothing():
            if not inside_another:
                self._journal.keep(self, "result", "_draws", "_call", "_weighted")
                self._journal.keep(self._directional_derivative, "engine", "repeatable")
                self._journal.keep(self._channels_last, "chosen", "modes")
                self._weighted = list(self._weighted)
                networks = [self.weighting] if self.splitter is None else [self.weighting, self.splitter]
                self._journal.keep_tensors([buffer for network in networks for buffer in network.buffers()])
            yield

    def _keep_gradients(self) -> None:
        """As copies made before the forward: held where the last backward left them, among what were its activations,
        they would break up the memory that the next activations go to."""
        held = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        for parameter in {*held, *self._network.parameters()}:  # backward adds to those that the optimizer leaves alone
            gradient = parameter.grad
            self._journal.note(setattr, parameter, "grad", None if gradient is None else gradient.clone())

    def _record_call(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._observing and torch.is_grad_enabled():
            self._call = _Call(
                (positional, named), RandomState.now(device_of(self._network)), buffer_copies(self._network)
            )
            self._journal.note(self._undo, self._call)

    def _undo(self, call: _Call) -> None:
        """Take back what a call of the model changed."""
        with torch.no_grad():
            for name, buffer in self._network.named_buffers():
                buffer.copy_(call.buffers[name])
        call.random_state.restore()

    def _weighted_loss(self, call: _Call, outputs: Any, targets: Any, losses: Tensor, indices: Tensor | None) -> Tensor:
        size = losses.shape[0]
        if size == 0:
            raise ValueError("batch must have at least one instance, got none")
        check_synchronised(self._network)
        self._make_alike()
        samples = self._samples(call.arguments, outputs, targets, losses.detach(), _checked_indices(indices, losses))
        due = (self.steps - self.warmup_steps) % self.every == 0
        meta = due and not self.warming_up
        p: list[Tensor] = []
        if self.holdout is not None:
            with self._aside(losses.device):
                p = self.holdout.probabilities(samples, self.warming_up)
        raw = self._raw_weights(samples, graph=meta)
        # All that a step without a meta-update waits for (signals of classes, which are checked first, aside).
        given, *split = samples.read(raw, *p)
        _check_values(samples)
        _check_weights(given)
        sent: list[int] = []
        left_out: list[int] = []
        if self.holdout is not None:
            choice = self.holdout.choose(samples, *split)
            sent, left_out = choice.validation, self.holdout.left_out(choice)
            self.holdout.put(samples, choice)
            self.holdout.observe(samples, choice, self.steps, decide=due)
        weights = _normalised(raw, left_out, samples)
        weighted: _Weighted | None = None
        val_loss: Tensor | None = None
        if meta:
            forward = TrainingForward(
                self._network, self.loss_fn, call.arguments, targets, call.random_state, call.buffers
            )
            weighted = _Weighted(forward, samples, weights, losses.detach())
            if self.order == "before":
                val_loss = self._meta_update([weighted], self._virtual_gradients(losses, weights))
                raw = self._raw_weights(samples, graph=False)
                _check_weights(raw.tolist())
                weights = _normalised(raw, left_out, samples)
        loss, own = _weighted_mean(losses, weights)
        if weighted is not None and self.order == "after":
            loss.register_hook(partial(self._backward_through, weighted))
        val_mask = _mask(sent, samples)
        weighed = torch.zeros_like(val_mask) if self.warming_up else ~_mask(left_out, samples)
        self.history.record(samples, own, val_mask, weighed)
        self.result = StepResult(loss.detach(), samples.outputs, own, val_mask, val_loss)
        return loss

    def _make_alike(self) -> None:
        """Every process starts from the first one's φ and Θ."""
        if not self._alike:
            broadcast(self.weighting)
            if self.holdout is not None:
                broadcast(self.holdout.splitter)
            self._alike = True

    def _samples(
        self, arguments: Arguments, outputs: Any, targets: Any, losses: Tensor, indices: Tensor | None = None
    ) -> Samples:
        outputs = detached(outputs)
        if self.correct_fn is None:
            correct = default_correct(outputs, targets, losses)
        else:
            correct = self.correct_fn(outputs, targets)
            if not isinstance(correct, Tensor) or correct.shape != losses.shape or correct.dtype != torch.bool:
                found = f"{tuple(correct.shape)} {correct.dtype}" if isinstance(correct, Tensor) else repr(correct)
                raise ValueError(f"correct_fn must return ({losses.shape[0]},) bool, got {found}")
        return Samples(arguments, targets, outputs, losses, correct, indices)

    def _raw_weights(self, samples: Samples, graph: bool) -> Tensor:
        """``(B,)`` w as φ gives them, with their graph to it if asked for; one each during warm-up."""
        if self.warming_up:
            return torch.ones_like(samples.losses)
        with torch.set_grad_enabled(graph), self._aside(samples.losses.device):
            weights = self.weighting(samples)
        size = samples.losses.shape[0]
        if not isinstance(weights, Tensor) or weights.shape != (size,):
            found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weighting must return ({size},) weights, got {found}")
        return weights

    @contextmanager
    def _aside(self, device: torch.device) -> Iterator[None]:
        """Run φ or Θ on random numbers of their own, in full precision."""
        with preserved_randomness(device, self._next_seed()), torch.autocast(device.type, enabled=False):
            yield

    def _next_seed(self) -> int:
        self._draws += 1
        return (self.seed * 1_000_003 + self._draws) % 2**63

    # Around the update: the meta-gradient.

    def _backward_through(self, weighted: _Weighted, gradient: Tensor) -> None:
        """Hook of a loss: it is part of the next update from now on, and alone so where there are no gradients yet."""
        if self._weighted and not any(
            p.grad is not None and bool(p.grad.any()) for group in self.optimizer.param_groups for p in group["params"]
        ):
            self._weighted = []  # of an update that was skipped
        # A scaler takes its factor out of the gradients before the optimizer sees them.
        weighted.scale = gradient.detach() / (1.0 if self.scaler is None else self.scaler.get_scale())
        self._weighted.append(weighted)

    def _before_update(
        self, optimizer: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The "after" order: the step about to be taken is the look-ahead.

        A closure is called here, once, as these optimizers do themselves, and the step gets one that returns its loss.
        If this fails nothing has changed, and the step can be taken without a meta-update.
        """
        if overflowed(optimizer):
            return None
        closures = [a for a in (*positional, *named.values()) if a is not optimizer and a is not None]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        if closures:
            with torch.enable_grad():
                loss = closures[0]()
            arguments = (optimizer, lambda: loss), {}
        weighted, self._weighted = self._weighted, []
        if weighted and self.result is not None:
            with self._all_or_nothing():
                gradients = [p.grad for p in trained_parameters(self._network, optimizer).values()]
                val_loss = self._meta_update(weighted, unscaled(optimizer, gradients))
                self.result = replace(self.result, val_loss=val_loss)
        return arguments

    def _after_update(self, optimizer: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if overflowed(optimizer):
            return
        self.steps += 1
        self._journal.commit()  # θ has moved

    def _virtual_gradients(self, losses: Tensor, weights: _Weights) -> Sequence[Tensor | None]:
        """The "before" order: the gradients of a step with the present φ, which will not be taken."""
        parameters = trained_parameters(self._network, self.optimizer)
        loss, _ = _weighted_mean(losses, weights)
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        return averaged(gradients, 1.0 / processes())

    def _meta_update(self, weighted: list[_Weighted], gradients: Sequence[Tensor | None]) -> Tensor | None:
        """One step of φ and Θ against L_val(θ⁺), which it returns; None where there is nothing to validate on."""
        drawn = self._draw_validation(weighted[0].samples.losses.shape[0])
        if anywhere(drawn is None, device_of(self._network)) or drawn is None:
            self._say(
                "empty",
                "no meta-update: the validation buffer holds fewer than two instances so far. It fills at val_fraction "
                "of each batch, and one instance always stays on the training side, so batches of one never fill it; "
                "raise warmup_steps, use larger batches and a buffer_size of at least 2, or pass validation=",
            )
            return None
        batch, slots = drawn
        seed = self._next_seed()
        with self._unobserved():
            held = trained_parameters(self._network, self.optimizer)
            parameters = {name: parameter.detach() for name, parameter in held.items()}
            update = Update(self.optimizer, list(held.values()), gradients)
            after = dict(zip(parameters, update.look_ahead(), strict=True))
            in_channels_last = self._channels_last.serves(self._network, self.val_loss_fn, batch, after, seed)
            validation = validation_gradient(
                self._network,
                self.val_loss_fn,
                batch,
                after,
                seed,
                splitter_loss_fn=self.loss_fn,
                in_channels_last=in_channels_last,
            )
            del after  # its memory serves what follows
            if self.engine == "unrolled":
                derivatives = [self._unrolled(weighted, batch, seed)]
            else:
                u = dict(zip(parameters, update.transpose(validation.gradients), strict=True))
                forwards = [replace(w.forward, in_channels_last=in_channels_last) for w in weighted]
                derivatives = [
                    self._directional_derivative(forward, parameters, u, w.losses) / w.weights.count * w.scale
                    for w, forward in zip(weighted, forwards, strict=True)
                ]
            derivatives = [gathered(derivative)[0] for derivative in derivatives]
        val_loss = validation.mean
        if bool(torch.isfinite(torch.stack([val_loss, *(d.sum() for d in derivatives)])).all()):
            self._learn(weighted, derivatives, validation, batch, slots)
        else:
            self._say("nonfinite", "skipped a meta-update: the validation loss or its gradient is not finite")
        return val_loss

    def _draw_validation(self, batch_size: int) -> tuple[tuple[Arguments, Any], list[int]] | None:
        if self.validation is not None:
            self._journal.note(self.validation.load_state_dict, self.validation.state_dict())
            return self.validation.draw(), []
        assert self.holdout is not None
        return self.holdout.draw(self.val_batch_size or batch_size)

    def _unrolled(self, weighted: list[_Weighted], validation: tuple[Arguments, Any], seed: int) -> Tensor:
        if len(weighted) > 1:
            raise RuntimeError(
                f"hypergradient='unrolled' takes one loss for each optimizer step, got {len(weighted)}; "
                "use 'forward' or 'finite' to accumulate gradients"
            )
        if processes() > 1:
            raise RuntimeError("hypergradient='unrolled' knows one process; use 'forward' or 'finite'")
        # higher's loss is a mean over all B instances, ours over the n of the training side.
        weights = weighted[0].weights
        ratio = len(weights.everyone) / weights.count
        raw = ratio * weights.everyone.detach()
        return ratio * unrolled(
            weighted[0].forward, self.optimizer, validation, raw, seed=seed, val_loss_fn=self.val_loss_fn
        )

    def _learn(
        self,
        weighted: list[_Weighted],
        derivatives: list[Tensor],
        validation: ValidationGradient,
        batch: tuple[Arguments, Any],
        slots: list[int],
    ) -> None:
        """A step of φ and a step of Θ; all gradients are taken before anything moves."""
        if self.weighting_optimizer is not None:
            self._journal.keep_network(self.weighting, self.weighting_optimizer)
            self.weighting_optimizer.zero_grad()
            for w, derivative in zip(weighted, derivatives, strict=True):
                w.weights.everyone.backward(gradient=derivative.to(w.weights.everyone.dtype))
            sum_gradients(self.weighting)
        if self.holdout is not None:
            arguments, targets = batch
            held = self._samples(arguments, validation.outputs, targets, validation.losses)
            with self._aside(validation.losses.device):
                self.holdout.learn(held, weighted[0].samples, slots)
        if self.weighting_optimizer is not None:
            if finite_gradients(self.weighting):
                self.weighting_optimizer.step()
            else:
                self._say("nonfinite", "skipped a meta-update: the weighting's gradient is not finite")
            self.weighting_optimizer.zero_grad()

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        """Calls of the model inside are the reweighter's own."""
        self._observing = False
        try:
            yield
        finally:
            self._observing = True

    def _say(self, topic: str, message: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            logger.warning(message)


def _mask(positions: list[int], samples: Samples) -> Tensor:
    """``(B,)`` bool, true at the positions; made here and sent, so that the device is not waited for."""
    mask = torch.zeros(samples.losses.shape[0], dtype=torch.bool)
    mask[positions] = True
    return mask.to(samples.losses.device, non_blocking=True)


def _normalised(raw: Tensor, left_out: list[int], samples: Samples) -> _Weights:
    """w̄ of what φ gave, over the training sides of all processes; zero where left out."""
    training = ~_mask(left_out, samples) if left_out else None
    if processes() == 1:
        return _Weights(normalised(raw, training), slice(0, len(raw)), len(raw) - len(left_out))
    mask = torch.ones_like(raw) if training is None else training.to(raw.dtype)
    both, own = gathered(torch.stack([raw, mask], dim=1))
    return _Weights(normalised(both[:, 0], both[:, 1].bool()), own, int(both[:, 1].sum()))


def _weighted_mean(losses: Tensor, weights: _Weights) -> tuple[Tensor, Tensor]:
    """The weighted training loss, and the weights of this process's instances."""
    own = weights.everyone[weights.own].detach().to(losses.dtype)
    return (own * losses).sum() / weights.share, own


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and ``torch.compile``: what is evaluated aside from training."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


class _Recorder:
    """The forward pre-hook. Copies and pickles of the model carry one that does nothing."""

    def __init__(self, reweighter: MetaReweighter | None = None) -> None:
        self._reweighter = None if reweighter is None else weakref.ref(reweighter)

    def __call__(self, model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        reweighter = None if self._reweighter is None else self._reweighter()
        if reweighter is not None:
            reweighter._record_call(positional, named)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recorder:
        return _Recorder()

    def __reduce__(self) -> tuple[type[_Recorder], tuple[()]]:
        return _Recorder, ()


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer hook that does not keep its reweighter alive."""
    reference = weakref.WeakMethod(method)

    @torch.compiler.disable  # a compiled optimizer calls it between its graphs
    def hook(*arguments: Any) -> Any:
        bound = reference()
        return None if bound is None else bound(*arguments)

    return hook


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _optimizer_of(module: nn.Module, factory: OptimizerFactory | None, lr: float) -> Optimizer | None:
    """The optimizer of φ or Θ; None where there is nothing to learn."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    if factory is not None:
        return factory(parameters)
    if any(isinstance(m, nn.Embedding) and m.sparse for m in module.modules()):
        return torch.optim.SparseAdam(parameters, lr=lr)
    return torch.optim.Adam(parameters, lr=lr)


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}")


def _check_values(samples: Samples) -> None:
    """Refuse losses and rows that nothing can be made of."""
    rows = [i for i, loss in enumerate(samples.on_host.losses) if not math.isfinite(loss)]
    if anywhere(bool(rows), samples.losses.device):
        shown = f"{rows[:20]} and {len(rows) - 20} more" if len(rows) > 20 else f"{rows}"
        raise FloatingPointError(
            f"loss is NaN or infinite for instances {shown} of the batch; the step was refused, nothing has changed"
        )
    lowest = min(samples.on_host.rows or [0])
    if lowest < 0:
        raise ValueError(f"indices must be ≥ 0, got {lowest}")


def _check_weights(weights: list[float]) -> None:
    if not all(0.0 <= weight < math.inf for weight in weights):
        raise ValueError("weighting must return finite weights ≥ 0, got negative, NaN or infinite ones")


def _checked_indices(indices: Any, losses: Tensor) -> Tensor | None:
    if indices is None:
        return None
    rows = torch.as_tensor(indices).to(losses.device, non_blocking=True)
    if rows.shape != losses.shape or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"indices must be ({losses.shape[0]},) integers, got {tuple(rows.shape)} {rows.dtype}")
    return rows.long()

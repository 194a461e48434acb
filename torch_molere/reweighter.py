"""Learned reweighting around a user's own model, optimizer and loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_molere.arguments import check_model, check_optimizers, check_settings, parts_of
from torch_molere.calls import arguments_of, device_of
from torch_molere.checks import check_batch, dry_run
from torch_molere.core import Core
from torch_molere.criterion import Criterion
from torch_molere.distributed import fsdp
from torch_molere.distributed.collectives import Gather
from torch_molere.history import SampleHistory
from torch_molere.hooks import Attachment, end, unwrapped
from torch_molere.hypergradients import Engine
from torch_molere.hypergradients.check import EngineChoice
from torch_molere.hypergradients.functional import keep_backward_buffers, preserved_randomness
from torch_molere.hypergradients.update import maximizes
from torch_molere.losses import CorrectFn, LossFn, PerSampleLoss
from torch_molere.messages import Messages
from torch_molere.meta_update import ONE_LOSS
from torch_molere.metrics import metrics_of
from torch_molere.networks import OptimizerFactory, optimizer_of, with_statistics
from torch_molere.paper import paper_arguments
from torch_molere.result import StepResult, Tally
from torch_molere.shrinkage import Shrinkage
from torch_molere.state import load, state_of
from torch_molere.step import plan_loss, result_of
from torch_molere.validation.buffer import ValidationBuffer
from torch_molere.validation.fixed import FixedValidation
from torch_molere.validation.source import ValidationSource
from torch_molere.weighting import SignalWeighting

Order = Literal["after", "before"]


class MetaReweighter(Core):
    """Learned reweighting of training instances: MOLERE (CVPR 2024), or against a validation set of your own.

    Give it your model and optimizer and call :meth:`step` where your loop did forward, backward and
    ``optimizer.step()``; or put :meth:`loss` where your ``criterion`` stood and keep the rest of your loop.

    Three networks play together: your classifier θ; the weighting φ, which gives each training instance a weight; and
    the splitter Θ, which chooses the validation instances. Every few steps φ learns, by differentiating through your
    optimizer's own update, to weigh training so that the classifier does well on the validation set.

    Args:
        model: the classifier θ, any ``nn.Module``; as your loop calls it (wrapped by DDP or compiled, if it is).
        optimizer: of torch.optim, with a ``differentiable`` option (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad,
            Adadelta, Adamax, ASGD), that holds the model's parameters; or a list of several that share them.
        loss_fn: a function ``(outputs, targets) -> (B,)``, or any ``torch.nn`` loss as it is, such as
            ``nn.CrossEntropyLoss(label_smoothing=0.1)``; default cross-entropy.
        val_loss_fn: what φ is to make small on the validation set; default ``loss_fn``. With wrong labels in the
            validation set, :func:`expected_error` is bounded and so harder to mislead.
        weighting: the meta-network φ, ``forward(samples) -> (B,)`` weights ≥ 0; default :class:`SignalWeighting`.
        weighting_lr: learning rate of φ (Adam).
        weighting_optimizer: makes another optimizer for φ from a list of parameters, for instance
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        validation: an iterable of ``(inputs, targets)`` batches, such as a DataLoader of trusted rows; or a
            :class:`ValidationBuffer`, which fills itself from training; None for one at its defaults.
        every: Q, a meta-update at every Q-th step.
        warmup_steps: optimizer steps of plain training first.
        hypergradient: the engine, one of ``"finite"``, ``"forward"``, ``"reverse"``; ``"auto"`` takes the first of
            these that agrees with the model's own backward, and checks it again from time to time.
        order: ``"after"`` updates φ after the optimizer's step, which serves as the look-ahead; ``"before"`` takes a
            virtual look-ahead first, so that the new φ weighs this very batch, as in the paper, at a higher cost.
        shrinkage: λ ≥ 0: pulls weights to one. φ is given the meta-gradient in units of its standard deviation, plus
            λ (w̄ − 1), so that noise leaves weights at one and only a consistent sign moves them. ``"auto"`` takes λ
            from how far each row's meta-gradients repeat themselves (:mod:`torch_molere.shrinkage`): large where they
            are noise, small where they are not. None gives φ the bare meta-gradient.
        max_weight: the largest weight, ≥ 1; None for no bound.
        correct_fn: ``(outputs, targets) -> (B,)`` bool, whether the classifier is right; the default knows classes,
            soft and multi-label targets and otherwise asks whether the loss is at most the batch's median.
        scaler: a GradScaler for :meth:`step` to use. In a loop of your own you use it yourself, as before.
        seed: of everything random here. The global random streams are neither read nor moved.

    A step that fails leaves the model as a plain failed step does, its parameters the very same objects, and the
    reweighter unchanged. Reweighters of different models may run in different threads, but PyTorch's random stream is
    one for all threads; use processes where it matters.

    Attributes:
        result: the latest step's :class:`StepResult` (between a loss and its step that of the loss), or None.
        history: what is known of each row that came with ``indices`` (:class:`~torch_molere.history.SampleHistory`).
        steps: optimizer steps so far.
        meta_updates: meta-updates so far.
        weighting, validation: φ, and where validation instances come from.
        shrinkage: λ at present (``reweighter.shrinkage.strength``).

    Raises:
        TypeError: for a model, optimizer or callable of another kind, or an optimizer that cannot be differentiated.
        ValueError: for an argument out of its range, or an optimizer that holds none of the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        loss_fn: LossFn | nn.Module | None = None,
        val_loss_fn: LossFn | nn.Module | None = None,
        weighting: nn.Module | None = None,
        weighting_lr: float = 3e-3,
        weighting_optimizer: OptimizerFactory | None = None,
        validation: Iterable[Any] | ValidationBuffer | None = None,
        every: int = 5,
        warmup_steps: int = 100,
        hypergradient: Engine = "auto",
        order: Order = "after",
        shrinkage: float | Literal["auto"] | None = "auto",
        max_weight: float | None = 3.0,
        correct_fn: CorrectFn | None = None,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        check_model(model, weighting)
        check_settings(
            weighting, weighting_lr, every, warmup_steps, hypergradient, order, max_weight, correct_fn, scaler, seed
        )
        self._given_optimizers: list[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        self.optimizers = check_optimizers(self._given_optimizers)
        keep_backward_buffers(model)
        self.model = model
        self.network = unwrapped(model)
        fsdp.check_sharded(self.network, hypergradient, order)
        self.criterion_of_training = PerSampleLoss(loss_fn)
        self.criterion_of_validation = (
            self.criterion_of_training if val_loss_fn is None else PerSampleLoss(val_loss_fn, "val_loss_fn")
        )
        self.sign = -1.0 if maximizes(self.optimizers) and val_loss_fn is None else 1.0
        self.sharded = None
        owners = self.owners()  # refuses an optimizer of another model
        self.sharded = owners if fsdp.any_sharded(owners) else None
        self.correct_fn = correct_fn
        self.scaler = scaler
        self.order = order
        self.every = every
        self.warmup_steps = warmup_steps
        self.max_weight = max_weight
        self.seed = seed
        self.steps = 0
        self.result = None
        self.engines = EngineChoice(hypergradient)
        self.gather = Gather()

        device = device_of(model)
        with preserved_randomness(device, seed):
            self.weighting = (SignalWeighting() if weighting is None else weighting).to(device)
            self.weighting_optimizer = optimizer_of(self.weighting, weighting_optimizer, weighting_lr)
            source = ValidationBuffer() if validation is None else validation
            self.validation = source if isinstance(source, ValidationSource) else FixedValidation(source)
            self.validation.attach(self.network, device, seed)
        self.shrinkage = Shrinkage(shrinkage)
        self.with_statistics = with_statistics([self.weighting, getattr(self.validation, "splitter", None)])
        self.history = SampleHistory(getattr(self.weighting, "meta_decay", 0.8))
        self.configuration = {
            "hypergradient": hypergradient,
            "order": order,
            "every": every,
            "warmup_steps": warmup_steps,
            "weighting": type(self.weighting).__name__,
            "validation": type(self.validation).__name__,
            "shrinkage": shrinkage,
            "max_weight": max_weight,
        }
        self._started = self.checking = self.batch_checked = False
        self.messages = Messages()
        self._criterion: weakref.ref[Criterion] | None = None
        self.tally = Tally()
        modules = (self.network, *self.criterion_of_training.modules)
        self.attachment = Attachment(self, model, modules, device, self.optimizers)
        # Hooks hold this object weakly: one that is closed or let go of leaves nothing behind.
        self._detach = weakref.finalize(self, end, self.attachment.handles, self.tally, self.engines)

    @classmethod
    def as_in_paper(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        num_outputs: int,
        warmup_steps: int,
        fraction: float = 0.1,
        lr: float = 1e-3,
        **options: Any,
    ) -> MetaReweighter:
        """MOLERE as in the paper: φ and Θ are copies of the classifier that see x, and x and y; hard instances are held
        out; φ and Θ by SGD at ``lr``; look-ahead before each step; weights without shrinkage or bound.

        The paper warms up for a quarter of training and updates φ and Θ at every 5th step.

        Args:
            model: the classifier.
            optimizer: its optimizer; the paper's is SGD, rate 0.1, momentum 0.9, weight decay 1e-4.
            num_outputs: C, the width of the classifier's outputs.
            warmup_steps: a quarter of all steps, in the paper.
            fraction: δ, the share of training held out for validation.
            lr: of φ and Θ.
            **options: further arguments of :class:`MetaReweighter`.
        """
        arguments = paper_arguments(unwrapped(model), num_outputs, warmup_steps, fraction, lr)
        return cls(model, optimizer, **{**arguments, **options})

    # What users call.

    def step(self, batch: Any) -> StepResult:
        """Forward, weight, backward, update, and a meta-update where one is due.

        Args:
            batch: ``(inputs, targets)`` or ``(inputs, targets, indices)``, on the model's device; inputs a tensor, a
                tuple (``model(*inputs)``) or a mapping (``model(**inputs)``); indices ``(B,)`` integers, each
                instance's row in its dataset (:func:`with_indices`), best left on the CPU: by them rows are known
                again.

        Returns:
            A :class:`StepResult`.

        Raises:
            TypeError, ValueError: for a batch of another form, or losses of another shape than ``(B,)``.
            FloatingPointError: if a loss is NaN or infinite; names the rows.
            RuntimeError: if no engine agrees with the model's own backward.
        """
        inputs, targets, indices = parts_of(batch)
        positional, named = arguments_of(inputs)
        # Accelerate's optimizers have a scaler that they step with and update by themselves.
        scaler = self.scaler or next((o.scaler for o in self._given_optimizers if getattr(o, "scaler", None)), None)
        with torch.enable_grad():
            self.attachment.forget()
            for optimizer in self._given_optimizers:
                optimizer.zero_grad()
            loss = self.loss(self.model(*positional, **named), targets, indices)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if self.scaler is not None and len(self._given_optimizers) > 1:  # the look-ahead is of all of them at once
            for optimizer in self._given_optimizers:
                self.scaler.unscale_(optimizer)
        for optimizer in self._given_optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        assert self.result is not None
        return self.result

    def loss(self, outputs: Any, targets: Any, indices: Tensor | None = None) -> Tensor:
        """The weighted training loss, in place of ``criterion(outputs, targets)`` in a loop of your own.

        The meta-update runs inside ``optimizer.step()``; afterwards :attr:`result` has the details. Where gradients are
        off (an evaluation loop) this is the plain mean loss and nothing else happens.

        Args:
            outputs: what a call of the model returned, as it is.
            targets: its targets.
            indices: its rows in the dataset, optional.

        Returns:
            A scalar to call ``backward`` on.

        Raises:
            RuntimeError: as :meth:`step`, and if no call of the model returned ``outputs``.
        """
        if not torch.is_grad_enabled():
            criterion = self.criterion_of_training
            return criterion.mean(outputs, targets, criterion(outputs, targets))
        if not self._detach.alive:
            raise RuntimeError("this MetaReweighter is closed: another one took its place, or close() was called")
        if self.order == "before" and self.attachment.accumulating():
            raise RuntimeError(ONE_LOSS)
        call, select = self.attachment.call_of(outputs)
        plan, loss = plan_loss(self, call, select, outputs, targets, indices, self.attachment.active)
        check_batch(self, call, select, targets)
        self.attachment.watch(plan, loss)
        self.result = result_of([plan], None)
        self.messages.of_loss(self.criterion_of_training.loss_fn, self.validation.trusted, plan.replay is not None)
        return loss

    def check(self, batch: Any) -> str:
        """A dry run of everything on a real batch, which changes nothing: says what will be used, or what is wrong.

        Args:
            batch: as for :meth:`step`.

        Returns:
            A few lines: the engine and how far it is from reverse mode, the cost of a meta-update relative to a step,
            the parameters reached.

        Raises what the first meta-update would raise.
        """
        return dry_run(self, self.attachment, *parts_of(batch))

    @property
    def criterion(self) -> Criterion:
        """:meth:`loss` as an ``nn.Module``, to be assigned where a criterion stood. It keeps the reweighter alive."""
        criterion = None if self._criterion is None else self._criterion()
        if criterion is None:
            criterion = Criterion(self.criterion_of_training, self.loss)
            self._criterion = weakref.ref(criterion)
        return criterion

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: of the latest step, of the validation source, and of the meta-updates so far."""
        return metrics_of(self)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the classifier and its optimizer: φ, Θ, their optimizers, the validation source, counters.

        Take it between steps. ``torch.load(..., weights_only=True)`` reads it. Each rank has its own.
        """
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave, in a reweighter made with the same arguments.

        Raises:
            ValueError: if ``state`` is of another kind, version, configuration or rank, holds NaN or negative rates, or
                does not fit; names what differs. Nothing has changed then.
        """
        load(self, state)
        self.attachment.forget()

    def close(self) -> None:
        """Take the hooks off model and optimizer; both are then as if they had never been wrapped.

        A reweighter that nothing refers to any more does so by itself.
        """
        self._detach()
        self.attachment.forget()

    def __enter__(self) -> MetaReweighter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "MetaReweighter is tied to its model's and optimizer's hooks and cannot be copied or pickled; "
            "save state_dict() and load it into a new MetaReweighter(model, optimizer)"
        )

    def __repr__(self) -> str:
        state = f"warming up, step {self.steps} of {self.warmup_steps}" if self.warming_up else f"step {self.steps}"
        return (
            f"MetaReweighter({type(self.network).__name__}, {', '.join(type(o).__name__ for o in self.optimizers)})\n"
            f"  {state}; {self.meta_updates} meta-updates, one every {self.every} steps, engine {self.engine!r}\n"
            f"  weighting: {type(self.weighting).__name__}, shrinkage {self.shrinkage.describe()}, "
            f"max_weight {self.max_weight}\n"
            f"  validation: {type(self.validation).__name__}; {len(self.history)} rows known by their index"
        )

"""The user's loss taken apart: one loss for each instance, and what can be read from outputs and targets besides."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses

from torch_molere.calls import batch_size, detached, logits_of
from torch_molere.margins import margins_of

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, targets) -> (B,)``: one loss for each instance."""

CorrectFn = Callable[[Any, Any], Tensor]
"""``correct_fn(outputs, targets) -> (B,)`` bool: whether the classifier is right on each instance."""

# LinearCrossEntropyLoss is younger than the oldest PyTorch that is supported.
_LINEAR = tuple(getattr(nn, name) for name in ("LinearCrossEntropyLoss",) if hasattr(nn, name))
_COUNTS_CLASS_WEIGHTS = (nn.CrossEntropyLoss, nn.NLLLoss, *_LINEAR)
_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_LABELS = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss, nn.SoftMarginLoss)
_UNREADABLE = (nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss, *_LINEAR)


class PerSampleLoss:
    """A loss function as one loss for each instance, with its own normalisation kept.

    A loss of ``torch.nn`` is taken as it is. Its elements e come from a copy with ``reduction="none"``, and

        ℓ_i = (B / N) Σ_{j of instance i} e_j    so that    mean_i ℓ_i = (Σ_j e_j) / N = criterion(outputs, targets)

    where N is what the criterion divides by: the number of elements (``reduction="mean"``), the summed class weights of
    the targets that are not ignored (cross-entropy and NLL with class indices), B (``"batchmean"``) or 1 (``"sum"``).
    Options such as ``weight``, ``label_smoothing``, ``ignore_index`` and ``pos_weight`` are read anew in each call. As
    in PyTorch, losses are NaN if every target of a batch is ignored.

    Args:
        loss_fn: a function ``(outputs, targets) -> (B,)``, a module that returns ``(B,)``, or any loss of ``torch.nn``
            that takes ``(outputs, targets)``, its reduction included. A loss of ``torch.nn`` reads the outputs' tensor
            or their ``.logits``. None means ``nn.CrossEntropyLoss()``.
        name: of the argument, for errors.

    Attributes:
        loss_fn: the loss function as given, or the default.
        modules: the loss function itself if it is a module, which may have parameters (ArcFace), else nothing.
        kind: ``"class"`` if targets are classes (indices or probabilities), ``"multilabel"`` if each output has a 0/1
            target, None where the loss function does not say.

    Raises:
        TypeError: if ``loss_fn`` is a class, no function, or a loss of ``torch.nn`` that takes other arguments.
    """

    def __init__(self, loss_fn: LossFn | nn.Module | None = None, name: str = "loss_fn") -> None:
        loss_fn = nn.CrossEntropyLoss() if loss_fn is None else loss_fn
        _check_loss_fn(loss_fn, name)
        self.name = name
        self.loss_fn: Callable[[Any, Any], Any] = loss_fn
        self.modules: tuple[nn.Module, ...] = (loss_fn,) if isinstance(loss_fn, nn.Module) else ()
        module = getattr(loss_fn, "_orig_mod", loss_fn)  # what torch.compile wrapped
        self._module = module
        self._criterion: Any = module if _is_from_torch(module) else None
        self.kind: Literal["class", "multilabel"] | None = (
            "class" if isinstance(module, _CLASS) else "multilabel" if isinstance(module, _LABELS) else None
        )

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of each instance.

        Args:
            outputs: what the model gave.
            targets: the batch's targets, B of them.

        Returns:
            ``(B,)`` with its graph. For a loss of ``torch.nn`` its mean is what the criterion gives.

        Raises:
            TypeError: if the loss function returns no floating tensor, or outputs have auxiliary logits that a loss
                of ``torch.nn`` would leave without a gradient.
            ValueError: if it returns a scalar or not one loss for each instance, or a loss of ``torch.nn`` would
                broadcast outputs and targets against each other or wants classes in another dimension.
        """
        if self._criterion is None:
            losses = self.loss_fn(outputs, targets)
            _check_losses(losses, targets, self.loss_fn, self.name)
            return losses
        logits = _only_logits(outputs)
        _check_classes_first(logits, targets, self._criterion)
        elements = _without_reduction(self._criterion).forward(logits, targets)
        _check_elements(elements, logits, targets, self._criterion)
        if self._criterion.reduction == "none":
            return elements
        means = elements if elements.ndim == 1 else elements.flatten(1).mean(dim=1)
        divisor = _divisor(self._criterion, elements, targets)
        return means if divisor is None else means / divisor

    def mean(self, outputs: Any, targets: Any, losses: Tensor) -> Tensor:
        """The loss of the batch with equal weights: bit for bit what a ``torch.nn`` criterion gives.

        Args:
            outputs: what the model gave.
            targets: the batch's targets.
            losses: ``(B,)``, what calling this object with them returned.

        Returns:
            a scalar with its graph: ``criterion(outputs, targets)`` of ``torch.nn``, else ``losses.mean()``.
        """
        if self._criterion is None or self._criterion.reduction == "none":
            return losses.mean()
        return self.loss_fn(_only_logits(outputs), targets)

    def describe(
        self, outputs: Any, targets: Any, losses: Tensor, correct_fn: CorrectFn | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Whether the classifier is right, the class of each instance, and its margin, without reading the device.

        - Class indices ``(B,)`` of ``(B, C)`` logits: right where the largest logit is the target's. Where the target
          is ignored, the class is -1, the margin 1, and the classifier counts as right.
        - Class probabilities ``(B, C)`` (soft or one-hot targets): the class is the most probable one.
        - Multi-label (targets of the outputs' shape): right where every label is. No classes, no margins.
        - Dense outputs ``(B, C, d1, …)``: right where more than half of the positions that are not ignored are. No
          classes, no margins.
        - Anything else (regression): right where the loss is at most the batch's median. No classes, no margins.

        A function or module of the user's does not say what ``(B, C)`` targets of the outputs' shape are. Then the
        batch decides: class probabilities if they are not negative and each row sums to one; labels if all are 0 or 1;
        else regression. Unless they are class probabilities, classes are -1, and margins lead from 1 (the smallest loss
        of the batch) in equal steps to -1 (the largest).

        Args:
            outputs: what the model gave.
            targets: the batch's targets.
            losses: ``(B,)`` the loss of each instance.
            correct_fn: ``(outputs, targets) -> (B,)`` bool, which alone then says what is right; its outputs are
                detached, the ``.logits`` of an output object. Classes and margins stay.

        Returns:
            ``(correct, classes, margins)``: ``(B,)`` bool; ``(B,)`` long, or None; ``(B,)`` floating in [-1, 1], or
            None.

        Raises:
            ValueError: if ``correct_fn`` returns something else than ``(B,)`` bool.
        """
        outputs, losses = detached(outputs), losses.detach()
        correct, classes, margins = self._described(outputs, targets, losses)
        if correct_fn is not None:
            correct = correct_fn(outputs, targets)
            if not isinstance(correct, Tensor) or correct.shape != losses.shape or correct.dtype != torch.bool:
                found = f"{tuple(correct.shape)} {correct.dtype}" if isinstance(correct, Tensor) else repr(correct)
                raise ValueError(f"correct_fn must return ({losses.shape[0]},) bool, got {found}")
        return correct, classes, margins

    def _described(self, logits: Any, targets: Any, losses: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        readable = isinstance(logits, Tensor) and isinstance(targets, Tensor) and logits.is_floating_point()
        if not readable or logits.ndim == 0 or isinstance(self._module, _UNREADABLE):
            return _below_median(losses), None, None
        targets = targets.detach()
        shape = logits.shape
        if len(shape) >= 2 and shape[1] > 1 and self.kind != "multilabel":
            classes = None
            if targets.ndim == len(shape) - 1 and targets.shape == shape[:1] + shape[2:] and _are_indices(targets):
                classes = self._without_ignored(targets, shape[1])
            elif self.kind == "class" and targets.shape == shape:
                classes = targets.argmax(dim=1)
            if classes is not None:
                return (
                    _described_classes(logits, classes) if len(shape) == 2 else (_mostly(logits, classes), None, None)
                )
        if targets.shape != logits.shape:
            return _below_median(losses), None, None
        threshold = 0.5 if isinstance(self._module, nn.BCELoss) else 0.0
        if self.kind == "multilabel":
            return _labels_right(logits, targets, threshold), None, None
        correct = _below_median(losses)
        if not isinstance(self._module, torch_losses._Loss):  # the regression losses of torch.nn have no such labels
            labels = ((targets == 0) | (targets == 1)).all()
            correct = torch.where(labels, _labels_right(logits, targets, threshold), correct)
        if logits.ndim != 2 or logits.shape[1] < 2:
            return correct, None, None
        probabilities = targets.float()
        soft = (probabilities >= 0).all() & ((probabilities.sum(dim=1) - 1).abs() < 1e-2).all()
        soft_correct, classes, margins = _described_classes(logits, probabilities.argmax(dim=1))
        return (
            torch.where(soft, soft_correct, correct),
            torch.where(soft, classes, -1),
            torch.where(soft, margins, _loss_ranks(losses).to(margins.dtype)),
        )

    def _without_ignored(self, targets: Tensor, num_classes: int) -> Tensor:
        """Class indices with -1 where the target is ignored."""
        classes = targets.long()
        if isinstance(self._module, nn.MultiMarginLoss):
            return classes
        ignored: Any = getattr(self._module, "ignore_index", None)
        if self._criterion is None:  # the user's own function may ignore 255 or -1
            outside = (classes < 0) | (classes >= num_classes)
            return classes.masked_fill(outside if ignored is None else outside | (classes == ignored), -1)
        # The criterion refuses any other negative index.
        return classes.clamp(min=-1) if ignored < 0 else classes.masked_fill(classes == ignored, -1)


def expected_error(outputs: Any, targets: Tensor) -> Tensor:
    """``1 − p_target``: how often a class drawn from the classifier's own probabilities would be wrong.

    A bounded loss for validation (``val_loss_fn=``): it follows the error rate, tells sure mistakes from unsure ones no
    more than the error rate does, and tolerates symmetric label noise (Ghosh, Kumar and Sastry, AAAI 2017). For soft
    targets y it is ``1 − Σ_c y_c p_c``.

    Args:
        outputs: ``(B, C)`` logits, or an object with such ``.logits``; ``(B, C, d1, …)`` for dense predictions.
        targets: ``(B,)`` class indices, ``(B, d1, …)`` for dense predictions, or class probabilities of the logits'
            shape. Negative indices are ignored.

    Returns:
        ``(B,)`` in [0, 1], 0 where the target is ignored; the mean over the positions that are not ignored for dense
        predictions.

    Raises:
        ValueError: if the targets have another shape.
        RuntimeError: (PyTorch's) if a class index is C or more.
    """
    logits = logits_of(outputs)
    probabilities = logits.softmax(dim=1)
    if targets.shape == logits.shape:
        errors = 1.0 - (targets * probabilities).sum(dim=1)
        return errors if errors.ndim == 1 else errors.flatten(1).mean(dim=1)
    if targets.shape != logits.shape[:1] + logits.shape[2:] or not _are_indices(targets):
        raise ValueError(
            f"targets must be {tuple(logits.shape[:1] + logits.shape[2:])} class indices or {tuple(logits.shape)} "
            f"class probabilities, got {tuple(targets.shape)} of {targets.dtype}"
        )
    counted = targets >= 0
    column = targets.long().clamp(min=0).unsqueeze(1)
    errors = (1.0 - probabilities.gather(1, column).squeeze(1)) * counted
    if errors.ndim == 1:
        return errors
    return errors.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp(min=1)


def constants_of(loss_fn: Any) -> dict[str, float]:
    """The fractions that a loss function keeps, by name: a MixUp ``lam`` kept there changes with each batch.

    They are the attributes of an object or module, the arguments of a :func:`functools.partial`, and of a function or
    method the variables from outside that it names and the attributes of these (of ``self``, too) that it names.
    Reading a tensor waits for its device.

    Args:
        loss_fn: any callable; None keeps nothing.

    Returns:
        name to value, for every ``float`` and every floating tensor without dimensions that needs no gradient.
    """
    kept: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial):
        kept |= constants_of(loss_fn.func) | {str(place): value for place, value in enumerate(loss_fn.args)}
        kept |= loss_fn.keywords
    elif isinstance(loss_fn, (FunctionType, MethodType)):
        outside = inspect.getclosurevars(loss_fn)
        owners = {**outside.globals, **outside.nonlocals, "self": getattr(loss_fn, "__self__", None)}
        for name, owner in owners.items():
            kept[name] = owner
            if not isinstance(owner, (type, ModuleType)):
                named = {key: value for key, value in _attributes(owner) if key in loss_fn.__code__.co_names}
                kept |= {f"{name}.{key}": value for key, value in named.items()}
    else:
        kept |= _attributes(loss_fn)
    return {name: float(value) for name, value in kept.items() if _is_fraction(value)}


def _attributes(owner: Any) -> list[tuple[str, Any]]:
    return [*getattr(owner, "__dict__", {}).items(), *(owner._buffers.items() if isinstance(owner, nn.Module) else ())]


def _is_fraction(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.is_floating_point() and not value.requires_grad
    return isinstance(value, float)


def _is_from_torch(loss_fn: Any) -> bool:
    """Whether this is a loss of ``torch.nn`` that computes as PyTorch wrote it."""
    return isinstance(loss_fn, torch_losses._Loss) and type(loss_fn).forward.__module__ == torch_losses.__name__


def _check_loss_fn(loss_fn: Any, name: str) -> None:
    if isinstance(loss_fn, type):
        raise TypeError(
            f"{name} must be a function or an object, got the class {loss_fn.__name__}; make an instance of it"
        )
    if not callable(loss_fn):
        raise TypeError(
            f"{name} must be a function (outputs, targets) -> (B,) or a loss of torch.nn, got {type(loss_fn).__name__}"
        )
    module = getattr(loss_fn, "_orig_mod", loss_fn)
    if _is_from_torch(module) and len(inspect.signature(module.forward).parameters) != 2:
        arguments = ", ".join(inspect.signature(module.forward).parameters)
        raise TypeError(
            f"{name} must take (outputs, targets), but {type(module).__name__} takes ({arguments}); pass a function "
            "(outputs, targets) -> (B,) that calls it with reduction='none'"
        )


def _check_losses(losses: Any, targets: Any, loss_fn: Any, name: str) -> None:
    """Refuse what the user's own loss function returned unless it is one floating loss for each instance."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        found = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"{name} must return a floating tensor of per-sample losses, got {found}")
    sizes = _sizes_of(targets)
    if losses.ndim == 1 and (not sizes or losses.shape[0] in sizes):
        return
    if losses.ndim:
        advice = "reduce all other dimensions, e.g. .flatten(1).mean(1)"
    elif isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        advice = f"make it with reduction='none': {type(loss_fn).__name__}(…, reduction='none')"
    else:
        advice = "use reduction='none', or pass a loss of torch.nn as it is (nn.CrossEntropyLoss(…))"
    size = sizes[0] if sizes else "B"
    raise ValueError(
        f"{name} must return one loss for each of the {size} instances, shape ({size},), "
        f"got {tuple(losses.shape)}; {advice}"
    )


def _sizes_of(targets: Any) -> list[int]:
    """How many instances ``targets`` may be of: their tensors' first dimension; the length of a list of them."""
    try:
        sizes = [batch_size(targets)]
    except ValueError:
        sizes = []
    return [*sizes, len(targets)] if isinstance(targets, list) else sizes


def _only_logits(outputs: Any) -> Tensor:
    """The outputs' logits, where a loss of them leaves nothing out that should be trained."""
    logits = logits_of(outputs)
    if outputs is logits:
        return logits
    if isinstance(outputs, tuple):
        others = {name: getattr(outputs, name) for name in getattr(outputs, "_fields", ()) if name != "logits"}
    else:
        others = {name: v for name, v in getattr(outputs, "__dict__", {}).items() if name.startswith("aux_logits")}
    names = [name for name, value in others.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if names:
        raise TypeError(
            f"outputs {type(outputs).__name__} have {', '.join(names)} besides .logits, which would get no gradient; "
            "pass loss_fn=a function (outputs, targets) -> (B,) that adds their losses"
        )
    return logits


def _without_reduction(criterion: Any) -> Any:
    """The criterion with ``reduction="none"``: it shares all else, so that later changes of its options count."""
    copy = object.__new__(type(criterion))
    copy.__dict__.update(criterion.__dict__, reduction="none")
    return copy


def _check_classes_first(logits: Tensor, targets: Any, criterion: Any) -> None:
    """Refuse logits ``(B, T, C)`` of tokens, as language models give them: cross-entropy wants ``(B, C, T)``."""
    tokens = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and getattr(targets, "ndim", 0) == 2
    if tokens and logits.ndim == 3 and targets.shape == logits.shape[:2] and logits.shape[1] != logits.shape[2]:
        raise ValueError(
            f"{type(criterion).__name__} wants outputs (B, C, T) for targets (B, T), got {tuple(logits.shape)} for "
            f"{tuple(targets.shape)}: pass loss_fn=a function (outputs, targets) -> (B,) that moves the classes to "
            "the second dimension, and for a causal language model compares each token with the next"
        )


def _check_elements(elements: Tensor, logits: Tensor, targets: Tensor, criterion: Any) -> None:
    """Refuse what is not one row of elements for each instance."""
    name, shapes = type(criterion).__name__, f"outputs {tuple(logits.shape)} and targets {tuple(targets.shape)}"
    if logits.ndim != targets.ndim and elements.ndim == max(logits.ndim, targets.ndim):
        raise ValueError(
            f"{name} would broadcast {shapes} against each other, to {tuple(elements.shape)}; give both the same shape"
        )
    if elements.ndim == 0 or not elements.shape[0] == logits.shape[0] == targets.shape[0]:
        raise ValueError(
            f"{name} must give a loss for each instance of a batch, got {tuple(elements.shape)} from {shapes}; "
            "both need a first dimension B"
        )
    if criterion.reduction == "none" and elements.ndim != 1:
        raise ValueError(
            f"{name}(reduction='none') must give one loss for each instance, shape ({elements.shape[0]},), got "
            f"{tuple(elements.shape)}; make it with reduction='mean', which is kept, or pass a function that reduces "
            "all other dimensions"
        )


def _divisor(criterion: Any, elements: Tensor, targets: Tensor) -> float | Tensor | None:
    """N / (number of elements), with N what the criterion divides the sum of its elements by; None where that is 1."""
    if criterion.reduction == "sum":
        return 1 / elements.numel()
    if criterion.reduction == "batchmean":
        return elements.shape[0] / elements.numel()
    if not isinstance(criterion, _COUNTS_CLASS_WEIGHTS) or targets.is_floating_point():
        return None
    weight: Tensor | None = criterion.weight
    counted = True if criterion.ignore_index is None else targets != criterion.ignore_index
    wide = torch.promote_types(elements.dtype, torch.float32)
    if weight is not None:
        return (weight.detach().to(wide)[targets.long() * counted] * counted).mean()
    return counted.mean(dtype=wide) if isinstance(counted, Tensor) else None


def _are_indices(targets: Tensor) -> bool:
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def _below_median(losses: Tensor) -> Tensor:
    return losses <= losses.median()


def _described_classes(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    correct = (logits.argmax(dim=1) == classes) | (classes < 0)
    return correct, classes, margins_of(logits, classes)


def _mostly(logits: Tensor, classes: Tensor) -> Tensor:
    """``(B,)`` bool: more than half of the positions that are not ignored (class -1) are right, or all are ignored."""
    counted = (classes >= 0).flatten(1).sum(dim=1)
    right = (logits.argmax(dim=1) == classes).flatten(1).sum(dim=1)
    return (2 * right > counted) | (counted == 0)


def _labels_right(outputs: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """``(B,)`` bool: all labels are right; for dense outputs ``(B, C, d1, …)``, more than half of them."""
    right = ((outputs > threshold) == (targets > 0.5)).reshape(outputs.shape[0], -1)
    return right.all(dim=1) if outputs.ndim <= 2 else 2 * right.sum(dim=1) > right.shape[1]


def _loss_ranks(losses: Tensor) -> Tensor:
    """``(B,)`` from 1 for the smallest loss in equal steps to -1 for the largest."""
    ranks = losses.argsort(stable=True).argsort()
    return 1 - 2 * ranks / max(losses.shape[0] - 1, 1)

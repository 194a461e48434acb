"""What is measured of a trained classifier: right or not, how sure, how well calibrated, and on which instances."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from benchmarks.data import Values
from benchmarks.peers import logits
from benchmarks.problems import Judged, Problem
from benchmarks.training import Trained
from torch_molere import probabilistic_margin
from torch_molere.report import label_issues

BUCKETS = 10


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The share that is right."""
    return (outputs.argmax(dim=1) == labels).double().mean().item()


def by_class(outputs: Tensor, labels: Tensor) -> Tensor:
    """``(C,)``: the share that is right of each class that there is."""
    right = (outputs.argmax(dim=1) == labels).double()
    return torch.stack([right[labels == label].mean() for label in labels.unique()])


def judged(outputs: Tensor, on: Judged, reference: Tensor | None) -> dict[str, float]:
    """The columns of a test set.

    Args:
        outputs: ``(M, C)`` logits.
        on: the M instances.
        reference: ``(M,)`` margins of a model that is none of those compared: the compared ones' own would not do,
            since whatever is lowest in one of them regresses to the mean in the next.
    """
    labels = on.labels
    margins = probabilistic_margin(outputs, labels).double()
    right = (outputs.argmax(dim=1) == labels).double()
    classes = by_class(outputs, labels)
    numbers = {
        "accuracy": right.mean(),
        "balanced": classes.mean(),
        "worst_class": classes.min(),
        "margin": margins.mean(),
        "nll": F.cross_entropy(outputs.double(), labels),
        "ece": multiclass_calibration_error(outputs.softmax(dim=1), labels, outputs.shape[1], n_bins=15, norm="l1"),
    }
    if on.groups is not None:
        numbers["worst_group"] = torch.stack([right[on.groups].mean(), right[~on.groups].mean()]).min()
    if reference is not None:
        for name, third in zip(("hard", "middle", "easy"), reference.argsort().tensor_split(3), strict=True):
            numbers[f"{name}_third"] = right[third].mean()
        bucket = ((reference + 1.0) / 2.0 * BUCKETS).long().clamp(0, BUCKETS - 1)
        for index in range(BUCKETS):
            numbers[f"margin_{index}"] = margins[bucket == index].mean()  # NaN where the bucket is empty
    return {name: float(value) for name, value in numbers.items()}


def measure(run: Trained, problem: Problem, reference: Tensor | None = None) -> dict[str, float]:
    """The columns of a run. Leaves the model as it was at its best epoch.

    Raises:
        FloatingPointError: if the classifier has diverged.
    """
    outputs = logits(run.model, problem.test.inputs)
    if not bool(torch.isfinite(outputs).all()):
        raise FloatingPointError("the classifier's outputs are not finite")
    numbers = judged(outputs, problem.test, reference)
    numbers["selection"] = accuracy(logits(run.model, problem.selection.inputs), problem.selection.labels)
    for name, other in problem.others.items():
        numbers[f"accuracy_{name}"] = accuracy(logits(run.model, other.inputs), other.labels)
    numbers["train_accuracy"] = accuracy(logits(run.model, problem.inputs), problem.labels)
    numbers["label_errors"] = (problem.labels != problem.clean).double().mean().item()
    if run.best:
        run.model.load_state_dict(run.best)
        numbers["best_accuracy"] = accuracy(logits(run.model, problem.test.inputs), problem.test.labels)
        numbers["best_epoch"] = run.best_epoch
    return numbers | {"rows": len(problem.labels), "seconds": round(run.seconds, 2), **run.numbers}


def found(run: Trained, problem: Problem, missed: Values | None) -> dict[str, float]:
    """How well each score of the rows finds the wrong labels: area under the ROC curve and average precision; and its
    rank correlation with how many annotators missed the true class.

    Of ``label_issues`` there are ``called``, the share of the rows that it calls wrong, ``called_right``, the share of
    those that are, and ``estimated``, the share that it estimates.

    Args:
        missed: ``(N,)``, or None where nobody annotated.
    """
    scores: dict[str, Values] = {}
    numbers: dict[str, float] = {}
    if run.reweighter is None:
        scores["mean loss"] = run.losses.numpy()
        losses = F.cross_entropy(logits(run.model, problem.inputs), problem.labels, reduction="none")
        scores["last loss"] = losses.numpy()
    else:
        # Rows are those of the problem, in order. One that was never weighed weighs as plain training would have it.
        table = {name: column.numpy() for name, column in run.reweighter.history.table().items()}
        scores["mean loss"] = table["loss"]
        scores["mean margin"] = -table["margin"]  # by which label_issues goes
        scores["running margin"] = -table["running_margin"]
        scores["weight"] = -np.nan_to_num(table["weight"], nan=1.0)
        scores["own meta-gradient"] = np.nan_to_num(table["meta_gradient"], nan=0.0)
        issues = label_issues(run.reweighter.history)
        called = issues.rows.index.to_numpy()
        numbers = {"called": len(called) / len(problem.labels), "estimated": issues.rate}
        numbers["called_right"] = (
            float((problem.labels != problem.clean).numpy()[called].mean()) if len(called) else np.nan
        )
    return ranked(scores, problem, missed) | numbers


def ranked(scores: dict[str, Values], problem: Problem, missed: Values | None) -> dict[str, float]:
    """Columns such as ``auroc: mean loss`` for each score ``(N,)``, larger for rows more likely to be wrong."""
    wrong = (problem.labels != problem.clean).numpy()
    numbers: dict[str, float] = {}
    for name, score in scores.items():
        if wrong.any():
            numbers[f"auroc: {name}"] = float(roc_auc_score(wrong, score))
            numbers[f"precision: {name}"] = float(average_precision_score(wrong, score))
        if missed is not None:
            numbers[f"people: {name}"] = float(spearmanr(score, missed).statistic)
    return numbers

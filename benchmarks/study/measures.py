"""What is measured of a trained classifier: right or not, how sure, how well calibrated, and on which instances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from torch_molere import probabilistic_margin

BUCKETS = 10


@dataclass(frozen=True)
class Reference:
    """How hard each evaluation instance is to a model that is none of those compared.

    The compared models' own margins would not do: whatever is lowest in one of them regresses to the mean in the next.

    Attributes:
        margins, losses: ``(M,)``.
    """

    margins: Tensor
    losses: Tensor


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """``(M, C)`` in evaluation mode."""
    model.eval()
    outputs = torch.cat([model(part) for part in inputs.split(2000)])
    model.train()
    return outputs


def measure(outputs: Tensor, targets: Tensor, reference: Reference) -> dict[str, float]:
    """Accuracy (overall, balanced, of the worst class), margin, calibration, and the easy and hard thirds.

    Args:
        outputs: ``(M, C)`` logits.
        targets: ``(M,)`` true classes.
        reference: of the same instances.
    """
    probabilities = outputs.softmax(dim=1)
    predictions = outputs.argmax(dim=1)
    right = (predictions == targets).double()
    margins = probabilistic_margin(outputs, targets).double()
    one_hot = F.one_hot(targets, outputs.shape[1])
    numbers = {
        "accuracy": right.mean(),
        "balanced_accuracy": balanced_accuracy_score(targets, predictions),
        "worst_class": recall_score(targets, predictions, average=None, zero_division=0.0).min(),
        "margin": margins.mean(),
        "nll": F.cross_entropy(outputs.double(), targets),
        "ece": multiclass_calibration_error(probabilities, targets, outputs.shape[1], n_bins=15, norm="l1"),
        "brier": (probabilities.double() - one_hot).square().sum(dim=1).mean(),
    }
    for by, hardness in (("margin", -reference.margins), ("loss", reference.losses)):
        easy, _, hard = hardness.argsort(stable=True).tensor_split(3)
        numbers |= {f"easy_third_by_{by}": right[easy].mean(), f"hard_third_by_{by}": right[hard].mean()}
    bucket = ((reference.margins + 1.0) / 2.0 * BUCKETS).long().clamp(0, BUCKETS - 1)
    for index in range(BUCKETS):
        numbers[f"margin_bucket_{index}"] = margins[bucket == index].mean()  # NaN where the bucket is empty
        numbers[f"count_bucket_{index}"] = (bucket == index).sum()
    return {name: float(value) for name, value in numbers.items()}

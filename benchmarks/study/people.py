"""Does hardness agree with people? Against the annotators of CIFAR-10N (Wei et al., ICLR 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cleanlab.rank import get_label_quality_scores
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from benchmarks.study.measures import logits
from benchmarks.study.methods import ERM, MOLERE, Method
from benchmarks.study.problems import Corpus, Problem, Setting
from benchmarks.study.studies import FITTED, Study
from benchmarks.study.training import train
from torch_molere import probabilistic_margin

ANNOTATORS = ("label_random1", "label_random2", "label_random3")
FOLDS = 4
STUDY = Study(
    "human",
    "Does hardness agree with people? Spearman's rank correlation with how many of CIFAR-10N's three annotators missed "
    "the clean label (trained on clean labels), and how well each score finds the wrong labels of `label_aggregate` "
    "(trained on those): area under the ROC curve and average precision.",
    (FITTED,),
    (MOLERE,),
    finding="What MOLERE keeps of every row, its mean loss and margin, agrees with people as the losses of "
    "plain training do, and finds wrong labels about as well as they and cleanlab's scores do; cleanlab's need four "
    "more models. The final loss is worse than the mean over training. The time spent in validation says least. The "
    "mean weight ranks wrong labels the other way round: against hard instances they weigh more, not less.",
)


def rows(corpus: Corpus, seed: int) -> Iterator[dict[str, Any]]:
    """Those of a seed."""
    (setting,), (method,) = STUDY.settings, STUDY.methods
    return agreement(corpus, setting, method, seed)


def agreement(corpus: Corpus, setting: Setting, method: Method, seed: int) -> Iterator[dict[str, Any]]:
    """Rank correlation of each score with the number of annotators who missed the clean label, on clean labels; and how
    well it finds the wrong labels of ``label_aggregate``, trained on those. Larger scores are harder rows.
    """
    problem = corpus.problem(setting, seed, on_test=True)
    missed = sum((corpus.labels[name][problem.source] != problem.clean.numpy()).astype(int) for name in ANNOTATORS)
    for name, score in _scores(corpus, setting, method, problem, seed).items():
        yield {
            "setting": "clean labels",
            "method": name,
            "seed": seed,
            "spearman": float(spearmanr(score, missed).statistic),
        }
    noisy = replace(problem, labels=torch.from_numpy(corpus.labels["label_aggregate"][problem.source]))
    wrong = (noisy.labels != noisy.clean).numpy()
    for name, score in _scores(corpus, setting, method, noisy, seed).items():
        yield {
            "setting": "label_aggregate",
            "method": name,
            "seed": seed,
            "auroc": float(roc_auc_score(wrong, score)),
            "average_precision": float(average_precision_score(wrong, score)),
            "wrong": float(wrong.mean()),
        }


def _scores(
    corpus: Corpus, setting: Setting, method: Method, problem: Problem, seed: int
) -> Mapping[str, np.ndarray[Any, Any]]:
    """Hardness of every row by each way to tell it."""
    plain = train(setting, ERM, problem, corpus.classes, seed)
    outputs = logits(plain.model, problem.inputs)
    molere = train(setting, method, problem, corpus.classes, seed).reweighter
    assert molere is not None
    history = {name: column.numpy() for name, column in molere.history.table().items()}
    held_out = _out_of_sample(corpus, setting, problem, seed)
    weight = np.nan_to_num(history["weight"], nan=float(np.nanmean(history["weight"])))  # a row never weighed
    return {
        "ERM: final loss": F.cross_entropy(outputs, problem.labels, reduction="none").numpy(),
        "ERM: mean loss over training": plain.mean_losses.numpy(),
        "MOLERE: mean loss over training": history["loss"],
        "MOLERE: mean margin over training": -history["margin"],
        "MOLERE: time spent in validation": history["held_out"],
        "MOLERE: mean weight": -weight,
        f"{FOLDS}-fold: margin": -probabilistic_margin(held_out.log(), problem.labels).numpy(),
        f"{FOLDS}-fold: cleanlab self-confidence": -get_label_quality_scores(
            problem.labels.numpy(), held_out.numpy(), method="self_confidence"
        ),
        f"{FOLDS}-fold: cleanlab confidence-weighted entropy": -get_label_quality_scores(
            problem.labels.numpy(), held_out.numpy(), method="confidence_weighted_entropy"
        ),
    }


def _out_of_sample(corpus: Corpus, setting: Setting, problem: Problem, seed: int) -> Tensor:
    """``(N, C)`` probabilities of rows by classifiers that were not trained on them."""
    probabilities = torch.empty(len(problem.labels), corpus.classes)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for rows, others in folds.split(np.zeros(len(problem.labels)), problem.labels.numpy()):
        part = replace(problem, inputs=problem.inputs[rows], labels=problem.labels[rows], clean=problem.clean[rows])
        trained = train(setting, ERM, part, corpus.classes, seed)
        probabilities[others] = logits(trained.model, problem.inputs[others]).softmax(dim=1)
    return probabilities

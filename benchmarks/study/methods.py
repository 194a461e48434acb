"""What is compared: who trains on which rows, against which validation rows, and how instances are weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.study.problems import Problem, Rows
from torch_molere import LearnedSplitter, MetaReweighter, RandomSplitter, Samples, SignalWeighting, expected_error
from torch_molere.weighting import FLOOR

VALIDATION_SHARE = 0.1
TRIMMED_SHARE = 0.1

Weighs = Literal["equally", "fixed", "molere", "focal", "rgd", "twice", "rho", "l2rw"]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: as it stands in tables.
        weighs: ``equally`` (plain training), ``fixed`` (learned reweighting against the set-apart rows), ``molere``
            (against the splitter's), or one of :mod:`benchmarks.study.baselines`.
        apart: which rows are set apart: a tenth of them (``easy`` or ``hard`` by the margins of plain training with
            the same seed, or ``random``) or the trusted ones.
        held_out: whether the rows set apart are left out of training.
        arguments: of the reweighter; ``signals`` is what φ sees, ``floor`` its least weight (0 unless given),
            ``splitter`` one of :data:`SPLITTERS`, ``expected_error`` whether validation is measured by it. Or a
            baseline's strength.
    """

    name: str
    weighs: Weighs = "equally"
    apart: Literal["none", "easy", "random", "hard", "trusted"] = "none"
    held_out: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def control(self) -> Method:
        """Plain training on exactly the rows that this method trains on."""
        return Method(f"ERM on {self.name}'s rows", "equally", self.apart, self.held_out)

    def rows_apart(self, problem: Problem, seed: int, erm_margins: Tensor | None) -> Rows:
        """Positions of the rows set apart, ascending."""
        count = round(VALIDATION_SHARE * len(problem.labels))
        if self.apart == "trusted":
            return problem.trusted
        if self.apart == "random":
            return np.sort(np.random.default_rng([seed, 1]).permutation(len(problem.labels))[:count])
        if self.apart in ("easy", "hard"):
            assert erm_margins is not None
            hardest_first = erm_margins.argsort(descending=self.apart == "easy", stable=True).numpy()
            return np.sort(hardest_first[:count])
        return np.empty(0, dtype=np.int64)


class MixedSplitter(nn.Module):
    """Half of the validation instances are random rows, which stay, the others what the learned splitter finds hard."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = RandomSplitter(VALIDATION_SHARE / 2, seed)
        self.learned = LearnedSplitter()

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)``: random rows have 0, others Θ's probability."""
        chosen = self.random(samples) < 0.5
        learned: Tensor = self.learned(samples)
        return learned.masked_fill(chosen, 0.0)


class TrimmedSplitter(nn.Module):
    """What the learned splitter finds hard, but for the tenth of each batch with the lowest margins, which trains on:
    wrong labels are among them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.learned = LearnedSplitter()

    def forward(self, samples: Samples) -> Tensor:
        """``(B,)``: trimmed instances have 1, others Θ's probability."""
        learned: Tensor = self.learned(samples)
        lowest = samples.margins.argsort(stable=True)[: round(TRIMMED_SHARE * len(learned))]
        return learned.index_fill(0, lowest, 1.0)


SPLITTERS = {
    "random": lambda seed: RandomSplitter(VALIDATION_SHARE, seed),
    "mixed": MixedSplitter,
    "trimmed": TrimmedSplitter,
}


def reweighter(
    method: Method,
    problem: Problem,
    apart: Rows,
    model: nn.Module,
    optimizer: Optimizer,
    classes: int,
    batch_size: int,
    warmup_steps: int,
    seed: int,
) -> MetaReweighter:
    """The reweighter that a method trains with."""
    arguments = {"warmup_steps": warmup_steps, **method.arguments}
    signals, floor = tuple(arguments.pop("signals", ("loss",))), arguments.pop("floor", 0.0)
    if (kind := arguments.pop("splitter", None)) is not None:
        arguments["splitter"] = SPLITTERS[kind](seed)
    if arguments.pop("expected_error", False):
        arguments["val_loss_fn"] = expected_error
    if method.weighs == "fixed":
        arguments["validation"] = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(problem.inputs[apart], problem.labels[apart]),
            batch_sampler=torch.utils.data.BatchSampler(
                torch.utils.data.RandomSampler(range(len(apart))), batch_size, drop_last=len(apart) > batch_size
            ),
        )
    return MetaReweighter(
        model,
        optimizer,
        weighting=SignalWeighting(signals, num_classes=classes, floor=floor),
        seed=seed,
        **arguments,
    )


ERM = Method("ERM")
LRW = {
    name: Method(f"LRW-{name}", "fixed", name.lower(), arguments={"weighting_lr": 1e-2})  # type: ignore[arg-type]
    for name in ("Easy", "Random", "Hard")
}
MOLERE = Method("MOLERE", "molere", arguments={"floor": FLOOR})
"""At the library's defaults; every other method is without a floor unless it says so, as in the paper."""

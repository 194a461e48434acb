"""What a step reads, and what its commit changes: a reweighter without the hooks and the methods that users call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from torch_molere.distributed.collectives import Gather, broadcast, rank
from torch_molere.history import SampleHistory
from torch_molere.hypergradients import Engine, trained_parameters
from torch_molere.hypergradients.check import EngineChoice
from torch_molere.losses import CorrectFn, PerSampleLoss
from torch_molere.messages import Messages
from torch_molere.result import StepResult, Tally
from torch_molere.shrinkage import Shrinkage
from torch_molere.validation.source import ValidationSource


class Core:
    """The parts of a reweighter. :class:`~torch_molere.MetaReweighter` makes them; a step reads them;
    :func:`torch_molere.step.after_step` alone changes them.

    Attributes:
        model, network: as the loop calls it, and the user's own module inside.
        optimizers: as PyTorch's own classes.
        criterion_of_training, criterion_of_validation: losses of single instances.
        sign: -1 where the objective is to grow.
        sharded: the parameters that FSDP2 has split; None without it.
        correct_fn, order, every, warmup_steps, max_weight, seed: as they were given.
        weighting, weighting_optimizer: φ; None without parameters.
        validation: where validation instances come from, with the splitter Θ.
        shrinkage: λ.
        history: what is known of each row.
        engines: the engine in use; also counts the meta-updates.
        steps: optimizer steps so far.
        result: of the latest step.
        with_statistics: the networks that have running statistics.
        configuration: what a state must fit.
        gather: of the ranks' messages.
        messages, tally: what was said, and what is counted.
        checking: a dry run is on.
        batch_checked: whether what validation is made of was seen to work.
    """

    model: nn.Module
    network: nn.Module
    optimizers: list[Optimizer]
    criterion_of_training: PerSampleLoss
    criterion_of_validation: PerSampleLoss
    sign: float
    sharded: list[nn.Parameter] | None
    correct_fn: CorrectFn | None
    order: str
    every: int
    warmup_steps: int
    max_weight: float | None
    seed: int
    weighting: nn.Module
    weighting_optimizer: Optimizer | None
    validation: ValidationSource
    shrinkage: Shrinkage
    history: SampleHistory
    engines: EngineChoice
    steps: int
    result: StepResult | None
    with_statistics: Sequence[nn.Module]
    configuration: dict[str, object]
    gather: Gather
    messages: Messages
    tally: Tally
    checking: bool
    batch_checked: bool
    _started: bool

    @property
    def engine(self) -> Engine:
        """The hypergradient engine in use; ``"auto"`` until the first meta-update has found one."""
        return self.engines.engine

    @property
    def meta_updates(self) -> int:
        """Meta-updates so far."""
        return self.engines.updates

    @property
    def warming_up(self) -> bool:
        """Whether the next step still is one of plain training with a random split."""
        return self.steps < self.warmup_steps

    @property
    def meta_update_is_due(self) -> bool:
        """Whether the next step has a meta-update."""
        return not self.warming_up and (self.steps - self.warmup_steps) % self.every == 0

    def owners(self) -> list[nn.Parameter]:
        """The parameters that are looked ahead at."""
        if self.sharded is not None:  # after a forward others stand in the modules
            return [owner for owner in self.sharded if owner.requires_grad]
        return trained_parameters(self.optimizers, (self.network, *self.criterion_of_training.modules))

    def seed_of(self, number: int) -> int:
        """A seed for the number-th random draw of the present step, the same if the step is taken again."""
        return ((self.seed * 1_000_003 + self.steps) * 10_007 + number + rank() * 101) % 2**63

    def start(self) -> None:
        """Before the first loss: every rank starts from the first one's φ and Θ."""
        if self._started:
            return
        for network in (self.weighting, getattr(self.validation, "splitter", None)):
            if network is not None:
                broadcast(network)
        self._started = True
        if self.steps == 0:
            self.messages.at_start(self.optimizers)

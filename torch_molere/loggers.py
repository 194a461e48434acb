"""``reweighter.metrics()`` in the loggers that people have. Each needs its own library, imported when it is made.

Every other logger takes the dict itself: ``wandb.log(reweighter.metrics())``, ``mlflow.log_metrics(metrics, step)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_molere.arguments import check_count

if TYPE_CHECKING:
    from torch_molere.reweighter import MetaReweighter


class TensorBoardLogger:
    """Writes metrics and histograms of weights, margins and meta-gradients for TensorBoard.

    Call :meth:`step` after each training step. Names begin with ``molere/``.

    Args:
        reweighter: whose metrics are written.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or the folder for a new one.
        every: write at every so many optimizer steps.

    Raises:
        ImportError: for a folder, without ``pip install tensorboard``.
        ValueError: if ``every`` is no positive integer.
    """

    def __init__(self, reweighter: MetaReweighter, writer: Any, *, every: int = 100) -> None:
        self.reweighter = reweighter
        self.every = check_count("every", every, 1)
        if not hasattr(writer, "add_scalar"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoardLogger needs tensorboard: pip install tensorboard") from error
            writer = SummaryWriter(writer)
        self.writer = writer

    def step(self) -> None:
        """Write if a multiple of ``every`` steps has been taken."""
        if self.reweighter.steps % self.every == 0:
            self.write()

    def write(self) -> None:
        """Write now."""
        step = self.reweighter.steps
        for name, value in self.reweighter.metrics().items():
            self.writer.add_scalar(f"molere/{name}", value, step)
        if self.reweighter.result is not None:
            self.writer.add_histogram("molere/batch/weight", self.reweighter.result.weights, step)
        table = self.reweighter.history.table()
        for name in ("weight", "running_margin", "meta_gradient"):
            known = table[name][table[name].isfinite()]
            if len(known):
                self.writer.add_histogram(f"molere/rows/{name}", known, step)


def lightning_callback(reweighter: MetaReweighter, *, every: int = 50) -> Any:
    """A ``lightning.Callback`` that logs ``reweighter.metrics()`` under ``molere/`` at every so many steps.

    Raises:
        ImportError: without ``pip install lightning``.
        ValueError: if ``every`` is no positive integer.
    """
    check_count("every", every, 1)
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise ImportError("lightning_callback needs lightning: pip install 'torch-molere[lightning]'") from error

    class MolereMetrics(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if reweighter.steps % every == 0:
                pl_module.log_dict({f"molere/{name}": value for name, value in reweighter.metrics().items()})

    return MolereMetrics()


def trainer_callback(reweighter: MetaReweighter, *, resume_from: str | Path | None = None) -> Any:
    """A ``transformers.TrainerCallback`` that adds ``reweighter.metrics()`` to the Trainer's logs, under ``molere/``,
    and keeps the reweighter's state in each of the Trainer's checkpoints (in several processes one file a process).

    Args:
        reweighter: of the Trainer's model and optimizer.
        resume_from: the checkpoint's folder, where it is none of ``output_dir``.

    Raises:
        ImportError: without ``pip install transformers``.
        FileNotFoundError: when training resumes from a checkpoint that does not hold the reweighter's state.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("trainer_callback needs transformers: pip install 'torch-molere[transformers]'") from error

    def file(args: Any, folder: str | Path) -> Path:
        return Path(folder) / ("reweighter.pt" if args.world_size == 1 else f"reweighter{args.process_index}.pt")

    def checkpoint(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    class Molere(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is not None:
                logs.update({f"molere/{name}": value for name, value in reweighter.metrics().items()})

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(reweighter.state_dict(), file(args, folder))

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                return
            saved = file(args, resume_from or checkpoint(args, state))
            if not saved.exists():
                raise FileNotFoundError(
                    f"training resumes at step {state.global_step}, but there is no {saved} with the reweighter's "
                    "state: give trainer_callback(resume_from=...) the folder of a checkpoint that was written with it"
                )
            reweighter.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))

    return Molere()

"""Metrics in the loggers that people have."""

import pytest
import torch
from torch import nn

from torch_molere import MetaReweighter
from torch_molere.loggers import TensorBoardLogger, lightning_callback, trainer_callback


def made(model=None, optimizer=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 3) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    validation = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    return MetaReweighter(model, optimizer, validation=validation, every=1, warmup_steps=0)


def batch():
    return torch.randn(6, 4), torch.randint(3, (6,)), torch.arange(6)


def test_tensorboard_has_all_metrics_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reweighter = made()
    logger = TensorBoardLogger(reweighter, tmp_path, every=2)
    expected = {}
    for _ in range(5):
        reweighter.step(batch())
        logger.step()
        if reweighter.steps % 2 == 0:
            expected[reweighter.steps] = reweighter.metrics()
    logger.writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    names = {f"molere/{name}" for metrics in expected.values() for name in metrics}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        kept = {event.step: event.value for event in events.Scalars(name)}
        assert kept == pytest.approx({s: m[name[7:]] for s, m in expected.items() if name[7:] in m}, rel=1e-5)
    rows = ("weight", "running_margin", "meta_gradient")
    assert set(events.Tags()["histograms"]) == {"molere/batch/weight", *(f"molere/rows/{name}" for name in rows)}
    assert events.Histograms("molere/rows/weight")[-1].histogram_value.num == 6


def test_lightning_logs_the_metrics(tmp_path):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def forward(self, inputs):
            return self.layer(inputs)

        def training_step(self, batch):
            return self.criterion(self(batch[0]), batch[1], batch[2])

        def configure_optimizers(self):
            return self.optimizer

    module = Module()
    reweighter = made(module, module.optimizer)
    module.criterion = reweighter.criterion
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callback = lightning_callback(reweighter, every=1)
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, accelerator="cpu", **quiet)
    trainer.fit(module, torch.utils.data.DataLoader([batch(), batch()], batch_size=None))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    metrics = reweighter.metrics()
    assert {f"molere/{name}" for name in metrics} <= set(logged)
    assert logged["molere/meta_updates"] == metrics["meta_updates"] == 2


def test_the_trainer_logs_the_metrics():
    reweighter, logs = made(), {"loss": 1.0}
    reweighter.step(batch())
    trainer_callback(reweighter).on_log(None, None, None, logs=logs)
    assert logs == {"loss": 1.0, **{f"molere/{name}": value for name, value in reweighter.metrics().items()}}


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every must be"):
        TensorBoardLogger(made(), tmp_path, every=0)
    with pytest.raises(ValueError, match="every must be"):
        lightning_callback(made(), every=0)

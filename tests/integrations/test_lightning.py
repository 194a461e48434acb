"""Lightning with one line in ``training_step`` is the plain loop, bit for bit."""

import pytest
import torch
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter, ValidationBuffer, with_indices

lightning = pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def loader():
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(96, 6, generator=generator), torch.randint(3, (96,), generator=generator)
    )
    return torch.utils.data.DataLoader(with_indices(data), batch_size=16)


def reweighting(model, optimizer):
    validation = ValidationBuffer(fraction=0.2, hold_out=True)
    return MetaReweighter(model, optimizer, validation=validation, warmup_steps=3, every=2)


class Classifier(lightning.LightningModule):
    """As people have it: ``criterion`` takes the reweighter's place for one, and is called as before."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.criterion = nn.CrossEntropyLoss()
        self.saved = None
        self.validated = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch):
        inputs, targets, indices = batch
        return self.criterion(self(inputs), targets, indices)

    def validation_step(self, batch):
        inputs, targets, _ = batch
        loss = self.criterion(self(inputs), targets)
        self.validated.append(torch.equal(loss, nn.functional.cross_entropy(self(inputs), targets)))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.reweighter = reweighting(self, optimizer)
        self.criterion = self.reweighter.criterion
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["reweighter"] = self.reweighter.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.saved = checkpoint["reweighter"]

    def on_fit_start(self):
        if self.saved is not None:
            self.reweighter.load_state_dict(self.saved)


class Manual(Classifier):
    """Backward and step are the module's own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        inputs, targets, indices = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.reweighter.loss(self(inputs), targets, indices))
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


def trainer(tmp_path, **options):
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return lightning.Trainer(**(settings | quiet | options))


def plain(accumulate=1, clip=None, precision=None):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    reweighter = reweighting(model, optimizer)
    for _ in range(3):
        for number, (inputs, targets, indices) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
                loss = reweighter.loss(model(inputs), targets, indices)
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return model, reweighter


@pytest.mark.parametrize(
    ("kind", "plainly", "options"),
    [
        (Classifier, {}, {}),
        (Classifier, {"accumulate": 2, "clip": 0.5}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        (Classifier, {"precision": "bf16"}, {"precision": "bf16-mixed"}),
        (Manual, {}, {}),
    ],
)
def test_fit_is_the_plain_loop(tmp_path, kind, plainly, options):
    model, reweighter = plain(**plainly)
    assert not torch.equal(network()[0].weight, model[0].weight)
    module = kind()
    trainer(tmp_path, **options).fit(module, loader(), loader())
    assert_same(module.network.state_dict(), model.state_dict())
    assert_same(module.reweighter.state_dict(), reweighter.state_dict())
    assert module.reweighter.steps == 18 // plainly.get("accumulate", 1)
    assert module.reweighter.meta_updates > 0
    assert module.reweighter.engine == reweighter.engine == "finite"
    assert module.validated
    assert all(module.validated)


def test_resuming_is_never_having_stopped(tmp_path):
    whole, stopped, resumed = Classifier(), Classifier(), Classifier()
    trainer(tmp_path).fit(whole, loader())
    first = trainer(tmp_path, max_epochs=2)
    first.fit(stopped, loader())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer(tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.saved is not None
    assert_same(resumed.network.state_dict(), whole.network.state_dict())
    assert_same(resumed.reweighter.state_dict(), whole.reweighter.state_dict())

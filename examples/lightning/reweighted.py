"""A LightningModule with a criterion, a schedule and checkpoints."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_molere import MetaReweighter, with_indices

import lightning as pl


class Classifier(pl.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.lr = lr
        self.losses = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch):
        inputs, targets, indices = batch
        loss = self.criterion(self(inputs), targets, indices)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        self.criterion = MetaReweighter(self, optimizer, loss_fn=nn.CrossEntropyLoss()).criterion
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)]


def rows(count=256):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 20, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(dim=1))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", default="runs/lightning")
    args = parser.parse_args(argv)
    pl.seed_everything(0)
    loader = DataLoader(with_indices(rows()), batch_size=32, shuffle=True)
    model = Classifier()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="auto",
        default_root_dir=args.folder,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader)
    return model.losses


if __name__ == "__main__":
    main()

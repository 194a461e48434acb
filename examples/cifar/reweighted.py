"""CIFAR-10 with crops and flips, SGD and a cosine schedule; the best checkpoint is kept, and a run can be resumed."""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch_molere import MetaReweighter, with_indices
from torchvision import datasets
from torchvision.models import resnet18
from torchvision.transforms import v2

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def loaders(args):
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augmented = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *to_tensor])
    if args.data == "fake":
        train, test = (
            datasets.FakeData(12, (3, 32, 32), 10, augmented),
            datasets.FakeData(6, (3, 32, 32), 10, v2.Compose(to_tensor)),
        )
    else:
        train = datasets.CIFAR10(args.data, train=True, download=True, transform=augmented)
        test = datasets.CIFAR10(args.data, train=False, transform=v2.Compose(to_tensor))
    loader = DataLoader(with_indices(train), args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    return loader, DataLoader(test, 500, num_workers=args.workers)


def network():
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # for small images
    return model


@torch.no_grad()
def evaluate(model, loader, device):
    model.eval()
    return sum((model(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in loader) / len(loader.dataset)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="folder for CIFAR-10, or 'fake'")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, test_loader = loaders(args)
    model = network().to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    parts["reweighter"] = reweighter = MetaReweighter(model, optimizer, loss_fn=criterion)
    first, best, losses = 0, 0.0, []
    if args.resume:
        state = torch.load(args.out / "last.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, best = state["epoch"] + 1, state["best"]
    for epoch in range(first, args.epochs):
        torch.manual_seed(epoch)  # a resumed run sees the data in the same order
        model.train()
        for inputs, targets, indices in train_loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = reweighter.loss(model(inputs), targets, indices)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        accuracy = evaluate(model, test_loader, device)
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, {100 * accuracy:.2f} % right")
        state = {
            **{name: part.state_dict() for name, part in parts.items()},
            "epoch": epoch,
            "best": max(best, accuracy),
        }
        torch.save(state, args.out / "last.pt")
        if accuracy > best:
            best = accuracy
            torch.save(model.state_dict(), args.out / "best.pt")
    return losses


if __name__ == "__main__":
    main()

"""A first network on MNIST: two convolutions, Adadelta, and a learning rate that falls each epoch."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.fc = nn.Linear(32 * 12 * 12, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.log_softmax(self.fc(torch.flatten(F.max_pool2d(x, 2), 1)), dim=1)


def train(model, loader, criterion, optimizer, device):
    model.train()
    losses = []
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = criterion(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test(model, loader, device):
    model.eval()
    right = 0
    with torch.no_grad():
        for data, target in loader:
            right += (model(data.to(device)).argmax(dim=1) == target.to(device)).sum().item()
    return right / len(loader.dataset)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="folder for MNIST, or 'fake'")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    if args.data == "fake":
        train_set = test_set = datasets.FakeData(96, (1, 28, 28), 10, transform)
    else:
        train_set = datasets.MNIST(args.data, train=True, download=True, transform=transform)
        test_set = datasets.MNIST(args.data, train=False, transform=transform)
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, 1000)
    model = Net().to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    criterion = nn.NLLLoss()
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    losses = []
    for epoch in range(args.epochs):
        losses += train(model, train_loader, criterion, optimizer, device)
        print(f"epoch {epoch}: {100 * test(model, test_loader, device):.2f} % right")
        scheduler.step()
    return losses


if __name__ == "__main__":
    main()

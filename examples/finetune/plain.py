"""A pretrained ResNet on a folder of images: the head first, then all of it; two optimizers, AMP, clipping."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a folder of images in folders of their classes")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name, or 'none' to start anew")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--frozen-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(args.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    dataset = datasets.ImageFolder(args.data, transform)
    loader = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    model = models.get_model(args.model, weights=None if args.weights == "none" else args.weights)
    model.fc = nn.Linear(model.fc.in_features, len(dataset.classes))
    model.to(device)
    backbone = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    first = torch.optim.SGD(backbone, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    second = torch.optim.AdamW(model.fc.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    losses = []
    for epoch in range(args.epochs):
        for parameter in backbone:
            parameter.requires_grad_(epoch >= args.frozen_epochs)
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = criterion(model(inputs), targets)
            for optimizer in (first, second):
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in (first, second):
                optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

"""A table in NumPy arrays and a small network, as somebody does who comes from scikit-learn.

There one would give ``fit(X, y, sample_weight=w)``, and would have to know w. The reweighted script learns it while it
trains: which rows help rows that can be trusted. Rare classes get more than one, wrong labels less.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def table(seed):
    """Digits: the last classes are rare, and three labels in ten are wrong; but a few rows of each class are right."""
    random = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
    keep = random.random(len(y)) < np.where(y >= 7, 0.3, 1.0)
    x, y = x[keep], y[keep]
    x, x_trusted, y, y_trusted = train_test_split(x, y, test_size=50, stratify=y, random_state=seed)
    wrong = random.random(len(y)) < 0.3
    y[wrong] = random.integers(10, size=wrong.sum())
    scaler = StandardScaler().fit(x)
    x, x_trusted, x_test = (scaler.transform(part).astype(np.float32) for part in (x, x_trusted, x_test))
    return x, y, x_trusted, y_trusted, x_test, y_test


def fit(x, y, x_trusted, y_trusted, epochs, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    x, y = np.concatenate([x, x_trusted]), np.concatenate([y, y_trusted])
    rows = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    losses = []
    for _ in range(epochs):
        for inputs, targets in DataLoader(rows, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, losses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    *train, x_test, y_test = table(args.seed)
    model, losses = fit(*train, args.epochs, args.seed)
    with torch.no_grad():
        predicted = model(torch.from_numpy(x_test)).argmax(dim=1).numpy()
    print(f"balanced accuracy {100 * balanced_accuracy_score(y_test, predicted):.1f} %")
    return losses


if __name__ == "__main__":
    main()

"""A run whose report is worth looking at: CIFAR-10 with people's labels, on frozen features, recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import models
from benchmarks.catalogue import FEATURES
from benchmarks.data import read
from benchmarks.problems import Drawing
from torch_molere import MetaReweighter, with_indices
from torch_molere.report import Recorder, Run, label_issues

PEOPLE = ("label_random1", "label_random2", "label_random3")


def run(
    root: Annotated[Path, typer.Option(help="The folder with cifar10/.")] = Path("data"),
    cache: Annotated[Path, typer.Option(help="Where features are kept.")] = Path("runs/cache"),
    out: Annotated[Path, typer.Option(help="Folder of the recorded run.")] = Path("runs/people"),
    labels: Annotated[str, typer.Option(help="A label column of CIFAR-10N.")] = "label_aggregate",
    rows: Annotated[int, typer.Option(min=100, help="Training rows.")] = 8_000,
    trusted: Annotated[int, typer.Option(min=10, help="Trusted rows, for validation.")] = 500,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Train a head on features of CIFAR-10 with people's labels, record it, and keep the rows' images beside."""
    torch.set_num_threads(1)
    setting = replace(FEATURES, rows=rows, labels=labels, trusted=trusted)
    corpus = read(setting.data, root, cache)
    problem = Drawing(setting, corpus).problem(0)
    torch.manual_seed(0)
    model = models.build("mlp", tuple(problem.inputs.shape[1:]), problem.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=1e-4)
    chosen = problem.trusted
    validation = DataLoader(TensorDataset(problem.inputs[chosen], problem.labels[chosen]), batch_size=50, shuffle=True)
    train = TensorDataset(problem.inputs, problem.labels)
    loader = DataLoader(with_indices(train), batch_size=100, shuffle=True)
    recorder = Recorder(MetaReweighter(model, optimizer, validation=validation), out)
    for epoch in range(epochs):
        for batch in loader:
            recorder.reweighter.step(batch)
        with torch.no_grad():
            right = (model(problem.test.inputs).argmax(dim=1) == problem.test.labels).double().mean()
        recorder.record(epoch=epoch, test_accuracy=float(right))
    images = read(setting.data.removeprefix("features:"), root, cache).train
    places = np.linspace(0, len(images) - 1, len(corpus.train)).round().astype(int)
    np.save(out / "images.npy", images.values[places[problem.source]])
    table = Run(out).rows()
    wrong = (problem.labels != problem.clean).numpy()[table.index]
    missed = sum((corpus.train.labels[name][problem.source] != problem.clean.numpy()).astype(int) for name in PEOPLE)[
        table.index
    ]
    issues = label_issues(table)
    probability = issues.probability.reindex(table.index).to_numpy()
    typer.echo(f"wrong labels {wrong.mean():.3f}, estimated {issues.rate:.3f}")
    typer.echo(f"found with probability > 1/2: {len(issues.rows)}, of them wrong {wrong[probability > 0.5].mean():.3f}")
    for name, score in (("probability", probability), ("-weight", -table["weight"]), ("-margin", -table["margin"])):
        area, agreement = roc_auc_score(wrong, score), spearmanr(score, missed).statistic
        typer.echo(f"{name}: AUROC {area:.3f}; rank correlation with annotators who missed the class {agreement:.3f}")
    typer.echo(f"python -m torch_molere report {out} --images {out / 'images.npy'} --classes …")

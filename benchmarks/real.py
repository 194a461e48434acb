"""Real scale: one training run of a large model on images from files, on one accelerator or several.

python -m benchmarks real --data cifar10 --model wrn-28-10 --labels random:0.4 --trusted 1000 --method trusted
torchrun --nproc-per-node 8 -m benchmarks real --data imagefolder:DIR --model resnet50 --epochs 90 --amp bf16
torchrun --nproc-per-node 8 -m benchmarks real --data parquet:DIR --model vit_b_16 --pretrained --image-size 224 \
    --optimizer adamw --lr 1e-4
"""

# ruff: noqa: RUF009  (an option's default is a field, not a value shared by instances)
from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torchvision
import typer
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms import v2

from benchmarks import models
from benchmarks.data import Rows, decode, label_columns, parquet_tests
from benchmarks.problems import first_of_each, long_tail, mislabelled
from torch_molere import MetaReweighter, RandomWeighting, with_indices

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Method = Literal["plain", "random weights", "default", "trusted"]
DATA, RUN = Path("data"), Path("runs/real")
WARMUP = 0.05
"""The share of the steps in which the rate rises."""


def _option(default: Any, text: str, **checked: Any) -> Any:
    return field(default=default, metadata={"option": typer.Option(help=text, **checked)})


@dataclass(frozen=True)
class Options:
    """What a run is made of: the options of the command line."""

    data: str = _option("cifar10", "cifar10, cifar100, imagefolder:DIR or parquet:DIR.")
    root: Path = _option(DATA, "Where CIFAR lies.")
    download: bool = _option(False, "Fetch CIFAR into --root.")
    out: Path = _option(RUN, "Folder of the run; one for each.")
    model: str = _option("resnet50", "wrn-28-10, resnet32 or any torchvision classifier, such as resnet50, vit_b_16.")
    pretrained: bool = _option(False, "Start from torchvision's ImageNet weights.")
    method: Method = _option("default", "trusted: the default with the trusted rows for validation.")
    image_size: int | None = _option(None, "Default: the images' own.", min=8)
    labels: str = _option("label", "A label column, random:RATE or next:RATE.")
    imbalance: float = _option(1.0, "Long tail: so many times the rows of the last class in the first.", min=1.0)
    rows: int | None = _option(None, "Train on so many.", min=2)
    trusted: int = _option(0, "Further rows with clean labels, trained on too.", min=0)
    epochs: int = _option(100, "Passes over the rows.", min=1)
    batch_size: int = _option(128, "Of all processes together.", min=2)
    lr: float = _option(0.1, "Rate, which rises for 5 % of the steps and falls by a cosine.")
    weight_decay: float = _option(5e-4, "Of the optimizer.")
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "sgd (momentum 0.9, Nesterov's) or adamw.")
    amp: Literal["off", "bf16", "fp16"] = _option("off", "Autocast: bf16, or fp16 with a GradScaler.")
    every: int = _option(5, "Steps from one meta-update to the next.", min=1)
    warmup_steps: int = _option(100, "Steps before the first.", min=0)
    workers: int = _option(4, "Processes that read images.", min=0)
    device: str = _option("auto", "auto, cpu, cuda, …")
    seed: int = _option(0, "Of everything random.", min=0)
    resume: bool = _option(False, "Go on from the folder's checkpoint.")


def command(run: Callable[[Options], None]) -> Callable[..., None]:
    """``run`` as a function with an argument for each option, as typer reads it."""
    types = get_type_hints(Options)
    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[types[each.name], each.metadata["option"]],
        )
        for each in fields(Options)
    ]

    @wraps(run)
    def with_options(**given: Any) -> None:
        run(Options(**given))

    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


class Files(Dataset[tuple[Any, int]]):
    """Images and class indices.

    Args:
        image: reads a row's image.
        rows: which rows, ``(N,)``.
        labels: ``(N,)``.
        transform: from an image to a tensor.
    """

    def __init__(self, image: Callable[[int], Image.Image], rows: Rows, labels: Rows, transform: Any) -> None:
        self.image, self.rows, self.labels, self.transform = image, rows, labels, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.transform(self.image(int(self.rows[place]))), int(self.labels[place])


class _Encoded:
    """Reads rows of a parquet table."""

    def __init__(self, table: pa.Table) -> None:
        self.encoded = pa.compute.struct_field(table.column("image"), "bytes").combine_chunks()

    def __call__(self, row: int) -> Image.Image:
        return decode(self.encoded[row].as_py())


class _Paths:
    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __call__(self, row: int) -> Image.Image:
        return torchvision.datasets.folder.pil_loader(self.paths[row])


class _Arrays:
    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])


Source = tuple[Callable[[int], Image.Image], dict[str, Rows]]


def sources(options: Options) -> tuple[Source, Source]:
    """How to read training and test images, with their label columns.

    Raises:
        typer.BadParameter: for data that is not there or of another form.
    """
    kind, _, place = options.data.partition(":")
    train: Source
    test: Source
    if kind in ("cifar10", "cifar100") and not place:
        dataset = torchvision.datasets.CIFAR10 if kind == "cifar10" else torchvision.datasets.CIFAR100
        try:
            parts = [dataset(options.root, train=part, download=options.download) for part in (True, False)]
        except RuntimeError as error:
            raise typer.BadParameter(
                f"{kind} is not (or not complete) in {options.root}; give --download or another --root",
                param_hint="--root",
            ) from error
        train, test = ((_Arrays(part.data), {"label": np.array(part.targets)}) for part in parts)
    elif kind == "imagefolder" and place:
        try:
            folders = [torchvision.datasets.ImageFolder(f"{place}/{part}") for part in ("train", "val")]
        except FileNotFoundError as error:
            raise typer.BadParameter(
                f"{error}; DIR needs train/<class>/<image> and val/<class>/<image>", param_hint="--data"
            ) from error
        if folders[0].classes != folders[1].classes:
            odd = sorted(set(folders[0].classes) ^ set(folders[1].classes))
            raise typer.BadParameter(f"in one of train and val only: {', '.join(odd)}", param_hint="--data")
        train, test = (
            (_Paths([path for path, _ in part.samples]), {"label": np.array(part.targets)}) for part in folders
        )
    elif kind == "parquet" and place:
        files = [path for path in parquet_tests(Path(place)) if path.exists()]
        if not files or not (Path(place) / "train.parquet").exists():
            raise typer.BadParameter(
                f"{place} needs train.parquet and either test.parquet or val.parquet", param_hint="--data"
            )
        tables = pq.read_table(Path(place) / "train.parquet"), pq.read_table(files[0])
        train, test = ((_Encoded(table), label_columns(table)) for table in tables)
    else:
        raise typer.BadParameter(
            f"{options.data!r} is unknown; take cifar10, cifar100, imagefolder:DIR or parquet:DIR", param_hint="--data"
        )
    return train, test


@dataclass(frozen=True)
class Data:
    """What one run reads: training rows (the trusted ones last), trusted rows, test rows; and C."""

    train: Dataset[Any]
    trusted: Dataset[Any]
    test: Dataset[Any]
    classes: int
    size: int


def load(options: Options) -> Data:
    """The data of a run, cut down and relabelled as the options say."""
    (image, columns), (test_image, test_columns) = sources(options)
    clean, test = columns["label"], test_columns["label"]
    classes = int(max(clean.max(), test.max())) + 1
    random = np.random.default_rng(options.seed)
    rows = random.permutation(len(clean))
    trusted = first_of_each(clean[rows], np.full(classes, -(-options.trusted // classes)))[: options.trusted]
    apart = rows[trusted]
    rows = np.delete(rows, trusted)[: options.rows]
    if options.imbalance != 1.0:
        rows = rows[long_tail(clean[rows], options.imbalance)]
    kind, _, rate = options.labels.partition(":")
    if not rate and kind not in columns:
        raise typer.BadParameter(
            f"there is no label column {kind!r}; there are {', '.join(columns)}", param_hint="--labels"
        )
    labels = mislabelled(clean[rows], kind, float(rate), classes, random) if rate else columns[kind][rows]
    size = options.image_size or min(image(int(rows[0])).size)
    augmenting, resizing = transforms(size)
    train = [Files(image, rows, labels, augmenting), Files(image, apart, clean[apart], augmenting)]
    return Data(ConcatDataset(train), train[1], Files(test_image, np.arange(len(test)), test, resizing), classes, size)


def transforms(size: int) -> tuple[v2.Transform, v2.Transform]:
    """Of training and test images: crops with a border up to 64 pixels, resized crops above; flips."""
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
    resize = [v2.Resize(size), v2.CenterCrop(size)]
    crop = [*resize, v2.RandomCrop(size, padding=size // 8)] if size <= 64 else [v2.RandomResizedCrop(size)]
    if size > 64:
        resize = [v2.Resize(round(size / 0.875)), v2.CenterCrop(size)]
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), *to_tensor]), v2.Compose([*resize, *to_tensor])


@contextmanager
def _ranks(device: torch.device) -> Iterator[tuple[int, int]]:
    """This process's rank and their number, as torchrun says; alone without it."""
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    if "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device by name; ``auto`` is the accelerator, if there is one, of this process's local rank."""
    if name != "auto":
        return torch.device(name)
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    device = torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device.index)
    return device


@dataclass
class Run:
    """Everything that a checkpoint holds."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    reweighter: MetaReweighter | None
    epoch: int = 0
    seconds: float = 0.0

    def parts(self) -> dict[str, Any]:
        """By name, what has a state_dict."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return parts if self.reweighter is None else parts | {"reweighter": self.reweighter}

    def save(self, path: Path) -> None:
        """Written at once: a stop leaves the old checkpoint or the new one."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        partial = path.with_suffix(".partial")
        torch.save({**states, "epoch": self.epoch, "seconds": self.seconds}, partial)
        os.replace(partial, path)

    def load(self, path: Path, device: torch.device) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location=device, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.epoch, self.seconds = state["epoch"], state["seconds"]


def prepare(options: Options, data: Data, device: torch.device, ranks: int, steps: int) -> Run:
    """Model, optimizer, schedule and reweighter, the same on every rank."""
    torch.manual_seed(options.seed)
    model = models.build(options.model, (3, data.size, data.size), data.classes, options.pretrained).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer: Optimizer
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), options.lr, momentum=0.9, weight_decay=options.weight_decay, nesterov=True
        )
    rising = max(1, round(WARMUP * steps))
    schedule = [LinearLR(optimizer, 0.01, total_iters=rising), CosineAnnealingLR(optimizer, max(1, steps - rising))]
    scheduler = SequentialLR(optimizer, schedule, milestones=[rising])
    reweighter = None
    if options.method != "plain":
        validation = None
        if options.method == "trusted":
            validation = loader(data.trusted, options, max(2, options.batch_size // 2), shuffled=True)
        reweighter = MetaReweighter(
            wrapped,
            optimizer,
            validation=validation,
            weighting=RandomWeighting() if options.method == "random weights" else None,
            every=options.every,
            warmup_steps=options.warmup_steps,
            seed=options.seed,
        )
    return Run(
        wrapped, optimizer, scheduler, torch.amp.GradScaler(device.type, enabled=options.amp == "fp16"), reweighter
    )


def loader(data: Dataset[Any], options: Options, batch_size: int, shuffled: bool = False, **other: Any) -> Any:
    """Batches, read by worker processes."""
    generator = torch.Generator().manual_seed(options.seed)
    return DataLoader(
        data,
        batch_size,
        shuffle=shuffled,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=generator,
        **other,
    )


def train(options: Options, report: Callable[[str], None]) -> dict[str, Any] | None:
    """Train (or go on with) one run.

    Args:
        options: of which ``resume`` starts from the folder's checkpoint, if there is one.
        report: told of every epoch, on the first rank.

    Returns:
        What was measured; None on other ranks than the first.
    """
    if options.method == "trusted" and not options.trusted:
        raise typer.BadParameter("the method needs trusted rows; give a number of them", param_hint="--trusted")
    device = device_of(options.device)
    data = load(options)
    with _ranks(device) as (rank, ranks):
        rows = with_indices(data.train)
        sampler: DistributedSampler[Any] = DistributedSampler(rows, ranks, rank, seed=options.seed, drop_last=True)
        batches = loader(rows, options, options.batch_size // ranks, sampler=sampler, drop_last=True)
        if not len(batches):
            raise typer.BadParameter(
                f"there are fewer rows than a batch of {options.batch_size}", param_hint="--batch-size"
            )
        run = prepare(options, data, device, ranks, options.epochs * len(batches))
        options.out.mkdir(parents=True, exist_ok=True)
        checkpoint = options.out / f"checkpoint-{rank}.pt"
        if options.resume and checkpoint.exists():
            run.load(checkpoint, device)
        numbers: dict[str, float] = {}
        while run.epoch < options.epochs:
            sampler.set_epoch(run.epoch)
            torch.manual_seed(options.seed + 1_000 * run.epoch + rank)  # so that an epoch is the same after a stop
            start = time.perf_counter()
            loss = _epoch(run, batches, options, device)
            run.epoch += 1
            run.seconds += time.perf_counter() - start
            numbers = evaluate(run.model, data, options, device, rank, ranks)
            run.save(checkpoint)
            if rank == 0:
                report(f"epoch {run.epoch}: loss {loss:.3f}, test accuracy {100 * numbers['accuracy']:.2f} %")
        if not numbers:
            numbers = evaluate(run.model, data, options, device, rank, ranks)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        return numbers | {"seconds": run.seconds, "memory": memory, "ranks": ranks} if rank == 0 else None


def _epoch(run: Run, batches: Any, options: Options, device: torch.device) -> float:
    """One pass, as people write it; returns the mean loss."""
    criterion = nn.CrossEntropyLoss()
    run.model.train()
    total = torch.zeros((), device=device)
    for inputs, targets, indices in batches:
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if device.type == "cuda":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(options.amp, device):
            outputs = run.model(inputs)
            if run.reweighter is None:
                loss = criterion(outputs, targets)
            else:
                loss = run.reweighter.loss(outputs, targets, indices)
        run.optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.scheduler.step()
        total += loss.detach()
    mean = total.item() / len(batches)
    if not np.isfinite(mean):
        raise FloatingPointError("the loss is not finite; lower --lr")
    return mean


def autocast(amp: str, device: torch.device) -> Any:
    """The context of the forward."""
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, options: Options, device: torch.device, rank: int, ranks: int
) -> dict[str, float]:
    """Accuracy, balanced and of the worst class; every rank evaluates its part of the test rows."""
    model.eval()
    counts = torch.zeros(2, data.classes, dtype=torch.double, device=device)
    part = Subset(data.test, range(rank, len(data.test), ranks))  # type: ignore[arg-type]
    network = model.module if isinstance(model, DistributedDataParallel) else model
    for inputs, targets in loader(part, replace(options, workers=min(options.workers, 4)), options.batch_size):
        targets = targets.to(device)
        with autocast(options.amp, device):
            outputs: Tensor = network(inputs.to(device))
        counts[0] += targets.bincount(minlength=data.classes)
        counts[1] += targets[outputs.argmax(dim=1) == targets].bincount(minlength=data.classes)
    if ranks > 1:
        dist.all_reduce(counts)
    model.train()
    total, right = counts
    shares = (right / total)[total > 0]
    return {
        "accuracy": (right.sum() / total.sum()).item(),
        "balanced": shares.mean().item(),
        "worst_class": shares.min().item(),
    }

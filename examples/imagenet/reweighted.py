"""ImageNet as in the large scripts: a process a device, DDP, AMP, MixUp and CutMix, an average of the weights,
clipping, a warm-up schedule, each row several times in a batch, and a run that resumes in the middle of an epoch."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler, default_collate
from torch_molere import MetaReweighter, with_indices
from torchvision import datasets, models
from torchvision.transforms import v2


class RepeatedSampler(Sampler):
    """Each row of a shuffled share of the data comes ``times`` times in a row, differently augmented."""

    def __init__(self, size, times, rank, world, seed=0):
        self.size, self.times, self.rank, self.world, self.seed = size, times, rank, world, seed
        self.epoch = self.start = 0

    def __len__(self):
        return self.size // self.world - self.start

    def __iter__(self):
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        rows = order.repeat_interleave(self.times)[: self.size // self.world * self.world]
        return iter(rows[self.rank :: self.world][self.start :].tolist())


def worker(rank, args):
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo", args.rendezvous, world_size=args.processes, rank=rank)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(args.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    dataset = datasets.ImageFolder(args.data, transform)
    classes = len(dataset.classes)
    sampler = RepeatedSampler(len(dataset), args.repeats, rank, args.processes)
    mix = v2.RandomChoice([v2.MixUp(num_classes=classes, alpha=0.2), v2.CutMix(num_classes=classes)])
    options = {"sampler": sampler, "num_workers": args.workers, "drop_last": True}
    options |= {"collate_fn": lambda items: mix(*default_collate(items)), "generator": torch.Generator()}
    loader = DataLoader(with_indices(dataset), args.batch_size, **options)
    model = DistributedDataParallel(models.get_model(args.model, num_classes=classes).to(device))
    average = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    steps = args.epochs * (len(dataset) // args.processes // args.batch_size)
    warm, cosine = (
        LinearLR(optimizer, 0.1, total_iters=args.warmup),
        CosineAnnealingLR(optimizer, max(1, steps - args.warmup)),
    )
    schedule = SequentialLR(optimizer, [warm, cosine], [args.warmup])
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    reweighter = MetaReweighter(model, optimizer, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    parts = {"model": model.module, "average": average, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    parts["reweighter"] = reweighter
    path = args.out / f"rank{rank}.pt"
    step, losses = 0, []
    if args.resume:
        state = torch.load(path, weights_only=True, map_location=device)
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    per_epoch = len(dataset) // args.processes // args.batch_size
    for epoch in range(step // per_epoch, args.epochs):
        sampler.epoch, sampler.start = epoch, step % per_epoch * args.batch_size
        torch.manual_seed(step)
        model.train()
        for batch in loader:
            images, *targets = (part.to(device) for part in batch)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16, enabled=cuda):
                loss = reweighter.loss(model(images), *targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model.module)
            schedule.step()
            losses.append(loss.item())
            step += 1
            torch.manual_seed(step)  # augmentation is resumed too
            if step % args.save_every == 0:
                torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, path)
            if step == args.stop:
                break
        sampler.start = 0
        if step == args.stop:
            break
    torch.save(losses, args.out / f"losses{rank}.pt")
    dist.destroy_process_group()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a folder of images in folders of their classes")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"))
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128, help="of each process")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--warmup", type=int, default=1000, help="steps")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--stop", type=int, help="after so many steps")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rendezvous = args.out.resolve() / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    args.rendezvous = rendezvous.as_uri()
    torch.multiprocessing.spawn(worker, (args,), args.processes)
    return torch.load(args.out / "losses0.pt")


if __name__ == "__main__":
    main()

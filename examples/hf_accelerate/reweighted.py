"""Text classification with Accelerate and a loop of one's own: accumulation, clipping, a schedule, its checkpoints."""

import argparse
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from torch_molere import MetaReweighter, ValidationBuffer, with_indices


def texts(count, seed=0):
    """Made texts of word numbers, of different lengths: the class is whether word 5 comes up."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 16, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 30, (length,), generator=generator) for length in lengths]
    return [{"input_ids": i, "labels": int((i == 5).any())} for i in ids]


def padded(rows):
    """A dictionary of tensors; the texts are filled up with word 0."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0] if key != "input_ids"}
    batch["input_ids"] = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def accuracy(accelerator, model, loader):
    model.eval()
    right, count = 0, 0
    for batch in loader:
        with torch.no_grad():
            guesses = model(batch["input_ids"], batch["attention_mask"]).logits.argmax(dim=-1)
        guesses, labels = accelerator.gather_for_metrics((guesses, batch["labels"]))
        right, count = right + (guesses == labels).sum().item(), count + len(labels)
    return right / count


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
    )
    set_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_set = with_indices(texts(args.rows))
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, collate_fn=padded)
    test_loader = DataLoader(texts(64, seed=1), 64, collate_fn=padded)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, 4, args.epochs * len(train_loader) // args.accumulate
    )
    model, optimizer, train_loader, test_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, test_loader, schedule
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    reweighter = MetaReweighter(model, optimizer, loss_fn=criterion, validation=ValidationBuffer(padding=0))
    accelerator.register_for_checkpointing(reweighter)
    losses, first = [], 0
    if args.resume:
        accelerator.load_state(args.out / "last")
        first = int((args.out / "epochs").read_text())
    for epoch in range(first, args.epochs):
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                logits = model(batch["input_ids"], batch["attention_mask"]).logits
                loss = reweighter.loss(logits, batch["labels"], batch["index"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch}: {100 * accuracy(accelerator, model, test_loader):.1f} % right")
        accelerator.save_state(args.out / "last")
        (args.out / "epochs").write_text(str(epoch + 1))
    return losses


if __name__ == "__main__":
    main()

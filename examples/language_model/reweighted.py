"""A small GPT on a mixture of sources: token losses with padding, gradient accumulation, bf16 and torch.compile."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_molere import GroupWeighting, MetaReweighter, with_indices

PAD = -100


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    def __init__(self, vocabulary, length, width=64, depth=2, heads=4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.places(places)))


def sequence_loss(logits, targets):
    """(B,): the mean loss of each sequence's own tokens."""
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="none")
    return losses.sum(dim=1) / (targets != PAD).sum(dim=1).clamp_min(1)


def mean_loss(logits, targets):
    return sequence_loss(logits, targets).mean()


def mixture(count, length, vocabulary, generator):
    """Sequences of three sources: a chain of steps of +1, one of +3, and noise; of different lengths."""
    source = torch.arange(count) % 3
    start = torch.randint(vocabulary, (count, 1), generator=generator)
    step = torch.tensor([1, 3, 0])[source].unsqueeze(1)
    tokens = (start + step * torch.arange(length + 1)) % vocabulary
    noise = torch.randint(vocabulary, tokens.shape, generator=generator)
    tokens = torch.where((source == 2).unsqueeze(1), noise, tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    ends = torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    targets[torch.arange(length) >= ends] = PAD
    return inputs, targets, source


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=3000)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(args.seed)
    inputs, targets, source = mixture(args.sequences, args.length, 50, generator)
    wanted = mixture(300, args.length, 50, generator)
    target = TensorDataset(*(part[wanted[2] == 1] for part in wanted[:2]))  # the +3 chains are what counts
    target_loader = DataLoader(target, 16, shuffle=True)
    print(f"sequences of each source: {source.bincount().tolist()}")
    dataset = TensorDataset(inputs, targets)
    model = GPT(50, args.length).to(device)
    if args.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    options = {"weighting": GroupWeighting(source), "validation": target_loader, "shrinkage": None}
    criterion = MetaReweighter(model, optimizer, loss_fn=sequence_loss, **options).criterion
    losses = []
    for _ in range(args.epochs):
        for number, (x, y, rows) in enumerate(DataLoader(with_indices(dataset), 32, shuffle=True)):
            x, y = x.to(device), y.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = criterion(model(x), y, rows)
            (loss / args.accumulate).backward()
            if (number + 1) % args.accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    with torch.no_grad():
        found = [mean_loss(model(x.to(device)), y.to(device)).item() for x, y in target_loader]
    print(f"loss on the target domain {sum(found) / len(found):.4f}")
    return losses


if __name__ == "__main__":
    main()

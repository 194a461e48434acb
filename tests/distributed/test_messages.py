"""What a step sends beside plain training under DDP: one message without a meta-update, a few with one."""

import pytest
import torch
import torch.distributed as dist
from ranks import Messages, in_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_molere import LearnedSplitter, MarginSplitter, MetaReweighter, ValidationBuffer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")

SIZE = 24


def sent(rank, validation, order="after", indices=True):
    """Collectives and bytes of plain training's step, then of each of 13 steps, with whether it had a meta-update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    found = []
    reweighter = None
    for step in range(16):
        if step == 3:  # the gradients' buckets are made anew after the first step
            source = {
                "fixed": lambda: [(torch.randn(12, 6), torch.randint(4, (12,)))],
                "margin": lambda: ValidationBuffer(splitter=MarginSplitter()),
                "learned": lambda: ValidationBuffer(splitter=LearnedSplitter(), hold_out=True),
            }[validation]()
            reweighter = MetaReweighter(network, optimizer, validation=source, warmup_steps=2, every=3, order=order)
        inputs, targets = torch.randn(SIZE - rank, 6), torch.randint(4, (SIZE - rank,))
        rows = torch.arange(SIZE - rank) + 100 * rank + 24 * (step % 3)
        with Messages() as messages:
            optimizer.zero_grad()
            if reweighter is None:
                loss = nn.functional.cross_entropy(network(inputs), targets)
            else:
                loss = reweighter.loss(network(inputs), targets, rows if indices else None)
            loss.backward()
            optimizer.step()
        meta = reweighter is not None and reweighter.result.val_loss is not None
        found.append((meta, len(messages.names), messages.nbytes))
    return found, sum(parameter.numel() for parameter in network.parameters()), reweighter.weighting


@pytest.mark.parametrize(
    ("validation", "order", "most"),
    [("fixed", "after", 4), ("margin", "after", 4), ("learned", "after", 9), ("fixed", "before", 6)],
)
def test_messages(validation, order, most):
    for steps, parameters, weighting in in_ranks(2, sent, validation, order):
        _, base, base_bytes = steps[2]
        plain = [(count - base, nbytes - base_bytes) for meta, count, nbytes in steps[5:] if not meta]
        # (B + 1) rows of ten 64-bit integers.
        assert set(plain) == {(1, 80 * (SIZE + 1))}
        update = [
            (count - base, nbytes - base_bytes) for meta, count, nbytes in steps[7:] if meta
        ]  # the first is checked
        assert len(update) == 3
        phi = sum(parameter.numel() for parameter in weighting.parameters())
        for count, nbytes in update:
            assert count == most
            # The gradients of θ (of the virtual step too, where there is one) and of φ, and some numbers an instance.
            expected = 4 * ((2 if order == "before" else 1) * parameters + phi)
            assert expected <= nbytes <= expected + 200 * SIZE + (4 * 500 if validation == "learned" else 0)


def test_a_step_without_indices_sends_no_more():
    for steps, _, _ in in_ranks(2, sent, "fixed", indices=False):
        assert {count - steps[2][1] for meta, count, _ in steps[5:] if not meta} == {1}

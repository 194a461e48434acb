"""The view of hard and wrong rows against a count by hand."""

import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter, probabilistic_margin


def test_means_by_row_equal_a_count_by_hand():
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    model = nn.Linear(5, 3)
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=3, every=2)
    seen = {row: [] for row in range(40)}
    for step in range(12):
        rows = torch.randperm(40)[:15]
        result = reweighter.step((x[rows], y[rows], rows))
        margin = probabilistic_margin(result.outputs, y[rows])
        loss = F.cross_entropy(result.outputs, y[rows], reduction="none")
        for i, row in enumerate(rows.tolist()):
            held = bool(result.val_mask[i])
            weight = None if step < 3 or result.weights[i] == 0 else float(result.weights[i])
            seen[row].append((float(loss[i]), float(margin[i]), float(margin[i] > 0), float(held), weight))
    table = reweighter.history.table()
    assert table["row"].tolist() == [row for row in range(40) if seen[row]]
    for place, row in enumerate(table["row"].tolist()):
        loss, margin, correct, held, weights = zip(*seen[row], strict=True)
        assert table["seen"][place] == len(loss)
        weights = [w for w in weights if w is not None]
        mean = [
            sum(values) / len(values) if values else float("nan") for values in (loss, margin, correct, held, weights)
        ]
        found = [table[name][place] for name in ("loss", "margin", "correct", "held_out", "weight")]
        torch.testing.assert_close(torch.stack(found), torch.tensor(mean), equal_nan=True, rtol=1e-5, atol=1e-6)

    other = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=3, every=2)
    other.load_state_dict(reweighter.state_dict())
    for found, expected in zip(other.history.table().values(), table.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_without_indices_there_is_nothing_to_tell_and_without_classes_no_margin():
    model = nn.Linear(5, 1)
    reweighter = MetaReweighter(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda o, t: (o - t).square().mean(1)
    )
    x = torch.randn(8, 5)
    reweighter.step((x, x[:, :1]))
    assert_same([len(column) for column in reweighter.history.table().values()], [0] * 7)
    reweighter.step((x, x[:, :1], torch.arange(8)))
    assert reweighter.history.table()["margin"].isnan().all()
    assert reweighter.history.table()["seen"].tolist() == [1] * 8


def test_wrong_labels_have_the_smallest_margins():
    torch.manual_seed(0)
    x = torch.randn(400, 10)
    y = (x[:, 0] > 0).long()
    wrong = torch.arange(400) % 10 == 0
    y[wrong] = 1 - y[wrong]
    model = nn.Linear(10, 2)
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=50)
    for _ in range(20):
        for rows in torch.randperm(400).chunk(8):
            reweighter.step((x[rows], y[rows], rows))
    table = reweighter.history.table()
    hardest = table["row"][table["margin"].argsort()[:40]]
    assert wrong[hardest].double().mean() >= 0.5  # a tenth by chance

"""Kinds of tasks: with a clean validation set, training rows whose targets are wrong come to weigh less."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import nn
from torch.utils import _pytree as pytree

from torch_molere import FreeWeighting, MetaReweighter, ValidationBuffer, hypergradient

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, LENGTH, TAGS = 12, 8, 3


def standardised(x):
    x = torch.as_tensor(x, dtype=torch.double)
    return (x - x.mean(dim=0)) / x.std(dim=0).clamp_min(1e-3)


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, outputs)).double()


class Reader(nn.Module):
    """Embeds tokens and attends over those that are not padding; one output a sequence, or one a token."""

    def __init__(self, outputs, tokenwise):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, outputs)
        self.tokenwise = tokenwise
        self.double()

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0]
        if self.tokenwise:
            return self.head(x).transpose(1, 2)
        shown = attention_mask.unsqueeze(2)
        return self.head((x * shown).sum(dim=1) / shown.sum(dim=1))


def tabular():
    x, y = load_wine(return_X_y=True)
    x, y = standardised(x), torch.as_tensor(y)
    return mlp(13, 3), nn.CrossEntropyLoss(label_smoothing=0.1), x, y, (y + 1) % 3


def soft():
    model, _, x, y, wrong = tabular()
    return model, None, x, F.one_hot(y, 3).double() * 0.9 + 0.1 / 3, F.one_hot(wrong, 3).double()


def regression():
    x, y = load_diabetes(return_X_y=True)
    x, y = standardised(x), standardised(y).unsqueeze(1)
    return mlp(10, 1), nn.SmoothL1Loss(), x, y, -2 * y


def multi_label():
    x, digit = load_digits(return_X_y=True)
    x, digit = standardised(x)[:400], torch.as_tensor(digit)[:400]
    y = torch.stack([digit % 2 == 0, digit > 4, digit % 3 == 0], dim=1).double()
    return mlp(64, 3), nn.BCEWithLogitsLoss(), x, y, 1 - y


def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LENGTH + 1, (240,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, VOCABULARY, (240, LENGTH), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def text():
    inputs = sequences()
    y = (inputs["input_ids"] == 5).any(dim=1).long()
    return Reader(2, tokenwise=False), None, inputs, y, 1 - y


def tagged():
    """Each token has a target, padding −100: the criterion as it is takes the mean over the tokens of the batch."""
    inputs = sequences()
    padding = inputs["attention_mask"] == 0
    y = (inputs["input_ids"] % TAGS).masked_fill(padding, -100)
    wrong = ((inputs["input_ids"] + 1) % TAGS).masked_fill(padding, -100)
    return Reader(TAGS, tokenwise=True), nn.CrossEntropyLoss(), inputs, y, wrong


def segmented():
    """Each pixel has a class, the border 255: a fully convolutional network finds a bright rectangle."""
    generator = torch.Generator().manual_seed(0)
    top, left = torch.randint(1, 4, (2, 240, 1, 1), generator=generator)
    down, across = torch.arange(8).view(1, 8, 1), torch.arange(8).view(1, 1, 8)
    y = ((down >= top) & (down < top + 3) & (across >= left) & (across < left + 3)).long()
    x = (y + 0.5 * torch.randn(y.shape, generator=generator)).unsqueeze(1).double()
    border = (down == 0) | (down == 7) | (across == 0) | (across == 7)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, padding=1)).double()
    loss_fn = nn.CrossEntropyLoss(ignore_index=255)
    return model, loss_fn, x, y.masked_fill(border, 255), (1 - y).masked_fill(border, 255)


KINDS = [tabular, soft, regression, multi_label, text, tagged, segmented]


def rows_of(tree, rows):
    return pytree.tree_map(lambda tensor: tensor[rows], tree)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_targets_weigh_less(kind):
    torch.manual_seed(0)
    model, loss_fn, inputs, targets, wrong = kind()
    count = len(targets)
    order = torch.randperm(count)
    clean, rows = order[: count // 4], order[count // 4 :]
    spoilt = torch.zeros(count, dtype=torch.bool)
    spoilt[rows[: len(rows) * 3 // 10]] = True
    given = targets.clone()
    given[spoilt] = wrong[spoilt]
    reweighter = MetaReweighter(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        loss_fn=loss_fn,
        weighting=FreeWeighting(count).double(),
        weighting_lr=0.2,
        validation=[(rows_of(inputs, clean), targets[clean])],
        warmup_steps=0,
        every=1,
    )
    for _ in range(8):
        for part in rows[torch.randperm(len(rows))].split(32):
            reweighter.step((rows_of(inputs, part), given[part], part))
    table = reweighter.history.table()
    assert table["row"].tolist() == sorted(rows.tolist())
    bad = spoilt[table["row"]]
    # On average since the first step, when all weighed one.
    assert table["weight"][bad].mean() < 0.85 * table["weight"][~bad].mean()
    assert table["meta_gradient"][bad].mean() > table["meta_gradient"][~bad].mean() + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_a_central_difference(kind):
    torch.manual_seed(0)
    model, loss_fn, inputs, targets, _ = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    training, validation = ((rows_of(inputs, rows), targets[rows]) for rows in (slice(0, 6), slice(6, 20)))
    weights = torch.rand(6, dtype=torch.double) + 0.5

    def loss_of(batch, parameters, weights=None):
        """The criterion itself; with weights on what each instance gives to it."""
        arguments = ((), batch[0]) if isinstance(batch[0], dict) else ((batch[0],), {})
        outputs = torch.func.functional_call(model, parameters, *arguments)
        criterion = loss_fn or nn.CrossEntropyLoss()
        if weights is None:
            return criterion(outputs, batch[1])
        whole = criterion(outputs, batch[1])  # a mean over all positions that count
        ignored = getattr(criterion, "ignore_index", -100)
        counted = batch[1] != ignored if not batch[1].is_floating_point() else torch.ones_like(batch[1])
        share = counted.reshape(len(counted), -1).double().sum(dim=1)
        each = torch.stack([criterion(outputs[i : i + 1], batch[1][i : i + 1]) for i in range(len(share))])
        parts = each * share / share.sum()
        torch.testing.assert_close(parts.sum(), whole)
        return (weights * parts).sum()

    def after(weights):
        parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        gradients = torch.autograd.grad(loss_of(training, parameters, weights), list(parameters.values()))
        updated = {name: p - 0.3 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        return loss_of(validation, updated).item()

    step = 1e-5
    expected = [(after(weights + step * e) - after(weights - step * e)) / (2 * step) for e in torch.eye(6).double()]
    expected = torch.tensor(expected).double()
    for engine, tolerance in (("forward", 1e-6), ("auto", 1e-4), ("finite", 1e-4)):
        found = hypergradient(model, optimizer, training, validation, weights, loss_fn=loss_fn, engine=engine)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("task", [text, tagged])
def test_batches_padded_to_their_own_longest_text_are_those_padded_to_one_length(task):
    """Masked padding changes nothing, so neither does how much of it there is: with ``ValidationBuffer(padding=...)``
    lengths may differ from batch to batch, and the run is that of batches of one length."""
    found, shapes = [], set()
    for dynamic in (False, True):
        torch.manual_seed(0)
        model, loss_fn, inputs, targets, _ = task()
        buffer = ValidationBuffer(padding={"input_ids": 0, "attention_mask": 0})
        if task is tagged:
            buffer = ValidationBuffer(padding={"input_ids": 0, "attention_mask": 0, "targets": -100})
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        reweighter = MetaReweighter(
            model, optimizer, validation=buffer, loss_fn=loss_fn, warmup_steps=4, every=1, shrinkage=None
        )
        order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
        results = []
        for rows in order.repeat(2).split(6):
            longest = int(inputs["attention_mask"][rows].sum(dim=1).max()) if dynamic else LENGTH
            batch = {name: values[rows, :longest] for name, values in inputs.items()}
            some = targets[rows, :longest] if task is tagged else targets[rows]
            results.append(reweighter.step((batch, some, rows)))
            shapes.add(longest)
        assert reweighter.meta_updates > 60 and max(result.weights.std() for result in results) > 0.01
        found.append((list(model.parameters()), [result.weights for result in results]))
    assert len(shapes) > 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)  # the weighting is in float32

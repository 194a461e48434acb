"""Kinds of data: with a clean validation set, training rows whose targets are wrong come to weigh less."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import nn
from torch.utils import _pytree as pytree

from torch_molere import FreeWeighting, MetaReweighter, hypergradient

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
            return self.head(x)
        shown = attention_mask.unsqueeze(2)
        return self.head((x * shown).sum(dim=1) / shown.sum(dim=1))


def tabular():
    x, y = load_wine(return_X_y=True)
    x, y = standardised(x), torch.as_tensor(y)
    return mlp(13, 3), None, x, y, (y + 1) % 3


def regression():
    x, y = load_diabetes(return_X_y=True)
    x, y = standardised(x), standardised(y)
    return mlp(10, 1), lambda outputs, targets: (outputs.squeeze(1) - targets) ** 2, x, y, -2 * y


def multi_label():
    x, digit = load_digits(return_X_y=True)
    x, digit = standardised(x)[:400], torch.as_tensor(digit)[:400]
    y = torch.stack([digit % 2 == 0, digit > 4, digit % 3 == 0], dim=1).double()

    def loss_fn(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)

    return mlp(64, 3), loss_fn, x, y, 1 - y


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


def token_loss(outputs, targets):
    """The mean over a sequence's own tokens; padding has the target −100."""
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum(dim=1) / (targets != -100).sum(dim=1)


def tagged():
    inputs = sequences()
    padding = inputs["attention_mask"] == 0
    y = (inputs["input_ids"] % TAGS).masked_fill(padding, -100)
    wrong = ((inputs["input_ids"] + 1) % TAGS).masked_fill(padding, -100)
    return Reader(TAGS, tokenwise=True), token_loss, inputs, y, wrong


def rows_of(tree, rows):
    return pytree.tree_map(lambda tensor: tensor[rows], tree)


@pytest.mark.parametrize("kind", [tabular, regression, multi_label, text, tagged])
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
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    reweighter = MetaReweighter(
        model,
        optimizer,
        loss_fn=loss_fn,
        weighting=FreeWeighting(count).double(),
        weighting_lr=0.1,
        validation=[(rows_of(inputs, clean), targets[clean])],
        warmup_steps=0,
        every=1,
    )
    for _ in range(12):
        for part in rows[torch.randperm(len(rows))].split(32):
            reweighter.step((rows_of(inputs, part), given[part], part))
    table = reweighter.history.table()
    assert table["row"].tolist() == sorted(rows.tolist())
    weight, bad = table["weight"], spoilt[table["row"]]
    assert weight[bad].mean() < 0.85 * weight[~bad].mean()  # on average since the first step, when all weighed one


@pytest.mark.parametrize("kind", [tabular, regression, multi_label, text, tagged])
@pytest.mark.parametrize("engine", ["forward", "finite"])
def test_the_meta_gradient_is_a_central_difference(kind, engine):
    torch.manual_seed(0)
    model, loss_fn, inputs, targets, _ = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    training, validation = (((rows_of(inputs, rows), targets[rows])) for rows in (slice(0, 6), slice(6, 20)))
    weights = torch.rand(6, dtype=torch.double) + 0.5
    found = hypergradient(model, optimizer, training, validation, weights, loss_fn=loss_fn, engine=engine)

    def loss_of(batch, parameters):
        arguments = ((), batch[0]) if isinstance(batch[0], dict) else ((batch[0],), {})
        outputs = torch.func.functional_call(model, parameters, *arguments)
        return (loss_fn or (lambda o, t: F.cross_entropy(o, t, reduction="none")))(outputs, batch[1])

    def after(weights):
        parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        gradients = torch.autograd.grad((weights * loss_of(training, parameters)).mean(), list(parameters.values()))
        updated = {name: p - 0.3 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        return loss_of(validation, updated).mean().item()

    step = 1e-5
    expected = [(after(weights + step * e) - after(weights - step * e)) / (2 * step) for e in torch.eye(6).double()]
    tolerance = 1e-6 if engine == "forward" else 1e-4
    expected = torch.tensor(expected).double()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_sequences_wait_in_the_buffer_with_their_masks():
    """Held out of a stream of dicts, and drawn as dicts: each mask with its own tokens."""
    torch.manual_seed(0)
    model, _, inputs, targets, _ = text()
    reweighter = MetaReweighter(model, torch.optim.Adam(model.parameters(), lr=0.01), warmup_steps=2, every=2)
    for rows in torch.arange(240).split(24):
        result = reweighter.step((rows_of(inputs, rows), targets[rows], rows))
    assert result.val_loss is None or torch.isfinite(result.val_loss)
    (arguments, held), _ = reweighter.buffer.draw(1000)
    named = arguments[1]
    assert len(held) == len(reweighter.buffer) > 10
    assert torch.equal(named["attention_mask"], (named["input_ids"] != 0).long())
    assert torch.equal(held, (named["input_ids"] == 5).any(dim=1).long())
    shorter = {name: tensor[:, :6] for name, tensor in rows_of(inputs, slice(0, 24)).items()}
    with pytest.raises(ValueError, match="pad inputs to one length, or pass validation="):
        reweighter.step((shorter, targets[:24], torch.arange(24)))

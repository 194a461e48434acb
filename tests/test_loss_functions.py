"""The loss through the reweighter: what a criterion gives in a plain loop, and what it knows of its targets."""

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_molere import MetaReweighter, ValidationBuffer

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 8, 3
WEIGHT = torch.tensor([0.2, 1.0, 3.0])


class Equal(nn.Module):
    """A weighting that gives everyone the same weight."""

    def forward(self, samples):
        return torch.full_like(samples.losses, 0.3)


def inputs_of(seed, *shape):
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(seed))


def classes_of(seed, *shape):
    return torch.randint(C, (B, *shape), generator=torch.Generator().manual_seed(seed + 100))


def ignoring(value, *shape):
    return lambda seed: torch.where(classes_of(seed, *shape) == 1, value, classes_of(seed, *shape))


def soft(seed):
    lam = torch.rand(B, 1, generator=torch.Generator().manual_seed(seed))
    one_hot = F.one_hot(classes_of(seed), C).float()
    return lam * one_hot + (1 - lam) * one_hot.flip(0)


def labels(seed):
    return (inputs_of(seed + 7, C) > 0).float()


LINEAR, DENSE = (lambda: nn.Linear(4, C)), (lambda: nn.Conv1d(2, C, 1))
CRITERIA = {
    "default": (None, LINEAR, classes_of),
    "plain": (nn.CrossEntropyLoss(), LINEAR, classes_of),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LINEAR, classes_of),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LINEAR, classes_of),
    "-100": (nn.CrossEntropyLoss(), LINEAR, ignoring(-100)),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=1), LINEAR, classes_of),
    "all three": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1, ignore_index=255), LINEAR, ignoring(255)),
    "sum": (nn.CrossEntropyLoss(reduction="sum", weight=WEIGHT), LINEAR, classes_of),
    "soft": (nn.CrossEntropyLoss(), LINEAR, soft),
    "soft, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHT), LINEAR, soft),
    "NLL": (nn.NLLLoss(weight=WEIGHT), lambda: nn.Sequential(nn.Linear(4, C), nn.LogSoftmax(1)), classes_of),
    "dense": (nn.CrossEntropyLoss(weight=WEIGHT), DENSE, lambda seed: classes_of(seed, 5)),
    "dense, ignoring": (nn.CrossEntropyLoss(ignore_index=255), DENSE, ignoring(255, 5)),
    "labels": (nn.BCEWithLogitsLoss(pos_weight=2 * WEIGHT), LINEAR, labels),
    "regression": (nn.MSELoss(), LINEAR, lambda seed: inputs_of(seed + 9, C)),
    "Huber, summed": (nn.HuberLoss(reduction="sum"), LINEAR, lambda seed: inputs_of(seed + 9, C)),
}


@pytest.mark.parametrize("case", CRITERIA)
@pytest.mark.parametrize("phase", ["warm-up", "equal weights", "before"])
def test_equal_weights_are_the_plain_loop_bit_for_bit(case, phase):
    """20. With every option of the criterion kept: θ, its optimizer and the loss."""
    criterion, build, targets_of = CRITERIA[case]
    torch.manual_seed(0)
    model = build()
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, plain))
    options = {"warmup_steps": 100} if phase == "warm-up" else {"warmup_steps": 1, "weighting": Equal(), "every": 2}
    order = "before" if phase == "before" else "after"
    reweighter = MetaReweighter(model, optimizer, loss_fn=criterion, order=order, **options)
    for seed in range(5):
        x, y = inputs_of(seed, *((2, 5) if build is DENSE else (4,))), targets_of(seed)
        loss = (criterion or nn.CrossEntropyLoss())(plain(x), y)
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        result = reweighter.step((x, y, torch.arange(B) + B * seed))
        assert torch.equal(result.loss, loss.detach())
        assert torch.equal(result.weights, torch.ones(B))
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)
    assert (reweighter.meta_updates > 0) == (phase != "warm-up")


@pytest.mark.parametrize("case", ["class weights", "all three", "soft, smoothed", "dense, ignoring", "sum"])
def test_the_meta_gradient_has_the_criterions_normalisation(case):
    """20. Against a central difference through steps really taken, in float64."""
    criterion, build, targets_of = CRITERIA[case]
    criterion = copy.deepcopy(criterion).double()
    torch.manual_seed(0)
    model = build().double()
    shape = (2, 5) if build is DENSE else (4,)
    x, y = inputs_of(0, *shape).double(), targets_of(0)
    held = inputs_of(1, *shape).double(), targets_of(1)
    if y.is_floating_point():
        y, held = y.double(), (held[0], held[1].double())
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"warmup_steps": 0, "every": 1, "hypergradient": "forward", "max_weight": None}
    reweighter = MetaReweighter(model, optimizer, loss_fn=criterion, validation=[held], **options)
    result = reweighter.step((x, y))

    def validation_loss(weights):
        """The per-sample losses by hand: the criterion on each instance alone, times its share of the normaliser."""
        other = copy.deepcopy(start)
        outputs = other(x)
        elements = type(criterion)(
            weight=criterion.weight,
            ignore_index=criterion.ignore_index,
            label_smoothing=criterion.label_smoothing,
            reduction="none",
        )(outputs, y)
        divisor = {"sum": 1.0}.get(criterion.reduction)
        if divisor is None:
            if y.is_floating_point():
                divisor = float(B)
            else:
                counted = (y != criterion.ignore_index).double()
                class_weights = torch.ones(C).double() if criterion.weight is None else criterion.weight
                divisor = (class_weights[y.clamp(0, C - 1)] * counted).sum()
        total = (weights * elements.reshape(B, -1).sum(1)).sum() / divisor
        gradients = torch.autograd.grad(total, list(other.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
        return criterion(other(held[0]), held[1]).detach()

    torch.testing.assert_close(result.val_loss, validation_loss(torch.ones(B).double()))
    h = 1e-5
    for i in range(B):
        unit = h * F.one_hot(torch.tensor(i), B).double()
        difference = (validation_loss(1 + unit) - validation_loss(1 - unit)) / (2 * h)
        torch.testing.assert_close(result.meta_gradient[i], difference, rtol=1e-6, atol=1e-9)


def test_every_target_ignored_says_which():
    """20. A batch without any target is NaN in PyTorch too; here the step is refused."""
    model = nn.Linear(4, C)
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="loss is NaN or infinite for instances"):
        reweighter.step((inputs_of(0, 4), torch.full((B,), -100)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# 21. Soft targets.


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(label_smoothing=0.1), "function"])
@pytest.mark.parametrize("targets", ["soft", "one-hot"])
def test_soft_targets_are_classes(loss_fn, targets):
    """21. The history's accuracy and margins are those of the most probable class."""
    if loss_fn == "function":
        loss_fn = lambda o, t: F.cross_entropy(o, t, reduction="none")  # noqa: E731
    torch.manual_seed(0)
    model = nn.Linear(4, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    validation = ValidationBuffer(fraction=0.3)
    reweighter = MetaReweighter(model, optimizer, loss_fn=loss_fn, validation=validation, warmup_steps=1, every=1)
    for seed in range(3):
        y = soft(seed) if targets == "soft" else F.one_hot(classes_of(seed), C).float()
        reweighter.step((inputs_of(seed, 4), y, torch.arange(B) + B * seed))
        table = {name: column[-B:] for name, column in reweighter.history.table().items()}
        probabilities, classes = model(inputs_of(seed, 4)).softmax(1), y.argmax(1)
        torch.testing.assert_close(table["correct"].float(), (probabilities.argmax(1) == classes).float())
        assert torch.equal(table["target"], classes)
        target = probabilities.gather(1, classes[:, None]).squeeze(1)
        others = probabilities.scatter(1, classes[:, None], -1.0).amax(1)
        torch.testing.assert_close(table["margin"].float(), target - others)
    assert reweighter.meta_updates == 2


def test_labels_are_no_classes():
    """21. With a binary cross-entropy, rows that sum to one are still labels."""
    torch.manual_seed(0)
    model = nn.Linear(4, C)
    options = {"loss_fn": nn.BCEWithLogitsLoss(), "warmup_steps": 1, "every": 1}
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.0), **options)
    y = F.one_hot(classes_of(0), C).float()
    for _ in range(3):
        reweighter.step((inputs_of(0, 4), y, torch.arange(B)))
    table = reweighter.history.table()
    expected = ((model(inputs_of(0, 4)) > 0) == (y > 0.5)).all(1)
    assert torch.equal(table["correct"] == 1, expected)
    assert table["target"].tolist() == [-1] * B
    assert table["margin"].isnan().all()


# 22. Auxiliary heads.

InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head, self.auxiliary = nn.Linear(4, 5), nn.Linear(5, C), nn.Linear(5, C)

    def forward(self, x):
        hidden = self.stem(x).tanh()
        return InceptionOutputs(self.head(hidden), self.auxiliary(hidden)) if self.training else self.head(hidden)


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_auxiliary_heads_are_not_left_out_in_silence(loss_fn):
    """22. Refused at the first step, with the remedy; nothing has changed."""
    model = Inception()
    before = copy.deepcopy(model.state_dict())
    reweighter = MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn)
    with pytest.raises(TypeError, match=r"aux_logits besides .logits, which would get no gradient; pass loss_fn="):
        reweighter.step((inputs_of(0, 4), classes_of(0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert reweighter.steps == 0


def test_auxiliary_heads_train_with_a_loss_of_them():
    """22. As in the plain loop, bit for bit."""

    def both(outputs, targets):
        main, auxiliary = (F.cross_entropy(logits, targets, reduction="none") for logits in outputs)
        return main + 0.4 * auxiliary

    torch.manual_seed(0)
    model = Inception()
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    reweighter = MetaReweighter(model, optimizer, loss_fn=both, warmup_steps=2, every=1, weighting=Equal())
    for seed in range(5):
        x, y = inputs_of(seed, 4), classes_of(seed)
        plain_optimizer.zero_grad()
        both(plain(x), y).mean().backward()
        plain_optimizer.step()
        reweighter.step((x, y))
    assert reweighter.meta_updates > 0
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


# 23. Several losses of one step.


def accumulating(order, seeds=(0, 1), dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    held = inputs_of(50, 4).to(dtype), classes_of(50)
    options = {"warmup_steps": 0, "every": 1, "hypergradient": "forward", "validation": [held], **options}
    reweighter = MetaReweighter(model, optimizer, order=order, **options)
    return reweighter, [(inputs_of(seed, 4).to(dtype), classes_of(seed), torch.arange(B) + B * seed) for seed in seeds]


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_accumulation_in_the_order_before_is_refused(warmup_steps):
    """23. It looks ahead of one batch, and φ would be updated for each. In warm-up already."""
    reweighter, batches = accumulating("before", warmup_steps=warmup_steps)
    phi = copy.deepcopy(reweighter.weighting.state_dict())
    (x, y, rows), second = batches
    reweighter.loss(reweighter.model(x), y, rows).backward()
    with pytest.raises(RuntimeError, match="order='before' takes one loss for each optimizer step"):
        reweighter.loss(reweighter.model(second[0]), *second[1:])
    assert all(torch.equal(value, phi[name]) for name, value in reweighter.weighting.state_dict().items())
    reweighter.optimizers[0].step()
    assert reweighter.steps == 1
    assert reweighter.meta_updates == 1 - warmup_steps
    # A step that was given up is no accumulation.
    for zeroed in (True, False):
        reweighter.loss(reweighter.model(x), y, rows).backward()
        reweighter.optimizers[0].zero_grad(set_to_none=zeroed)
    # Two losses made first and stepped together are refused too.
    losses = [reweighter.loss(reweighter.model(x), y, rows) for x, y, rows in batches]
    reweighter.optimizers[0].zero_grad()
    for loss in losses:
        loss.backward()
    before = copy.deepcopy(reweighter.model.state_dict())
    with pytest.raises(RuntimeError, match="order='before' takes one loss for each optimizer step, as its"):
        reweighter.optimizers[0].step()
    assert all(torch.equal(value, before[name]) for name, value in reweighter.model.state_dict().items())


@pytest.mark.parametrize("scaling", ["not in place", "in place", "unequal"])
def test_result_covers_every_micro_batch(scaling):
    """23. Loss, outputs, weights and the meta-gradient, which a central difference through the whole step confirms."""
    reweighter, batches = accumulating("after")
    model, optimizer = reweighter.model, reweighter.optimizers[0]
    start = copy.deepcopy(model)
    shares = [0.25, 0.75] if scaling == "unequal" else [0.5, 0.5]
    outputs = []
    for (x, y, rows), share in zip(batches, shares, strict=True):
        found = model(x)
        outputs.append(found.detach().clone())
        loss = reweighter.loss(found, y, rows)
        if scaling == "in place":
            loss /= 2
        else:
            loss = loss * share
        loss.backward()
    optimizer.step()
    result = reweighter.result
    losses = torch.stack([F.cross_entropy(start(x), y) for x, y, _ in batches])
    torch.testing.assert_close(result.loss, losses.mean().detach())
    assert torch.equal(result.outputs, torch.cat(outputs))
    sizes = {len(each) for each in (result.weights, result.held_out, result.val_mask, result.meta_gradient)}
    assert sizes == {2 * B}
    held = inputs_of(50, 4).double(), classes_of(50)

    def validation_loss(weights):
        other = copy.deepcopy(start)
        total = sum(
            share * (w * F.cross_entropy(other(x), y, reduction="none")).mean()
            for w, share, (x, y, _) in zip(weights.split(B), shares, batches, strict=True)
        )
        gradients = torch.autograd.grad(total, list(other.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        return F.cross_entropy(other(held[0]), held[1]).detach()

    torch.testing.assert_close(result.val_loss, validation_loss(torch.ones(2 * B).double()))
    for i in range(2 * B):
        unit = 1e-5 * F.one_hot(torch.tensor(i), 2 * B).double()
        difference = (validation_loss(1 + unit) - validation_loss(1 - unit)) / 2e-5
        torch.testing.assert_close(result.meta_gradient[i], difference, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("warming_up", [True, False])
def test_a_loss_scaled_in_place_leaves_result_alone(warming_up):
    """23."""
    reweighter, batches = accumulating("after", warmup_steps=100 if warming_up else 0)
    x, y, rows = batches[0]
    loss = reweighter.loss(reweighter.model(x), y, rows)
    expected = loss.detach().clone()
    loss /= 8
    assert torch.equal(reweighter.result.loss, expected)
    loss.backward()
    reweighter.optimizers[0].step()
    assert torch.equal(reweighter.result.loss, expected)

"""Per-sample losses against the criterion itself and autograd; what is read from outputs and targets by hand."""

import functools
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import loss as torch_losses

from torch_molere.losses import PerSampleLoss, constants_of, expected_error

B, C = 6, 4


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(sum(shape)))


LOGITS, DENSE = drawn(B, C), drawn(B, C, 3, 2)
INDICES, PIXELS = torch.arange(B) % C, torch.arange(B * 6).reshape(B, 3, 2) % C
IGNORED, IGNORED_PIXELS = torch.where(INDICES == 1, -100, INDICES), torch.where(PIXELS == 2, 255, PIXELS)
SOFT, SOFT_DENSE = drawn(B, C).softmax(1), drawn(B, C, 3, 2).softmax(1)
LABELS = (drawn(B, C) > 0).double()
SIGNS = 2 * LABELS - 1
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.double)
LISTED = torch.tensor([[3, 0, -1, 1], [2, -1, 0, 0]] * (B // 2))

CASES = [
    (nn.CrossEntropyLoss(), LOGITS, INDICES),
    (nn.CrossEntropyLoss(), LOGITS, IGNORED),
    (nn.CrossEntropyLoss(ignore_index=2), LOGITS, INDICES),
    (nn.CrossEntropyLoss(weight=WEIGHT), LOGITS, INDICES),
    (nn.CrossEntropyLoss(weight=WEIGHT), LOGITS, IGNORED),
    (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.1), LOGITS, INDICES),
    (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), LOGITS, IGNORED),
    (nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, IGNORED),
    (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), LOGITS, SOFT),
    (nn.CrossEntropyLoss(), DENSE, PIXELS),
    (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255), DENSE, IGNORED_PIXELS),
    (nn.CrossEntropyLoss(weight=WEIGHT), DENSE, SOFT_DENSE),
    (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), LOGITS, IGNORED),
    (nn.CrossEntropyLoss(reduction="sum"), DENSE, PIXELS),
    (nn.NLLLoss(weight=WEIGHT), LOGITS.log_softmax(1), IGNORED),
    (nn.NLLLoss(ignore_index=255), DENSE.log_softmax(1), IGNORED_PIXELS),
    (nn.MSELoss(), LOGITS, SOFT),
    (nn.MSELoss(), LOGITS[:, 0], SOFT[:, 0]),
    (nn.MSELoss(reduction="sum"), DENSE, SOFT_DENSE),
    (nn.L1Loss(), LOGITS, SOFT),
    (nn.SmoothL1Loss(beta=0.3), LOGITS, SOFT),
    (nn.HuberLoss(delta=0.3), LOGITS, SOFT),
    (nn.PoissonNLLLoss(full=True), LOGITS, 3 * LABELS),
    (nn.KLDivLoss(reduction="batchmean"), LOGITS.log_softmax(1), SOFT),
    (nn.KLDivLoss(reduction="batchmean", log_target=True), DENSE.log_softmax(1), SOFT_DENSE.log()),
    (nn.KLDivLoss(), LOGITS.log_softmax(1), SOFT),
    (nn.BCELoss(weight=WEIGHT), LOGITS.sigmoid(), LABELS),
    (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=2 * WEIGHT), LOGITS, LABELS),
    (nn.BCEWithLogitsLoss(), LOGITS[:, 0], LABELS[:, 0]),
    (nn.HingeEmbeddingLoss(margin=0.7), LOGITS, SIGNS),
    (nn.SoftMarginLoss(), LOGITS, SIGNS),
    (nn.MultiLabelMarginLoss(), LOGITS, LISTED),
    (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), LOGITS, LABELS),
    (nn.MultiMarginLoss(p=2, margin=0.7, weight=WEIGHT), LOGITS, INDICES),
]
if hasattr(nn, "LinearCrossEntropyLoss"):
    torch.manual_seed(0)
    CASES.append((nn.LinearCrossEntropyLoss(C, 5, weight=torch.rand(5)).double(), LOGITS, INDICES))
    CASES.append((nn.LinearCrossEntropyLoss(C, 5, ignore_index=-100).double(), LOGITS, IGNORED))
OTHER_ARGUMENTS = [
    nn.CTCLoss(),
    nn.TripletMarginLoss(),
    nn.TripletMarginWithDistanceLoss(),
    nn.CosineEmbeddingLoss(),
    nn.MarginRankingLoss(),
    nn.GaussianNLLLoss(),
]


@pytest.fixture(autouse=True)
def single_thread(one_thread):
    """The tensors here are tiny."""


def name_of(value):
    return type(value).__name__ if isinstance(value, nn.Module) else None


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("criterion", "outputs", "targets"), CASES, ids=name_of)
def test_mean_is_the_criterion(criterion, outputs, targets):
    outputs = outputs.clone().requires_grad_()
    per_sample = PerSampleLoss(criterion)
    losses, expected = per_sample(outputs, targets), criterion(outputs, targets)
    assert losses.shape == (B,) and per_sample.modules == (criterion,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-12, atol=0)
    assert torch.equal(per_sample.mean(outputs, targets, losses), expected)
    (own,) = torch.autograd.grad(expected, outputs, retain_graph=True)
    (found,) = torch.autograd.grad(losses.mean(), outputs, retain_graph=True)
    torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-15)
    for i in range(B):  # each loss depends on its own instance, and is B times its share of the criterion's gradient
        (row,) = torch.autograd.grad(losses[i], outputs, retain_graph=True)
        assert not row[[j for j in range(B) if j != i]].any()
        torch.testing.assert_close(row[i], B * own[i], rtol=1e-10, atol=1e-15)


def test_every_loss_of_torch_is_tested():
    tested = {type(criterion) for criterion, *_ in CASES} | {type(criterion) for criterion in OTHER_ARGUMENTS}
    names = {c.__name__ for c in vars(torch_losses).values() if isinstance(c, type) and c.__name__.endswith("Loss")}
    assert names - {c.__name__ for c in tested} == {"_Loss", "_WeightedLoss"}


@pytest.mark.parametrize("criterion", OTHER_ARGUMENTS, ids=name_of)
def test_other_arguments_are_refused(criterion):
    with pytest.raises(TypeError, match=rf"loss_fn .*{type(criterion).__name__} takes .*reduction='none'"):
        PerSampleLoss(criterion)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss, "cross_entropy", 3])
def test_what_is_no_loss_is_refused(loss_fn):
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        PerSampleLoss(loss_fn)


def test_nothing_ignored_is_plain_cross_entropy_bit_for_bit():
    outputs = LOGITS.float()
    found = PerSampleLoss()(outputs, INDICES)
    assert torch.equal(found, F.cross_entropy(outputs, INDICES, reduction="none"))
    assert torch.equal(PerSampleLoss(nn.CrossEntropyLoss(reduction="none"))(outputs, INDICES), found)


def test_all_ignored_is_nan_as_in_torch():
    targets = torch.full((B,), -100)
    assert PerSampleLoss()(LOGITS, targets).isnan().all() and F.cross_entropy(LOGITS, targets).isnan()
    dense = PerSampleLoss()(DENSE, torch.full((B, 3, 2), -100))
    assert dense.isnan().all()


def test_options_and_tensors_changed_later_count():
    criterion = nn.CrossEntropyLoss(weight=torch.ones(C, dtype=torch.double))
    per_sample = PerSampleLoss(criterion)
    criterion.weight, criterion.label_smoothing = WEIGHT, 0.2
    torch.testing.assert_close(per_sample(LOGITS, INDICES).mean(), criterion(LOGITS, INDICES))
    criterion.float()
    assert per_sample(LOGITS.float(), INDICES).dtype == torch.float32 and criterion.reduction == "mean"


def test_half_precision_does_not_overflow_in_sums():
    outputs, targets = torch.randn(2, 5, 300, 300).half(), torch.zeros(2, 300, 300, dtype=torch.long)
    criterion = nn.CrossEntropyLoss(weight=torch.ones(5).half())
    found = PerSampleLoss(criterion)(outputs, targets)
    torch.testing.assert_close(found.float().mean(), F.cross_entropy(outputs.float(), targets), rtol=1e-2, atol=0)


def test_reduction_none_must_be_one_loss_each():
    with pytest.raises(ValueError, match=r"reduction='none'\) must give one loss for each instance, shape \(6,\)"):
        PerSampleLoss(nn.MSELoss(reduction="none"))(LOGITS, SOFT)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_logits_of_tokens_as_language_models_give_them_are_refused():
    loss, tokens = PerSampleLoss(), torch.randint(7, (4, 5))
    with pytest.raises(ValueError, match="compares each token with the next"):
        loss(torch.randn(4, 5, 7), tokens)
    assert loss(torch.randn(4, 7, 5), tokens).shape == (4,)


def test_broadcasting_is_refused():
    for outputs, targets in ((LOGITS[:, :1], SOFT[:, 0]), (LOGITS[:, 0], SOFT[:, :1])):
        with pytest.raises(ValueError, match=r"MSELoss would broadcast .* to \(6, 6\); give both the same shape"):
            PerSampleLoss(nn.MSELoss())(outputs, targets)
    with pytest.raises(ValueError, match="first dimension B"):
        PerSampleLoss(nn.MSELoss())(LOGITS[:1], SOFT)
    with pytest.raises(ValueError, match="first dimension B"):
        PerSampleLoss()(LOGITS[0], torch.tensor(2))


class Focal(nn.CrossEntropyLoss):
    """A user's subclass that computes something else."""

    def forward(self, input, target):
        return (1 - (-F.cross_entropy(input, target, reduction="none")).exp()) ** 2 * super().forward(input, target)


class Renamed(nn.CrossEntropyLoss):
    """A user's subclass that computes the same."""


class Margin(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.scale, self.reduction = nn.Parameter(torch.tensor(2.0)), reduction

    def forward(self, outputs, targets):
        return F.cross_entropy(self.scale * outputs, targets, reduction=self.reduction)


def test_users_modules_and_functions():
    assert torch.equal(PerSampleLoss(Renamed())(LOGITS, IGNORED), PerSampleLoss()(LOGITS, IGNORED))
    focal = PerSampleLoss(Focal(reduction="none"))
    losses = focal(LOGITS, INDICES)
    assert torch.equal(losses, focal.loss_fn(LOGITS, INDICES)) and focal.kind == "class"
    assert torch.equal(focal.mean(LOGITS, INDICES, losses), losses.mean())
    module = Margin("none")
    per_sample = PerSampleLoss(module)
    assert per_sample.modules == (module,)
    per_sample(LOGITS, INDICES).sum().backward()
    assert module.scale.grad
    function = PerSampleLoss(lambda outputs, targets: (outputs - targets).pow(2).mean(1))
    assert function.modules == () and function.kind is None
    torch.testing.assert_close(function(LOGITS, SOFT).mean(), F.mse_loss(LOGITS, SOFT))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, t: F.cross_entropy(o, t), r"got \(\); use reduction='none', or pass a loss of torch.nn as it is"),
        (Margin(), r"got \(\); make it with reduction='none': Margin\("),
        (lambda o, t: F.cross_entropy(o, t, reduction="none")[:, None], r"got \(6, 1\); reduce all other dimensions"),
        (lambda o, t: o.new_ones(B + 1), r"each of the 6 instances, shape \(6,\), got \(7,\)"),
    ],
)
def test_losses_of_another_shape_are_refused(loss_fn, message):
    with pytest.raises(ValueError, match=message):
        PerSampleLoss(loss_fn)(LOGITS, INDICES)


@pytest.mark.parametrize("loss_fn", [lambda o, t: 0.0, lambda o, t: o.argmax(1), lambda o, t: None])
def test_losses_that_are_no_floating_tensor_are_refused(loss_fn):
    with pytest.raises(TypeError, match="loss_fn must return a floating tensor"):
        PerSampleLoss(loss_fn)(LOGITS, INDICES)


def test_targets_may_be_pairs_and_lists():
    per_sample = PerSampleLoss(lambda o, t: o.sum(1))
    boxes = [{"boxes": torch.zeros(i, 4)} for i in range(B)]
    for targets in ((INDICES, INDICES, torch.tensor(0.3)), boxes, ["text"] * B, {"a": INDICES}, "unknown"):
        losses = per_sample(LOGITS, targets)
        correct, classes, margins = per_sample.describe(LOGITS, targets, losses)
        assert correct.sum() == B // 2 and classes is None and margins is None
    with pytest.raises(ValueError, match="each of the 5 instances"):
        per_sample(LOGITS, boxes[:5])


def test_auxiliary_logits_are_refused():
    inception = namedtuple("InceptionOutputs", ["logits", "aux_logits"])
    google = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])
    found = SimpleNamespace(logits=LOGITS, aux_logits=LOGITS, hidden_states=(LOGITS,))
    for outputs in (inception(LOGITS, LOGITS), google(LOGITS, LOGITS, None), found):
        for loss_fn in (None, nn.CrossEntropyLoss(label_smoothing=0.1)):
            with pytest.raises(TypeError, match=r"aux_logits.* would get no gradient; pass loss_fn="):
                PerSampleLoss(loss_fn)(outputs, INDICES)
    plain = PerSampleLoss()(LOGITS, INDICES)
    for outputs in (inception(LOGITS, None), SimpleNamespace(logits=LOGITS, loss=plain.mean(), hidden=LOGITS)):
        assert torch.equal(PerSampleLoss()(outputs, INDICES), plain)
        assert torch.equal(PerSampleLoss().mean(outputs, INDICES, plain), F.cross_entropy(LOGITS, INDICES))
    both = PerSampleLoss(lambda o, t: PerSampleLoss()(o.logits, t) + 0.4 * PerSampleLoss()(o.aux_logits, t))
    torch.testing.assert_close(both(inception(LOGITS, LOGITS), INDICES), 1.4 * plain)


def test_outputs_of_torchvision():
    google = pytest.importorskip("torchvision.models.googlenet").GoogLeNetOutputs(LOGITS, LOGITS, LOGITS)
    inception = pytest.importorskip("torchvision.models.inception").InceptionOutputs(LOGITS, LOGITS)
    for outputs in (google, inception):
        with pytest.raises(TypeError, match=f"outputs {type(outputs).__name__} have aux_logits"):
            PerSampleLoss()(outputs, INDICES)


@pytest.mark.parametrize(("criterion", "outputs", "targets"), CASES[:14], ids=name_of)
def test_forward_mode(criterion, outputs, targets):
    """The engines differentiate these losses along a direction."""
    outputs, tangent = outputs.detach(), drawn(*outputs.shape)
    _, found = torch.func.jvp(lambda o: PerSampleLoss(criterion)(o, targets), (outputs,), (tangent,))
    (own,) = torch.autograd.grad(criterion(outputs.requires_grad_(), targets), outputs)
    torch.testing.assert_close(found.mean(), (own * tangent).sum())


def described(loss_fn, outputs, targets, **options):
    per_sample = PerSampleLoss(loss_fn)
    losses = per_sample(outputs, targets)
    correct, classes, margins = per_sample.describe(outputs.requires_grad_(), targets, losses, **options)
    assert correct.shape == (len(targets),) and correct.dtype == torch.bool
    assert not any(t.requires_grad for t in (correct, classes, margins) if t is not None)
    return correct.tolist(), *(None if t is None else t.tolist() for t in (classes, margins))


def own_cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


PAIR = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
FIRST, SECOND = torch.tanh(torch.tensor([1.0, 0.5])).tolist()  # p − (1 − p) of two logits


@pytest.mark.parametrize("loss_fn", [None, own_cross_entropy, nn.NLLLoss(), nn.MultiMarginLoss()])
def test_class_indices(loss_fn):
    outputs = PAIR.log_softmax(1) if isinstance(loss_fn, nn.NLLLoss) else PAIR
    correct, classes, margins = described(loss_fn, outputs, torch.tensor([0, 0]))
    assert (correct, classes) == ([True, False], [0, 0])
    assert margins == pytest.approx([FIRST, -SECOND], abs=1e-6)


@pytest.mark.parametrize(
    ("loss_fn", "ignored"),
    [
        (None, -100),
        (nn.CrossEntropyLoss(ignore_index=1), 1),
        (nn.NLLLoss(ignore_index=255), 255),
        (nn.CrossEntropyLoss(ignore_index=-1), -1),
        (own_cross_entropy, -100),
        (lambda o, t: F.cross_entropy(o, t, ignore_index=255, reduction="none"), 255),
    ],
)
def test_ignored_targets(loss_fn, ignored):
    correct, classes, margins = described(loss_fn, PAIR.clone(), torch.tensor([0, ignored]))
    assert (correct, classes) == ([True, True], [0, -1])
    assert margins == pytest.approx([FIRST, 1.0], abs=1e-6)


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(label_smoothing=0.1), own_cross_entropy])
@pytest.mark.parametrize("targets", [[[1.0, 0.0], [1.0, 0.0]], [[0.7, 0.3], [0.9, 0.1]]])
def test_soft_and_one_hot_targets_are_classes(loss_fn, targets):
    """Item 21: MixUp, CutMix and one-hot targets count like class indices."""
    correct, classes, margins = described(loss_fn, PAIR.clone(), torch.tensor(targets))
    assert (correct, classes) == ([True, False], [0, 0])
    assert margins == pytest.approx([FIRST, -SECOND], abs=1e-6)


@pytest.mark.parametrize(
    ("loss_fn", "outputs"),
    [
        (nn.BCEWithLogitsLoss(), [[3.0, -1.0], [2.0, -2.0]]),
        (nn.BCELoss(), [[0.9, 0.3], [0.8, 0.2]]),
        (nn.MultiLabelSoftMarginLoss(), [[3.0, -1.0], [2.0, -2.0]]),
    ],
)
def test_labels(loss_fn, outputs):
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert described(loss_fn, torch.tensor(outputs), labels) == ([True, False], None, None)
    single = described(loss_fn, torch.tensor(outputs), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert single == ([True, False], None, None)  # rows that sum to one stay labels where the loss says so
    if not isinstance(loss_fn, nn.MultiLabelSoftMarginLoss):
        assert described(loss_fn, torch.tensor(outputs)[:, 0], labels[:, 0]) == ([True, True], None, None)
    signs = described(nn.SoftMarginLoss(), torch.tensor([[3.0, -1.0], [2.0, -2.0]]), 2 * labels - 1)
    assert signs == ([True, False], None, None)


def test_a_function_leaves_it_to_the_batch_what_targets_are():
    def binary(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets.float(), reduction="none").flatten(1).mean(1)

    outputs = torch.tensor([[3.0, -1.0], [2.0, -2.0], [-4.0, 3.0]])
    for targets in (torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([[1, 0], [1, 1], [0, 1]])):
        found = described(binary, outputs.clone(), targets)
        assert found == ([True, False, True], [-1, -1, -1], [0.0, -1.0, 1.0])
    found = described(lambda o, t: (o - t).pow(2).mean(1), outputs.clone(), torch.tensor([[3.0, 4], [2, 2], [0, 9]]))
    assert found == ([True, True, False], [-1, -1, -1], [0.0, 1.0, -1.0])  # losses 12.5, 8 and 26
    found = described(lambda o, t: (o - t).pow(2), torch.tensor([3.0, -2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert found == ([True, False, False], None, None)


def test_regression_is_right_below_the_median():
    for loss_fn, targets in (
        (nn.MSELoss(), torch.tensor([1.0, 0.0, 9.0])),
        (nn.L1Loss(), torch.tensor([[1.0], [0.0], [9.0]])),
        (nn.HingeEmbeddingLoss(), torch.tensor([1.0, 1.0, 1.0])),
    ):
        outputs = torch.tensor([1.0, 1.0, 4.0]).reshape(targets.shape)
        assert described(loss_fn, outputs, targets) == ([True, True, False], None, None)


def test_dense_outputs_are_right_where_most_positions_are():
    outputs = torch.zeros(3, 2, 3)
    outputs[:, 1] = torch.tensor([[1.0, 1, -1], [1, -1, -1], [1, -1, -1]])  # predictions 110, 100, 100
    targets = torch.tensor([[1, 1, 1], [1, 1, 1], [1, -100, -100]])
    assert described(None, outputs, targets) == ([True, False, True], None, None)
    assert described(None, outputs.clone(), F.one_hot(targets.clamp(min=0), 2).mT.float())[0] == [True, False, True]
    labels = torch.stack([1 - targets.clamp(min=0), targets.clamp(min=0)], 1).float()
    assert described(nn.BCEWithLogitsLoss(), 9 * outputs.clone() - 1, labels)[1:] == (None, None)
    ignored = torch.full((3, 3), -100)
    assert PerSampleLoss().describe(outputs, ignored, torch.zeros(3))[0].all()


def test_correct_fn():
    def never(outputs, targets):
        assert not outputs.requires_grad
        return torch.zeros(len(targets), dtype=torch.bool)

    assert described(None, PAIR.clone(), torch.tensor([0, 1]), correct_fn=never)[:2] == ([False, False], [0, 1])
    with pytest.raises(ValueError, match=r"correct_fn must return \(2,\) bool, got \(2,\) torch.int64"):
        described(None, PAIR.clone(), torch.tensor([0, 1]), correct_fn=lambda o, t: t)
    with pytest.raises(ValueError, match="correct_fn must return"):
        described(None, PAIR.clone(), torch.tensor([0, 1]), correct_fn=lambda o, t: True)


@pytest.mark.parametrize("targets", [IGNORED, SOFT, LABELS, drawn(B, C)])
@pytest.mark.parametrize("loss_fn", [None, lambda o, t: o.mean(1)])
def test_describing_reads_nothing_from_the_device(loss_fn, targets):
    """The meta device has no values: reading one raises."""
    outputs, targets, losses = LOGITS.to("meta"), targets.to("meta"), torch.ones(B, device="meta")
    correct, classes, margins = PerSampleLoss(loss_fn).describe(outputs, targets, losses)
    assert correct.shape == classes.shape == margins.shape == (B,)
    if loss_fn is None:
        assert PerSampleLoss()(outputs, targets).shape == (B,)


def test_expected_error():
    probabilities = LOGITS.softmax(1)
    by_hand = torch.stack([1 - probabilities[i, y] for i, y in enumerate(INDICES.tolist())])
    torch.testing.assert_close(expected_error(LOGITS, INDICES), by_hand)
    torch.testing.assert_close(expected_error(LOGITS, F.one_hot(INDICES, C).double()), by_hand)
    torch.testing.assert_close(expected_error(SimpleNamespace(logits=LOGITS), IGNORED), by_hand * (IGNORED >= 0))
    mixed = 0.3 * F.one_hot(INDICES, C) + 0.7 * F.one_hot((INDICES + 1) % C, C)
    other = expected_error(LOGITS, (INDICES + 1) % C)
    torch.testing.assert_close(expected_error(LOGITS, mixed.double()), 0.3 * by_hand + 0.7 * other)
    flat = DENSE.movedim(1, -1).reshape(-1, C)
    dense = expected_error(flat, PIXELS.flatten()).reshape(B, -1)
    torch.testing.assert_close(expected_error(DENSE, PIXELS), dense.mean(1))
    kept = (IGNORED_PIXELS != 255).reshape(B, -1)
    ignored = torch.where(IGNORED_PIXELS == 255, -100, PIXELS)
    torch.testing.assert_close(expected_error(DENSE, ignored), (dense * kept).sum(1) / kept.sum(1))
    with pytest.raises(ValueError, match=r"targets must be \(6,\) class indices or \(6, 4\) class probabilities"):
        expected_error(LOGITS, LABELS[:, 0])
    with pytest.raises(RuntimeError):
        expected_error(LOGITS, INDICES + 1)


LAM = 0.25


class Mix:
    def __init__(self):
        self.lam, self.name, self.enabled, self.calls = 0.3, "mix", True, 7

    def loss(self, outputs, targets):
        return self.lam * PerSampleLoss()(outputs, targets)


def test_constants_of():
    mix, lam, tensor = Mix(), 0.4, torch.tensor(0.5)

    def closure(outputs, targets, gamma=2.0):
        return (lam * tensor * mix.lam * gamma) * outputs

    assert constants_of(closure) == {"lam": 0.4, "tensor": 0.5, "mix.lam": 0.3}
    assert constants_of(lambda o, t: LAM * o) == {"LAM": 0.25}
    assert constants_of(functools.partial(closure, gamma=3.0)) == {**constants_of(closure), "gamma": 3.0}
    assert constants_of(mix) == {"lam": 0.3}  # counters are no fractions
    assert constants_of(mix.loss) == {"self.lam": 0.3}
    assert constants_of(nn.CrossEntropyLoss(label_smoothing=0.1)) == {"label_smoothing": 0.1}
    module = Margin()
    module.register_buffer("lam", torch.tensor(0.75))
    assert constants_of(module) == {"lam": 0.75}  # a parameter is learned, no constant
    assert constants_of(None) == constants_of(Mix().name) == {}
    before = constants_of(closure)
    lam = 0.9
    assert constants_of(closure) == {**before, "lam": 0.9}

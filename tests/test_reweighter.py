"""One step of MetaReweighter against loops written by hand."""

import copy
import gc
import logging
from dataclasses import dataclass

import higher
import pytest
import torch
import torch.nn.functional as F
from same import assert_same
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from torch_molere import (
    FreeWeighting,
    InputWeighting,
    MarginSplitter,
    MetaReweighter,
    SignalWeighting,
    expected_error,
)
from torch_molere.weighting import normalised


def classifier(seed=0, features=5, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, classes)
    ).double()


def batches(count, size=12, features=5, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, features, generator=generator, dtype=torch.double),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


class Scores(nn.Module):
    """One weight for each position of the batch: what a meta-gradient looks like from outside."""

    def __init__(self, size):
        super().__init__()
        self.scores = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.double))

    def forward(self, samples):
        return self.scores


def exposed(model, optimizer, weighting, lr=1.0, **options):
    """A reweighter that moves φ by ``lr`` times its meta-gradient, at every step unless told otherwise."""
    settings = {"warmup_steps": 0, "every": 1} | options
    return MetaReweighter(
        model, optimizer, weighting=weighting, weighting_optimizer=lambda p: torch.optim.SGD(p, lr=lr), **settings
    )


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("engine", ["forward", "finite", "unrolled"])
@pytest.mark.parametrize("val_loss_fn", [None, expected_error])
def test_both_orders_equal_higher(order, engine, val_loss_fn):
    """Ten steps of θ and φ, written out with ``higher``."""
    model = classifier()
    del model[3]  # dropout: higher's forwards would draw other masks
    weighting = SignalWeighting(("loss", "margin"), hidden=6).double()
    nn.init.normal_(weighting.network[-1].weight)
    by_hand, phi = copy.deepcopy((model, weighting))
    validation = batches(3, seed=2)
    optimizer, phi_optimizer = sgd(model), torch.optim.Adam(phi.parameters(), lr=0.05)
    reweighter = MetaReweighter(
        model,
        optimizer,
        weighting=weighting,
        weighting_lr=0.05,
        validation=validation,
        every=2,
        warmup_steps=3,
        order=order,
        hypergradient=engine,
        val_loss_fn=val_loss_fn,
    )
    theta_optimizer = sgd(by_hand)
    drawn = 0
    for step, (x, y) in enumerate(batches(10)):
        reweighter.step((x, y))

        meta = step >= 3 and (step - 3) % 2 == 0
        losses = F.cross_entropy(by_hand(x), y, reduction="none")
        with torch.no_grad():
            p = by_hand(x).softmax(1)  # batch statistics: the second call changes only running ones
            own = p[torch.arange(len(y)), y]
            margin = own - p.scatter(1, y[:, None], -1).amax(1)
        signals = torch.stack([losses.detach().asinh(), margin], 1)

        def weights(signals=signals, step=step):
            if step < 3:
                return torch.ones(12, dtype=torch.double)
            w = phi.floor + (1 - phi.floor) * torch.sigmoid(phi.network[1:](signals)).squeeze(1)
            return w * len(w) / w.sum()

        used = weights().detach()
        if meta:
            xv, yv = validation[drawn % 3]
            drawn += 1
            with higher.innerloop_ctx(by_hand, theta_optimizer) as (functional, inner):
                inner.step((weights() * F.cross_entropy(functional(x), y, reduction="none")).mean())
                if val_loss_fn is None:
                    loss = F.cross_entropy(functional(xv), yv)
                else:
                    loss = (1.0 - functional(xv).softmax(1)[torch.arange(len(yv)), yv]).mean()
                gradients = torch.autograd.grad(loss, list(phi.parameters()))
            for parameter, gradient in zip(phi.parameters(), gradients, strict=True):
                parameter.grad = gradient
            phi_optimizer.step()
            assert_same(reweighter.result.val_loss, loss.detach(), rtol=1e-8, atol=1e-8)
            if order == "before":
                used = weights().detach()
        else:
            assert reweighter.result.val_loss is None
        assert_same(reweighter.result.weights, used, rtol=1e-6, atol=1e-6)
        theta_optimizer.zero_grad()
        (used * losses).mean().backward()
        theta_optimizer.step()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if engine == "finite" else {"rtol": 1e-8, "atol": 1e-8}
    assert_same(list(weighting.parameters()), list(phi.parameters()), **tolerance)
    assert_same(list(model.parameters()), list(by_hand.parameters()), **tolerance)


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("engine", ["forward", "finite", "unrolled"])
def test_meta_gradient_is_that_of_the_training_side(order, engine):
    """With instances held out: Δφ against a central difference of L_val(θ⁺) in φ."""
    model, weighting = classifier(), Scores(12)
    del model[3]
    optimizer = sgd(model)
    reweighter = exposed(
        model,
        optimizer,
        weighting,
        splitter=MarginSplitter(),
        val_fraction=0.3,
        warmup_steps=2,
        order=order,
        hypergradient=engine,
        val_batch_size=100,
        hold_out=True,
    )
    *warm, (x, y) = batches(3)
    for batch in warm:
        reweighter.step(batch)
    before = copy.deepcopy((model, optimizer))
    scores = weighting.scores.detach().clone()
    result = reweighter.step((x, y))
    ((xv,), _), yv = reweighter.buffer.state_dict()["held"]  # all of it was drawn: nothing drawn last is released
    assert 1 <= result.val_mask.sum() < 12

    def val_loss(s):
        model, optimizer = copy.deepcopy(before)
        w = s * ~result.val_mask
        w = w * (~result.val_mask).sum() / w.sum()
        optimizer.zero_grad()
        ((w * F.cross_entropy(model(x), y, reduction="none")).sum() / (~result.val_mask).sum()).backward()
        optimizer.step()
        return F.cross_entropy(model(xv), yv)

    h = 1e-5
    expected = torch.stack([(val_loss(scores + h * e) - val_loss(scores - h * e)) / (2 * h) for e in torch.eye(12)])
    assert_same(scores - weighting.scores.detach(), expected.detach(), rtol=1e-4, atol=1e-7)


def test_loss_in_a_loop_of_ones_own_equals_step():
    first, second = classifier(), classifier()
    stepped = MetaReweighter(first, sgd(first), warmup_steps=2, every=2)
    optimizer = sgd(second)
    looped = MetaReweighter(second, optimizer, warmup_steps=2, every=2)
    random = torch.get_rng_state()
    for batch in batches(9):
        stepped.step(batch)
    torch.set_rng_state(random)
    for x, y in batches(9):
        optimizer.zero_grad()
        loss = looped.loss(second(x), y)
        loss.backward()
        optimizer.step()
        assert_same(loss.detach(), looped.result.loss)
    assert_same(first.state_dict(), second.state_dict())
    assert_same(stepped.state_dict(), looped.state_dict())


@pytest.mark.parametrize("engine", ["forward", "finite"])
def test_accumulated_gradients(engine):
    """Two half batches, each loss halved, give φ the gradient of the whole batch."""
    results = []
    for parts in (1, 2):
        model = classifier()
        del model[3], model[1]  # nothing may depend on how the batch is cut
        weighting = FreeWeighting(24).double()
        torch.manual_seed(3)
        nn.init.normal_(weighting.scores.weight)
        optimizer = sgd(model)
        reweighter = exposed(model, optimizer, weighting, validation=batches(1, seed=5), hypergradient=engine)
        (x, y), rows = batches(1, size=24)[0], torch.arange(24)
        # The same normalisation either way: equal sums of raw weights in both halves.
        with torch.no_grad():
            weighting.scores.weight[12:] = weighting.scores.weight[:12]
        start = weighting.scores.weight.detach().clone()
        optimizer.zero_grad()
        for part in torch.arange(24).chunk(parts):
            (reweighter.loss(model(x[part]), y[part], rows[part]) / parts).backward()
        optimizer.step()
        results.append((weighting.scores.weight.detach() - start, model.state_dict()))
    (whole, theta), (halves, theta_halves) = results
    assert_same(theta, theta_halves, rtol=1e-12, atol=1e-12)
    # Normalisation projects within each part: compare after projecting the whole's gradient the same way.
    raw = torch.sigmoid(start.squeeze(1))
    slope = raw * (1 - raw)
    g = (whole.squeeze(1) / slope).reshape(2, 12)
    g = g - (g * raw.reshape(2, 12)).sum(1, keepdim=True) / raw.reshape(2, 12).sum(1, keepdim=True)
    h = (halves.squeeze(1) / slope).reshape(2, 12)
    assert_same(h, g, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_is_a_loop_of_ones_own(named):
    """Called once, with gradients, before the meta-update; the step returns its loss."""
    found = []
    for closed in (False, True):
        model = classifier()
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        reweighter = MetaReweighter(model, optimizer, warmup_steps=2, every=2)
        losses = []
        for x, y in batches(8):

            def closure(x=x, y=y, losses=losses, model=model, optimizer=optimizer, reweighter=reweighter):
                optimizer.zero_grad()
                loss = reweighter.loss(model(x), y)
                loss.backward()
                losses.append(loss.detach())
                return loss

            if not closed:
                closure()
                optimizer.step()
            else:
                with torch.no_grad():
                    returned = optimizer.step(closure=closure) if named else optimizer.step(closure)
                assert torch.equal(returned, losses[-1])
            scheduler.step()
        assert reweighter.engine == "finite"
        found.append((model.state_dict(), reweighter.state_dict(), losses))
    assert_same(found[0], found[1])
    assert len(found[1][2]) == 8


def test_losses_of_a_skipped_update_are_forgotten():
    """As a GradScaler skips one that overflowed; and a loss without backward is no part of any update."""
    found = []
    for skip in (False, True):
        model, weighting = classifier(), Scores(12)
        del model[3]
        optimizer = sgd(model)
        reweighter = MetaReweighter(
            model, optimizer, weighting=weighting, validation=batches(1, seed=5), warmup_steps=0, every=1
        )
        (x, y), (other, labels) = batches(2)
        state = copy.deepcopy(model.state_dict())
        if skip:
            reweighter.loss(model(other), labels).backward()
            reweighter.loss(model(other), labels)
        model.load_state_dict(state)
        optimizer.zero_grad()
        reweighter.loss(model(x), y).backward()
        optimizer.step()
        found.append((model.state_dict(), weighting.state_dict()))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled before"])
def test_a_gradient_scaler_changes_nothing_but_skips_what_overflows(kind, fused, unscaled):
    """Ten steps with a scaler, of which the fourth overflows, are nine without; fused optimizers unscale themselves."""
    found = []
    for scaled in (False, True):
        model = classifier()
        del model[3], model[1]  # a skipped step would still move batch statistics
        weighting = Scores(12)
        optimizer = kind(model.parameters(), lr=0.05, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=scaled)
        reweighter = exposed(
            model,
            optimizer,
            weighting,
            lr=0.5,
            validation=batches(1, seed=5),
            warmup_steps=1,
            hypergradient="forward",
            scaler=scaler if scaled else None,
        )
        for step, (x, y) in enumerate(batches(10)):
            if step == 3 and not scaled:
                continue
            optimizer.zero_grad()
            loss = reweighter.loss(model(x), y) * (torch.inf if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert reweighter.steps == 9
        found.append((model.state_dict(), weighting.state_dict()))
    assert_same(found[0], found[1], rtol=1e-10, atol=1e-12)


@dataclass
class Output:
    logits: torch.Tensor


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3).double()

    def forward(self, a, b, scale=None):
        out = self.linear(a + b)
        return Output(out if scale is None else out * scale)


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_inputs_of_several_tensors_and_outputs_with_logits(form):
    model = TwoInputs()
    reweighter = MetaReweighter(model, sgd(model), warmup_steps=2, every=1)
    for x, y in batches(6):
        inputs = {"tuple": (x, x), "list": [x, x], "dict": {"b": x, "a": x}}[form]
        result = reweighter.step((inputs, y))
    assert result.outputs.shape == (12, 3)
    assert result.val_loss is not None
    assert torch.isfinite(result.val_loss)


def test_regression():
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()

    def squared(outputs, targets):
        return (outputs - targets).square().mean(1)

    reweighter = MetaReweighter(model, sgd(model, lr=0.01), loss_fn=squared, warmup_steps=2, every=1)
    for x, _ in batches(30):
        result = reweighter.step((x, x.sum(1, keepdim=True)))
    assert result.loss < 1
    assert reweighter.buffer.class_counts().keys() == {0}


def test_multi_label():
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()

    def bce(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)

    reweighter = MetaReweighter(model, sgd(model, lr=0.5), loss_fn=bce, warmup_steps=2, every=1)
    for x, _ in batches(40):
        result = reweighter.step((x, (x[:, :4] > 0).double()))
    assert result.loss < 0.5
    assert result.val_loss is not None


def test_correct_fn_replaces_what_right_means():
    seen = []

    def right(outputs, targets):
        seen.append(outputs.shape)
        return torch.ones(len(targets), dtype=torch.bool)

    model = classifier()
    reweighter = MetaReweighter(model, sgd(model), correct_fn=right, warmup_steps=0, every=1)
    for batch in batches(3):
        reweighter.step(batch)
    assert seen


@pytest.mark.parametrize("weighting", ["signals", "inputs", "classifier", "free"])
def test_every_weighting_learns(weighting):
    model = classifier()
    phi = {
        "signals": lambda: SignalWeighting(("loss", "margin", "probabilities", "label"), num_classes=3),
        "inputs": lambda: InputWeighting(nn.Linear(5, 1)),
        "classifier": lambda: InputWeighting.from_classifier(model, 3),
        "free": lambda: FreeWeighting(12),
    }[weighting]().double()
    reweighter = MetaReweighter(
        model, sgd(model), weighting=phi, weighting_lr=0.1, validation=batches(1, seed=9), warmup_steps=1, every=1
    )
    x, y = batches(1)[0]
    for _ in range(4):
        result = reweighter.step((x, y, torch.arange(12)))
    assert result.weights.std() > 0
    assert_same(result.weights.mean(), torch.tensor(1.0, dtype=torch.double), rtol=1e-12, atol=0)


def test_a_weighting_without_parameters_is_left_as_it_is():
    class Constant(nn.Module):
        def forward(self, samples):
            return 2 * torch.ones_like(samples.losses)

    model = classifier()
    reweighter = MetaReweighter(
        model, sgd(model), weighting=Constant(), validation=batches(1, seed=9), warmup_steps=0, every=1
    )
    result = reweighter.step(batches(1)[0])
    assert reweighter.weighting_optimizer is None
    assert torch.equal(result.weights, torch.ones(12, dtype=torch.double))
    assert result.val_loss is not None


def test_warm_up_is_plain_training_on_the_training_side():
    model = classifier()
    by_hand = copy.deepcopy(model)
    optimizer = sgd(by_hand)
    reweighter = MetaReweighter(model, sgd(model), warmup_steps=4, every=1, hold_out=True)
    phi, theta = copy.deepcopy((reweighter.weighting.state_dict(), reweighter.splitter.state_dict()))
    for x, y in batches(4):
        assert reweighter.warming_up
        random = torch.get_rng_state()
        result = reweighter.step((x, y))
        torch.set_rng_state(random)
        assert torch.equal(result.weights, (~result.val_mask).double())
        optimizer.zero_grad()
        losses = F.cross_entropy(by_hand(x), y, reduction="none")
        losses[~result.val_mask].mean().backward()
        optimizer.step()
    assert_same(model.state_dict(), by_hand.state_dict(), rtol=1e-12, atol=1e-12)
    assert_same((reweighter.weighting.state_dict(), reweighter.splitter.state_dict()), (phi, theta))
    assert not reweighter.warming_up


def test_validation_instances_that_are_not_held_out_are_trained_on_like_all_others():
    model = classifier()
    by_hand = copy.deepcopy(model)
    optimizer = sgd(by_hand)
    reweighter = MetaReweighter(model, sgd(model), warmup_steps=4, every=1, hold_out=False)
    for step, (x, y) in enumerate(batches(8)):
        random = torch.get_rng_state()
        result = reweighter.step((x, y, torch.arange(len(y))))
        torch.set_rng_state(random)  # by hand with the same dropout
        torch.testing.assert_close(result.weights.mean(), torch.ones((), dtype=torch.double))
        assert bool((result.weights > 0).all())
        if step < 4:  # warm-up is plain training, bit for bit
            optimizer.zero_grad()
            F.cross_entropy(by_hand(x), y, reduction="none").mean().backward()
            optimizer.step()
            assert_same(model.state_dict(), by_hand.state_dict(), rtol=0, atol=0)
    table = reweighter.history.table()
    assert bool((table["held_out"] > 0).any()) and not bool(table["weight"].isnan().any())


def test_rows_stay_on_their_side_across_epochs():
    model = classifier()
    reweighter = MetaReweighter(model, sgd(model), warmup_steps=100, val_fraction=0.25)
    (x, y), rows = batches(1, size=200)[0], torch.arange(200)
    sides = []
    for epoch in range(2):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(epoch))
        side = torch.zeros(200, dtype=torch.bool)
        for part in order.chunk(5):
            side[part] = reweighter.step((x[part], y[part], rows[part])).val_mask
        assert set(side.nonzero().squeeze(1).tolist()) == set(reweighter.buffer.rows)
        sides.append(side)
    first, second = sides
    # The quota may turn some away; those that stayed must outnumber them by far.
    assert (first & second).sum() >= 0.8 * first.sum()


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("engine", ["auto", "forward", "finite", "unrolled"])
def test_a_meta_update_leaves_no_trace(order, engine):
    """Statistics, random streams and .grad move exactly as in plain training."""
    model = classifier()
    by_hand = copy.deepcopy(model)
    optimizer = sgd(by_hand)

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.double))

        def forward(self, samples):
            return self.scale * torch.ones_like(samples.losses)

    reweighter = MetaReweighter(
        model,
        sgd(model),
        weighting=Constant(),
        validation=batches(2, seed=4),
        warmup_steps=1,
        every=2,
        order=order,
        hypergradient=engine,
    )
    for x, y in batches(6):
        random = torch.get_rng_state()
        reweighter.step((x, y))
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        optimizer.zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
    assert_same(model.state_dict(), by_hand.state_dict())
    assert_same([p.grad for p in model.parameters()], [p.grad for p in by_hand.parameters()])
    assert_same(reweighter.optimizer.state_dict(), optimizer.state_dict())
    assert all(p.grad is None for p in reweighter.weighting.parameters())


class Attention(nn.Module):
    """Flash attention has no forward-mode rule on the CPU; PyTorch's MATH kernel has one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(5, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x[:, None].expand(-1, 4, -1))[:, None].chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.lstm(x[:, None].expand(-1, 4, -1))[0][:, -1])


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return _Square.apply(self.linear(x))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.out = nn.EmbeddingBag(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.bag((3 * x.abs()).long().clamp_max(9)))


def layers(*modules):
    """A network of these layers between a linear one and the classes."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(*(module() for module in modules), nn.Tanh(), nn.Linear(8, 3))

    return make


MODELS = {
    "attention": Attention,
    "lstm": Recurrent,
    "custom function": Custom,
    "checkpointing": Checkpointed,
    "embedding bag": Bag,
    "weight norm": layers(lambda: weight_norm(nn.Linear(5, 8))),
    "spectral norm": layers(lambda: spectral_norm(nn.Linear(5, 8))),
    "group and layer norm": layers(lambda: nn.Linear(5, 8), lambda: nn.GroupNorm(2, 8), lambda: nn.LayerNorm(8)),
    "batch norm": layers(lambda: nn.Linear(5, 8), lambda: nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_auto_serves_models_with_and_without_forward_mode_rules(kind, caplog):
    """φ's gradient in float32 is that of the exact engine (unrolled by hand) to a finite difference's accuracy."""
    model = MODELS[kind]()
    weighting = Scores(12).float()
    validation = [(x.float(), y) for x, y in batches(1, seed=3)]
    reweighter = exposed(model, sgd(model), weighting, validation=validation)
    (x, y), scores = batches(1)[0], weighting.scores.detach().clone().requires_grad_()
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, logger="torch_molere"):
        reweighter.step((x.float(), y))
        found = scores.detach() - weighting.scores.detach()
        reweighter.step((x.float(), y))
    assert reweighter.engine in ("forward", "finite")
    assert len([record for record in caplog.records if "hypergradient='auto'" in record.message]) == 1

    # By hand: plain reverse mode, one gradient for each instance.
    from torch_molere.hypergradients import trained_parameters

    parameters = trained_parameters(twin, sgd(twin))
    losses = F.cross_entropy(twin(x.float()), y, reduction="none")
    weights = scores / scores.sum() * 12
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter -= 0.1 * sum(w * row[i] for w, row in zip(weights, rows, strict=True)) / 12
    xv, yv = batches(1, seed=3)[0]
    v = torch.autograd.grad(F.cross_entropy(twin(xv.float()), yv), list(parameters.values()))
    derivative = torch.stack([sum((-0.1 * g * d).sum() for g, d in zip(v, row, strict=True)) for row in rows]) / 12
    (expected,) = torch.autograd.grad(weights, scores, derivative)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_auto_keeps_forward_mode_where_a_finite_difference_is_wrong():
    """A loss with steps everywhere: the finite difference sees jumps, forward mode the slope."""

    class Jagged(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            out = self.linear(x)
            return out + 0.01 * torch.floor(out * 1e5).remainder(2)

    model = Jagged()
    reweighter = MetaReweighter(
        model, sgd(model), validation=[(x.float(), y) for x, y in batches(1)], warmup_steps=0, every=1
    )
    for x, y in batches(2):
        reweighter.step((x.float(), y))
    assert reweighter.engine == "forward"


def test_autocast():
    """Reduced-precision forwards in the user's loop; the meta-gradient is taken in full precision."""
    model = classifier().float()
    optimizer = sgd(model)
    reweighter = MetaReweighter(model, optimizer, warmup_steps=2, every=1)
    for x, y in batches(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = reweighter.loss(model(x.float()), y)
        loss.backward()
        optimizer.step()
    assert reweighter.result.val_loss.dtype == torch.float32
    assert torch.isfinite(reweighter.result.val_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(reweighter.step((x.float(), y)).loss)


@pytest.mark.parametrize("where", ["both", "forward only", "inside the model"])
def test_reduced_precision_losses_are_no_base_of_a_difference(where):
    """The finite engine's gradient stays that of forward mode wherever autocast is entered outside the model; where
    every forward is in reduced precision, ``auto`` keeps forward mode."""
    found = []
    for engine in ("auto" if where == "inside the model" else "finite", "forward"):
        model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        if where == "inside the model":
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weighting = Scores(12).float()
        validation = [(x.float(), y) for x, y in batches(1, seed=3)]
        reweighter = exposed(model, optimizer, weighting, validation=validation, hypergradient=engine)
        x, y = batches(1)[0]
        start = weighting.scores.detach().clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "inside the model"):
            outputs = model(x.float())
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "both"):
            loss = reweighter.loss(outputs.float(), y)
        loss.backward()
        optimizer.step()
        found.append(weighting.scores.detach() - start)
        if where == "inside the model":
            assert reweighter.engine == "forward"
    first, exact = found
    assert (first - exact).norm() < 0.05 * exact.norm()


def test_a_compiled_model_trains_as_the_plain_one():
    """The reweighter's own forwards go to the module inside (the eager backend computes the same bits)."""
    states = []
    for compiled in (False, True):
        model = classifier()
        network = torch.compile(model, backend="eager") if compiled else model
        reweighter = MetaReweighter(network, sgd(model), warmup_steps=2, every=2)
        torch.manual_seed(3)
        for batch in batches(8):
            reweighter.step(batch)
        assert reweighter.engine == "finite"
        states.append((model.state_dict(), reweighter.state_dict()))
    assert_same(states[0], states[1])


def test_evaluation_gets_the_plain_loss_and_changes_nothing():
    model = classifier()
    reweighter = MetaReweighter(model, sgd(model), warmup_steps=0)
    x, y = batches(1)[0]
    before = reweighter.state_dict()
    model.eval()
    with torch.no_grad():
        loss = reweighter.loss(model(x), y)
    assert_same(loss, F.cross_entropy(model(x), y).detach(), rtol=1e-15, atol=0)
    assert_same(reweighter.state_dict(), before)


def test_close_leaves_model_and_optimizer_as_they_were():
    model = classifier()
    optimizer = sgd(model)
    with MetaReweighter(model, optimizer, warmup_steps=0) as reweighter:
        reweighter.step(batches(1)[0])
        assert model._forward_pre_hooks
        assert optimizer._optimizer_step_pre_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_reweighter_let_go_of_leaves_nothing_behind():
    model = classifier()
    optimizer = sgd(model)
    reweighter = MetaReweighter(model, optimizer, validation=batches(1), warmup_steps=0, every=1)
    reweighter.step(batches(1)[0])
    del reweighter
    gc.collect()
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_copy_of_the_model_is_no_part_of_the_training():
    model = classifier()
    reweighter = MetaReweighter(model, sgd(model), warmup_steps=0)
    average = torch.optim.swa_utils.AveragedModel(model)
    x, y = batches(1)[0]
    average(x)
    assert reweighter._call is None
    with pytest.raises(RuntimeError, match="since the last loss"):
        reweighter.loss(average(x), y)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(reweighter)


def test_schedulers_and_new_parameter_groups():
    model = classifier()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    reweighter = MetaReweighter(model, optimizer, validation=batches(2, seed=3), warmup_steps=0, every=1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for number, batch in enumerate(batches(6)):
        if number == 3:
            optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.1})
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        last = model[4].weight.detach().clone()
        result = reweighter.step(batch)
        scheduler.step()
        assert result.val_loss is not None
        assert torch.equal(model[4].weight, last) == (number < 3)


def test_frozen_tied_and_unreached_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
            self.second.weight = self.first.weight
            self.frozen, self.unused = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.second(self.first(x).tanh()))

    found = {}
    for engine in ("forward", "finite", "unrolled"):
        model, weighting = Model(), Scores(12)
        frozen = model.frozen.weight.clone()
        reweighter = MetaReweighter(
            model,
            sgd(model),
            weighting=weighting,
            weighting_lr=0.01,
            validation=batches(1, seed=2),
            hypergradient=engine,
            warmup_steps=0,
            every=1,
        )
        for batch in batches(3):
            reweighter.step(batch)
        assert torch.equal(model.frozen.weight, frozen)
        found[engine] = weighting.scores.detach()
    assert_same(found["forward"], found["unrolled"], rtol=1e-9, atol=1e-9)
    assert_same(found["finite"], found["unrolled"], rtol=1e-4, atol=1e-4)


def test_normalised_of_equal_weights_is_exactly_one():
    for value in (1e-30, 0.1, 0.3, 7.0, 1e30):
        for size in (1, 3, 7, 128):
            weights = normalised(torch.full((size,), value), None)
            assert torch.equal(weights, torch.ones(size))
    assert torch.equal(normalised(torch.zeros(3), torch.tensor([True, False, True])), torch.tensor([1.0, 0.0, 1.0]))

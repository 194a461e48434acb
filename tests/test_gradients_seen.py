"""The gradient that the optimizer sees is not the loss's: factors, masks, other optimizers. Right, or refused.

Each is compared with a central difference through the user's own loop, in float64 (tests/oracle.py).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import Given, data, deviation, net, plain_loop, relative, reweighter_of, world_of
from same import assert_same
from torch import nn
from torch.nn.utils import prune

from torch_molere import MetaReweighter, hypergradient
from torch_molere.weighting import normalised

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-5
ENGINES = ("auto", "finite", "forward", "reverse")

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02}),
    "nadam": (torch.optim.NAdam, {"lr": 0.02}),
    "radam": (torch.optim.RAdam, {"lr": 0.02}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adamax": (torch.optim.Adamax, {"lr": 0.02}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1}),
}


def changing(change):
    """The loop that everybody has, with ``change(world)`` between backward and step."""

    def loop(world, criterion):
        (optimizer,) = world.optimizers
        optimizer.zero_grad()
        criterion(world.model(world.batch[0]), world.batch[1]).backward()
        change(world)
        optimizer.step()

    return loop


def deviations(loop, *, kind=torch.optim.SGD, steps=2, make=net, **options):
    """The largest deviation of a few steps, the first and later ones, of each engine."""
    world = world_of(make(), **options)
    world.optimizers = [kind(world.model.parameters(), **_SETTINGS[kind])]
    plain_loop(world, F.cross_entropy)  # Adam's first step has nearly no derivative
    found = []
    for engine in ENGINES:
        own = world.copy()
        reweighter = reweighter_of(own, hypergradient=engine)
        found.append(max(deviation(own, loop, reweighter) for _ in range(steps)))
    return max(found)


_SETTINGS = {torch.optim.SGD: {"lr": 0.2, "momentum": 0.9}, torch.optim.Adam: {"lr": 0.02}}


# The oracle itself, and the gradient of φ


@pytest.mark.parametrize("order", ["after", "before"])
def test_both_orders_equal_a_central_difference(order):
    world = world_of(net(nn.BatchNorm1d(7), nn.Dropout(0.3)))
    reweighter = reweighter_of(world, order=order)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE


class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.double))

    def forward(self, samples):
        return self.scores.sigmoid()


@pytest.mark.parametrize("max_weight", [None, 1.5])
def test_the_gradient_of_the_weighting_equals_a_central_difference(max_weight):
    def after(scores):
        world = world_of(net())
        w = normalised(scores.sigmoid(), None, max_weight)
        plain_loop(world, lambda outputs, targets: (w * world.losses(outputs, targets)).mean())
        return float(world.validation_loss().detach())

    world, weighting = world_of(net()), Free()
    start = weighting.scores.detach().clone()
    reweighter = reweighter_of(
        world,
        weighting=weighting,
        weighting_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        shrinkage=None,
        max_weight=max_weight,
    )
    plain_loop(world, reweighter.loss)
    shifts = 1e-5 * torch.eye(6, dtype=torch.double)
    expected = torch.tensor([(after(start + s) - after(start - s)) / 2e-5 for s in shifts], dtype=torch.double)
    assert relative(start - weighting.scores.detach(), expected) < CLOSE


# 10. Factors


def clip(world, parameters=None, name="factor", largest=0.05):
    """``clip_grad_norm_``, whose factor does not depend on the weights."""
    parameters = list(world.model.parameters() if parameters is None else parameters)
    gradients = [p.grad for p in parameters]
    before = [g.clone() for g in gradients]
    factor = world.constants.keep(name, lambda: largest / (float(nn.utils.clip_grad_norm_(parameters, largest)) + 1e-6))
    for g, old in zip(gradients, before, strict=True):
        g.copy_(old * factor)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_clip_grad_norm(kind):
    assert deviations(changing(clip), kind=kind) < CLOSE


def test_clip_grad_norm_itself_scales_the_meta_gradient():
    """No stand-in: once clipped, ∂L_val/∂w̄ is the unclipped one's times the factor, at plain SGD and small rates."""
    found = []
    for largest in (1e9, 0.01):
        world = world_of(net())
        world.optimizers = [torch.optim.SGD(world.model.parameters(), lr=1e-6)]
        norms = []
        reweighter = reweighter_of(world)

        def step(world, limit=largest, norms=norms):
            norms.append(float(nn.utils.clip_grad_norm_(world.model.parameters(), limit)))

        changing(step)(world, reweighter.loss)
        found.append(reweighter.result.meta_gradient)
    assert relative(found[1], found[0] * 0.01 / norms[0]) < 1e-4


def test_parts_clipped_by_themselves():
    def change(world):
        clip(world, world.model[0].parameters(), "first")
        clip(world, world.model[2].parameters(), "second", 0.01)

    assert deviations(changing(change)) < CLOSE


def test_a_rate_for_each_layer_by_scaling_gradients():
    def change(world):
        for i, p in enumerate(world.model.parameters()):
            p.grad.mul_(0.5**i)

    assert deviations(changing(change)) < CLOSE


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("told", [False, True], ids=["scaler_forgotten", "scaler_given"])
def test_a_grad_scaler_in_a_loop_of_ones_own(clipped, fused, told):
    scaler = torch.amp.GradScaler("cpu")

    def loop(world, criterion):
        (optimizer,) = world.optimizers
        optimizer.zero_grad()
        scaler.scale(criterion(world.model(world.batch[0]), world.batch[1])).backward()
        if clipped:
            scaler.unscale_(optimizer)
            clip(world)
        scaler.step(optimizer)
        scaler.update()

    world = world_of(net())
    world.optimizers = [torch.optim.Adam(world.model.parameters(), lr=0.02, fused=fused)]
    reweighter = reweighter_of(world, scaler=scaler if told else None)
    assert max(deviation(world, loop, reweighter) for _ in range(2)) < CLOSE


def test_a_step_that_the_scaler_skips_leaves_the_reweighter_alone():
    world = world_of(net())
    reweighter = reweighter_of(world)
    scaler = torch.amp.GradScaler("cpu")
    plain_loop(world, reweighter.loss)
    before = copy.deepcopy((reweighter.state_dict(), world.model.state_dict()))
    loss = reweighter.loss(world.model(world.batch[0]), world.batch[1])
    scaler.scale(loss).backward()
    world.model[0].weight.grad[0, 0] = torch.inf
    scaler.step(world.optimizers[0])
    scaler.update()
    assert_same((reweighter.state_dict(), world.model.state_dict()), before)
    assert deviation(world, reweighter=reweighter) < CLOSE


def accumulating(change=lambda world: None, share=0.5):
    def loop(world, criterion):
        (optimizer,) = world.optimizers
        optimizer.zero_grad()
        for x, y in (world.batch, data(9)):
            (criterion(world.model(x), y) * share).backward()
        change(world)
        optimizer.step()

    return loop


def test_accumulated_gradients():
    assert deviations(accumulating()) < CLOSE


def test_accumulated_gradients_that_are_clipped():
    assert deviations(accumulating(clip)) < CLOSE


def test_accumulated_gradients_of_unequal_shares():
    def loop(world, criterion):
        (optimizer,) = world.optimizers
        optimizer.zero_grad()
        first = criterion(world.model(world.batch[0]), world.batch[1])
        x, y = data(9)
        (0.2 * first + 0.7 * criterion(world.model(x), y)).backward()
        optimizer.step()

    assert deviations(loop) < CLOSE


@pytest.mark.parametrize("first", [False, True])
def test_another_term_with_a_backward_of_its_own(first):
    def loop(world, criterion):
        (optimizer,) = world.optimizers
        optimizer.zero_grad()

        def term():
            (0.1 * sum(p.square().sum() for p in world.model.parameters())).backward()

        loss = criterion(world.model(world.batch[0]), world.batch[1])
        if first:
            term()
        loss.backward()
        if not first:
            term()
        clip(world)
        optimizer.step()

    assert deviations(loop) < CLOSE


@pytest.mark.parametrize(
    "change",
    [
        lambda world: nn.utils.clip_grad_value_(world.model.parameters(), 0.01),
        lambda world: [p.grad.add_(torch.randn_like(p)) for p in world.model.parameters()],
        lambda world: [p.grad.sub_(p.grad.mean()) for p in world.model.parameters()],
        lambda world: [p.grad.sign_() for p in world.model.parameters()],
    ],
    ids=["clip_grad_value", "noise", "centring", "sign"],
)
@pytest.mark.parametrize("order", ["after", "before"])
def test_other_changes_of_the_gradient_are_refused(change, order):
    world = world_of(net())
    with pytest.raises(RuntimeError, match=r"gradients were changed between|order='before' looks ahead"):
        changing(change)(world, reweighter_of(world, order=order).loss)


def test_before_refuses_gradients_that_its_look_ahead_did_not_have():
    world = world_of(net())
    reweighter = reweighter_of(world, order="before")
    changing(lambda world: nn.utils.clip_grad_norm_(world.model.parameters(), 1e9))(world, reweighter.loss)
    assert reweighter.meta_updates == 1
    with pytest.raises(RuntimeError, match=r"order='before' looks ahead.*order='after'"):
        changing(clip)(world, reweighter.loss)
    scaler = torch.amp.GradScaler("cpu")

    def scaled(world, criterion):
        world.model.zero_grad()
        scaler.scale(criterion(world.model(world.batch[0]), world.batch[1])).backward()
        scaler.step(world.optimizers[0])
        scaler.update()

    assert deviation(world, scaled, reweighter) < CLOSE


# 11. Masks


def mask_of(p):
    return (torch.arange(p.numel()).reshape(p.shape) % 3 > 0).to(p.dtype)


def mask(world):
    for p in world.model.parameters():
        p.grad.mul_(mask_of(p))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_masked_gradients(kind):
    assert deviations(changing(mask), kind=kind) < CLOSE


def test_masked_and_clipped_gradients_that_were_accumulated():
    assert deviations(accumulating(lambda world: (mask(world), clip(world)))) < CLOSE


def test_gradients_that_are_taken_away():
    def change(world):
        world.model[0].weight.grad = None
        world.model[0].bias.grad.zero_()

    assert deviations(changing(change)) < CLOSE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("factor", ["mask", "rate"])
def test_parameter_hooks(engine, factor):
    """They run inside backward, of which only reverse mode knows; copies of a parameter lose them."""

    def loop(world, criterion):
        for p in world.model.parameters():
            if not p._backward_hooks:
                p.register_hook(lambda g: g * (mask_of(g) if factor == "mask" else 0.1))
        plain_loop(world, criterion)

    world = world_of(net())
    reweighter = reweighter_of(world, hypergradient=engine)
    if engine == "auto" and factor == "mask":
        loop(world, reweighter.loss)  # along the gradient a mask does not show: this meta-update is given up
    if engine in ("finite", "forward"):
        with pytest.raises(RuntimeError, match="off"):
            loop(world, reweighter.loss)
        return
    assert max(deviation(world, loop, reweighter) for _ in range(2)) < CLOSE
    assert reweighter.engine == "reverse"


def test_a_parameter_hook_that_comes_later():
    world = world_of(net())
    reweighter = reweighter_of(world)
    plain_loop(world, reweighter.loss)
    plain_loop(world, reweighter.loss)

    def loop(world, criterion):
        if not world.model[0].weight._backward_hooks:
            world.model[0].weight.register_hook(lambda g: g * mask_of(g))
        plain_loop(world, criterion)

    loop(world, reweighter.loss)
    assert deviation(world, loop, reweighter) < CLOSE


def test_post_accumulate_hooks_are_refused():
    world = world_of(net())
    reweighter = reweighter_of(world)
    plain_loop(world, reweighter.loss)
    handle = world.model[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(mask_of(p)))
    with pytest.raises(RuntimeError, match=r"parameter\.register_hook"):
        plain_loop(world, reweighter.loss)
    handle.remove()
    assert deviation(world, reweighter=reweighter) < CLOSE
    assert not any(p._post_accumulate_grad_hooks for p in world.model.parameters())


def test_pruned_layers():
    def make():
        model = net()
        for layer in (model[0], model[2]):
            prune.random_unstructured(layer, "weight", amount=0.4)
        return model

    assert deviations(plain_loop, make=make) < CLOSE


class Tokens(nn.Module):
    """A frozen vocabulary with new rows, which alone are trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 7).double(), nn.Linear(7, 3).double()

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens).mean(1)))


def test_only_new_embedding_rows_are_trained():
    def change(world):
        world.model.embedding.weight.grad[:8] = 0.0

    def tokens(seed):
        return torch.randint(12, (6, 4), generator=torch.Generator().manual_seed(seed)), data(seed)[1]

    assert deviations(changing(change), make=Tokens, batch=tokens(1), validation=tokens(2)) < CLOSE


# 12. Optimizers that are not exactly PyTorch's


class SAM(torch.optim.Optimizer):
    """The usual public one, shortened."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad, alpha=float(group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Lookahead:
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure=None):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()


class Centred(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sub_(p.grad.mean())
        return super().step(closure)


class Renamed(torch.optim.SGD):
    """Changes nothing."""


def test_sam_is_refused():
    model = net()
    with pytest.raises(TypeError, match="SAM"):
        MetaReweighter(model, SAM(model.parameters(), torch.optim.SGD, lr=0.1))


def test_a_lookahead_wrapper_is_refused():
    model = net()
    with pytest.raises(TypeError, match="Lookahead"):
        MetaReweighter(model, Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_a_subclass_that_edits_gradients_is_refused():
    model = net()
    with pytest.raises(TypeError, match=r"Centred changes step of torch\.optim\.SGD"):
        MetaReweighter(model, Centred(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Centred"):
        hypergradient(model, Centred(model.parameters(), lr=0.1), data(1), data(2), torch.ones(6).double())


def test_a_subclass_that_changes_nothing():
    world = world_of(net())
    world.optimizers = [Renamed(world.model.parameters(), lr=0.1, momentum=0.9)]
    assert deviation(world) < CLOSE


def test_an_optimizer_of_sam_that_steps_elsewhere_is_refused():
    """A meta-update inside SAM's own two passes: its gradient is of another place."""
    model = net()
    sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    world = world_of(model, sam.base_optimizer)
    reweighter = reweighter_of(world)

    def closure():
        loss = reweighter.loss(model(world.batch[0]), world.batch[1])
        loss.backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match="for SAM see the documentation"):
        sam.step(closure)


def test_sam_with_plain_steps_where_a_meta_update_is_due():
    """The documented way: SAM's two passes in all other steps, of which the second one's loss counts."""
    model = net()
    sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    world = world_of(model, sam.base_optimizer)
    reweighter = reweighter_of(world, every=2, warmup_steps=1)

    def closure():
        loss = reweighter.loss(model(world.batch[0]), world.batch[1])
        loss.backward()
        return loss

    updates = []
    for _ in range(5):
        if reweighter.meta_update_is_due:
            updates.append(deviation(world, reweighter=reweighter))
        else:
            before = model[0].weight.detach().clone()
            sam.zero_grad()
            closure()
            sam.step(closure)
            assert not torch.equal(before, model[0].weight)
    assert reweighter.steps == 5
    assert len(updates) == reweighter.meta_updates == 2 and max(updates) < CLOSE


def test_a_step_with_a_closure():
    def loop(world, criterion):
        (optimizer,) = world.optimizers

        def closure():
            optimizer.zero_grad()
            loss = criterion(world.model(world.batch[0]), world.batch[1])
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0

    world = world_of(net(nn.Dropout(0.3)))
    reweighter = reweighter_of(world)
    assert max(deviation(world, loop, reweighter) for _ in range(2)) < CLOSE
    warm = world_of(net())
    before = warm.model[0].weight.detach().clone()
    loop(warm, reweighter_of(warm, warmup_steps=10).loss)
    assert not torch.equal(before, warm.model[0].weight)


# 13. Maximising, and the optimizer's own state


def test_maximize_with_a_log_likelihood():
    def log_likelihood(outputs, targets):
        return -F.cross_entropy(outputs, targets, reduction="none")

    def run(loss_fn, maximize):
        world = world_of(net(), loss_fn=loss_fn)
        world.optimizers = [torch.optim.SGD(world.model.parameters(), lr=0.2, momentum=0.9, maximize=maximize)]
        weighting = Free()
        reweighter = reweighter_of(world, weighting=weighting)
        for _ in range(3):
            plain_loop(world, reweighter.loss)
        return weighting.scores, *world.model.parameters()

    for up, down in zip(run(log_likelihood, True), run(None, False), strict=True):
        torch.testing.assert_close(up, down, rtol=1e-6, atol=1e-6)
    world = world_of(net(), loss_fn=log_likelihood)
    world.optimizers = [torch.optim.SGD(world.model.parameters(), lr=0.2, maximize=True)]
    found = reweighter_of(world)
    plain_loop(world, found.loss)
    reference = world_of(net())
    reference.optimizers = [torch.optim.SGD(reference.model.parameters(), lr=0.2)]
    expected = reweighter_of(reference)
    plain_loop(reference, expected.loss)
    assert relative(found.result.meta_gradient, expected.result.meta_gradient) < CLOSE


def test_mixed_maximize_is_refused():
    model = net()
    groups = [{"params": model[0].parameters(), "maximize": True}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="maximize"):
        MetaReweighter(model, torch.optim.SGD(groups, lr=0.1))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_meta_gradient_leaves_the_optimizer_alone(name, default_dtype):
    kind, options = OPTIMIZERS[name]
    model = net().to(default_dtype)
    optimizer = kind(model.parameters(), **options)
    (x, y), (xv, yv) = data(1), data(2)
    x, xv = x.to(default_dtype), xv.to(default_dtype)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    identities = [id(value) for state in optimizer.state.values() for value in state.values()]
    weights = torch.rand(6, dtype=default_dtype)
    found = [hypergradient(model, optimizer, (x, y), (xv, yv), weights) for _ in range(2)]
    assert torch.equal(*found)
    assert_same((optimizer.state_dict(), model.state_dict()), before)
    assert [id(value) for state in optimizer.state.values() for value in state.values()] == identities


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", ["after", "before"])
def test_training_with_equal_weights_is_plain_training_bit_for_bit(name, order, default_dtype):
    class Equal(nn.Module):
        def forward(self, samples):
            return torch.ones_like(samples.losses)

    kind, options = OPTIMIZERS[name]
    runs = []
    for reweighted in (False, True):
        (x, y), (xv, yv) = data(1), data(2)
        x, xv = x.to(default_dtype), xv.to(default_dtype)
        world = world_of(net(nn.BatchNorm1d(7), nn.Dropout(0.2)).to(default_dtype), batch=(x, y), validation=(xv, yv))
        world.optimizers = [kind(world.model.parameters(), **options)]
        criterion = F.cross_entropy
        if reweighted:
            # Adagrad's first step does not depend on the gradients' sizes: rounding is all that there is to compare.
            reweighter = reweighter_of(world, weighting=Equal(), order=order, warmup_steps=1)
            criterion = reweighter.loss
        torch.manual_seed(3)
        for _ in range(4):
            plain_loop(world, criterion)
        runs.append((world.model.state_dict(), world.optimizers[0].state_dict(), torch.rand(2)))
    assert reweighter.meta_updates == 3
    assert_same(*runs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_in_a_loop_with_a_mask(name):
    kind, options = OPTIMIZERS[name]
    world = world_of(net())
    world.optimizers = [kind(world.model.parameters(), **options)]
    reweighter = reweighter_of(world, hypergradient="forward", weighting=Given())
    for _ in range(2):
        changing(mask)(world, reweighter.loss)
    # Adam-like second moments of masked elements are zero, where the difference has no scale.
    assert deviation(world, changing(mask), reweighter, h=1e-4 if name == "adadelta" else 1e-5) < 1e-4

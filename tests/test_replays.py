"""Forwards that are hard to repeat: the meta-gradient is right all the same, or refused with the reason.

Each is compared with a central difference through the user's own loop, in float64 (tests/oracle.py).
"""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import Given, World, data, deviation, net, plain_loop, relative, reweighter_of, world_of
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from torch_molere import MetaReweighter, ValidationBuffer, hypergradient

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-5


class Wrapped(nn.Module):
    """A small classifier around a function of its hidden layer."""

    def __init__(self, middle=None, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        self.middle = middle or (lambda module, h: h)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.outer(self.middle(self, torch.tanh(self.inner(x))))


def plain_run(world, steps, loop=plain_loop):
    """The same loop without a reweighter, with the weights of :class:`Given`."""
    given = torch.linspace(0.4, 1.6, 6, dtype=torch.double)
    for _ in range(steps):
        loop(world, lambda outputs, targets: (given * world.losses(outputs, targets)).mean())


def assert_left_alone(make, steps=3, state=lambda world: world.model.state_dict(), loop=plain_loop, **options):
    """A run with meta-updates leaves parameters, and what else ``state`` names, as a plain run does."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    plain = make()
    plain_run(plain, steps, loop)
    expected = copy.deepcopy(state(plain)), torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    world = make()
    reweighter = reweighter_of(world, **options)
    for _ in range(steps):
        loop(world, reweighter.loss)
    assert reweighter.meta_updates > 0
    found = state(world), torch.rand(1), np.random.rand(), random.random()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# 1. Randomness


def drop_layer(module, h):
    return h if random.random() < 0.5 else h + torch.sin(3 * h)


def add_noise(module, h):
    return h * torch.from_numpy(np.random.rand(*h.shape))


def own_noise(module, h):
    return h * torch.rand(h.shape, generator=module.generator, dtype=h.dtype)


def own_numpy_noise(module, h):
    return h * torch.from_numpy(module.generator.random(tuple(h.shape)))


def own_python_noise(module, h):
    return h * module.generator.random()


RANDOM = {
    "python": (drop_layer, lambda: None),
    "numpy": (add_noise, lambda: None),
    "generator": (own_noise, lambda: torch.Generator().manual_seed(3)),
    "numpy_generator": (own_numpy_noise, lambda: np.random.default_rng(3)),
    "python_generator": (own_python_noise, lambda: random.Random(3)),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_randomness_of_any_kind_in_forward(kind):
    middle, generator = RANDOM[kind]

    def make():
        return world_of(Wrapped(middle, generator=generator()))

    random.seed(0), np.random.seed(0)
    world = make()
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(3)) < CLOSE
    assert reweighter.engine == "finite"
    assert_left_alone(make)


def test_a_generator_that_the_model_does_not_own_is_differentiated_in_reverse(caplog):
    generator = torch.Generator().manual_seed(3)
    world = world_of(Wrapped(lambda module, h: h * torch.rand(h.shape, generator=generator, dtype=h.dtype)))
    reweighter = reweighter_of(world, val_loss_fn=None)
    plain_loop(world, reweighter.loss)
    assert reweighter.engine == "reverse"
    assert "the forward does not repeat" in caplog.text
    with pytest.raises(RuntimeError, match="does not repeat"):
        plain_loop(world, reweighter_of(world, hypergradient="finite").loss)


def test_dropout_rate_raised_later():
    dropout = nn.Dropout(0.0)
    world = world_of(net(dropout))
    reweighter = reweighter_of(world)
    assert deviation(world, reweighter=reweighter) < CLOSE
    for module in world.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert deviation(world, reweighter=reweighter) < CLOSE


# 3. Calls


def test_the_model_is_called_again_before_the_loss():
    def loop(world, criterion):
        optimizer = world.optimizers[0]
        optimizer.zero_grad()
        outputs = world.model(world.batch[0])
        noisy = world.model(world.batch[0] + 1.0)
        (criterion(outputs, world.batch[1]) + 0.3 * (outputs - noisy).square().mean()).backward()
        optimizer.step()

    assert deviation(world_of(net(nn.Dropout(0.3), nn.BatchNorm1d(7))), loop) < CLOSE


def test_r_drop_two_losses_of_two_calls():
    def loop(world, criterion):
        optimizer = world.optimizers[0]
        optimizer.zero_grad()
        first, second = world.model(world.batch[0]), world.model(world.batch[0])
        loss = criterion(first, world.batch[1]) + 0.5 * criterion(second, world.batch[1])
        (loss + 0.2 * F.mse_loss(first, second)).backward()
        optimizer.step()

    assert deviation(world_of(net(nn.Dropout(0.3))), loop) < CLOSE


def test_discriminator_of_real_and_fake():
    def loss_fn(outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").squeeze(1)

    def loop(world, criterion):
        optimizer = world.optimizers[0]
        optimizer.zero_grad()
        real, fake = world.model(world.batch[0]), world.model(world.extra["fake"])
        (criterion(real, torch.ones(6, 1).double()) + criterion(fake, torch.zeros(6, 1).double())).backward()
        optimizer.step()

    targets = torch.tensor([[1.0], [0.0]] * 3).double()
    world = world_of(net(classes=1), loss_fn=loss_fn, extra={"fake": data(7)[0]}, validation=(data(2)[0], targets))
    assert deviation(world, loop) < CLOSE


def test_outputs_that_no_call_returned_are_refused():
    world = world_of(net())
    with pytest.raises(RuntimeError, match="belongs into loss_fn"):
        reweighter_of(world).loss(world.model(world.batch[0]).log_softmax(1), world.batch[1])


# 1 and 2. Compiled models, and autocast


@pytest.mark.parametrize("own_masks", [True, False], ids=["own_masks", "fallback_random"])
def test_compiled_dropout(own_masks):
    """Inductor draws masks of its own, unless fallback_random is set; this compiler does so in a tenth of the time."""

    def compiler(graph, _):
        def run(*arguments):
            if own_masks:
                torch.rand(1)
            return graph(*arguments)

        return make_boxed_func(run)

    torch._dynamo.reset()
    world = world_of(net(nn.Dropout(0.5)))
    compiled = torch.compile(world.model, backend=aot_autograd(fw_compiler=compiler))
    reweighter = MetaReweighter(
        compiled, world.optimizers, weighting=Given(), validation=[world.validation], every=1, warmup_steps=0
    )
    if own_masks:
        with pytest.raises(RuntimeError, match=r"does not repeat.*fallback_random = True"):
            reweighter.step(world.batch)
    else:
        reweighter.step(world.batch)
        assert reweighter.engine == "finite" and reweighter.engines.found.error < 1e-4
    torch._dynamo.reset()


def mixed(world, criterion, enabled=True):
    world.optimizers[0].zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        outputs = world.model(world.batch[0])
    criterion(outputs.float(), world.batch[1]).backward() if not enabled else criterion(
        outputs, world.batch[1]
    ).backward()
    world.optimizers[0].step()


def single_precision():
    model = net(hidden=64).float()
    (x, y), (xv, yv) = data(1), data(2)
    return world_of(model, batch=(x.float(), y), validation=(xv.float(), yv))


@pytest.mark.parametrize("resumed", [False, True], ids=["switched_on", "resumed"])
def test_autocast_later(resumed):
    world = single_precision()
    reweighter = reweighter_of(world)
    for _ in range(2):
        plain_loop(world, reweighter.loss)
    if resumed:
        state = reweighter.state_dict()
        reweighter = reweighter_of(world)
        reweighter.load_state_dict(state)
    exact = copy.deepcopy(world)
    exact.model.double()
    exact.batch, exact.validation = ((x.double(), y) for x, y in (world.batch, world.validation))
    for state in exact.optimizers[0].state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    mixed(world, reweighter.loss)
    reference = reweighter_of(exact)
    plain_loop(exact, reference.loss)
    assert relative(reweighter.result.meta_gradient.double(), reference.result.meta_gradient) < 0.1
    assert reweighter.engine == "finite"


# 4. Two optimizers


def two_optimizers(adam_first=False):
    model = net(nn.BatchNorm1d(7))
    backbone = torch.optim.SGD(model[:2].parameters(), lr=0.2, momentum=0.9)
    head = torch.optim.Adam(model[2:].parameters(), lr=0.05)
    return world_of(model, *((head, backbone) if adam_first else (backbone, head)))


@pytest.mark.parametrize("adam_first", [False, True])
def test_two_optimizers_whichever_steps_first(adam_first):
    world = two_optimizers(adam_first)
    plain_run(world, 2)
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE


def test_another_optimizer_that_steps_first_is_refused():
    world = two_optimizers()
    reweighter = MetaReweighter(
        world.model, world.optimizers[1], weighting=Given(), validation=[world.validation], every=1, warmup_steps=0
    )
    with pytest.raises(RuntimeError, match="another optimizer stepped first"):
        plain_loop(world, reweighter.loss)


def test_another_optimizer_that_steps_afterwards_is_held_constant(caplog):
    def loop(world, criterion):
        (given,) = world.optimizers
        world.model.zero_grad()
        criterion(world.model(world.batch[0]), world.batch[1]).backward()
        given.step()
        world.extra["after"] = copy.deepcopy(world.model)
        world.extra["other"].step()

    world = two_optimizers()
    world.extra["other"] = world.optimizers.pop(1)
    World.validation_loss, own = (
        lambda self: F.cross_entropy(self.extra["after"](self.validation[0]), self.validation[1]),
        World.validation_loss,
    )
    try:
        assert deviation(world, loop) < CLOSE
    finally:
        World.validation_loss = own
    assert "no optimizer of this MetaReweighter" in caplog.text


def test_gradients_changed_between_the_steps_of_two_optimizers_are_refused():
    def loop(world, criterion):
        backbone, head = world.optimizers
        world.model.zero_grad()
        criterion(world.model(world.batch[0]), world.batch[1]).backward()
        backbone.step()
        nn.utils.clip_grad_norm_(world.model[2:].parameters(), 0.01)
        head.step()

    world = two_optimizers()
    with pytest.raises(RuntimeError, match="before the first of them steps"):
        loop(world, reweighter_of(world).loss)


def test_an_optimizer_that_does_not_step_with_the_others_is_told_of(caplog):
    world = two_optimizers()
    reweighter = reweighter_of(world, every=2)
    for number in range(4):
        world.model.zero_grad()
        reweighter.loss(world.model(world.batch[0]), world.batch[1]).backward()
        for optimizer in world.optimizers[: 1 + number % 2]:
            optimizer.step()
    assert reweighter.steps == 4
    assert caplog.text.count("not all of them have stepped") == 1


def test_a_scaler_with_two_optimizers():
    """It takes its factor out of each optimizer's gradients only when that one steps."""
    scaled, plain = two_optimizers(), two_optimizers()
    reweighter = reweighter_of(scaled, scaler=torch.amp.GradScaler("cpu"))
    reweighter.step(scaled.batch)
    reference = reweighter_of(plain)
    reference.step(plain.batch)
    assert relative(reweighter.result.meta_gradient, reference.result.meta_gradient) < 1e-5

    def loop(world, criterion, scaler=torch.amp.GradScaler("cpu")):  # noqa: B008
        world.model.zero_grad()
        scaler.scale(criterion(world.model(world.batch[0]), world.batch[1])).backward()
        for optimizer in world.optimizers:
            scaler.step(optimizer)
        scaler.update()

    with pytest.raises(RuntimeError, match="before the first of them steps"):
        loop(scaled, reweighter.loss)


# 5. Backward that is not forward's derivative


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Sign(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_gradient_reversal():
    class Adversarial(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.labels, self.domains = net(classes=6), nn.Linear(6, 3).double(), net(width=6)

        def forward(self, x):
            h = self.features(x)
            return self.labels(h), self.domains(Reversed.apply(h))

    def label_loss(outputs, targets):
        return F.cross_entropy(outputs[0], targets, reduction="none")

    def loss_fn(outputs, targets):
        return label_loss(outputs, targets) + F.cross_entropy(outputs[1], (targets + 1) % 3, reduction="none")

    world = world_of(Adversarial(), loss_fn=loss_fn, val_loss_fn=label_loss)
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE
    assert reweighter.engine == "reverse"


STRAIGHT_THROUGH = {
    "sign": lambda module, h: Sign.apply(h),
    "rounding": lambda module, h: h + ((8 * h).round() / 8 - h).detach(),
    "no_grad_gate": lambda module, h: h * _without_gradient(h.sigmoid()),
    "detached_normalisation": lambda module, h: h / h.detach().norm(dim=1, keepdim=True),
}


def _without_gradient(h):
    with torch.no_grad():
        return h * 1.0


@pytest.mark.parametrize("kind", STRAIGHT_THROUGH)
@pytest.mark.parametrize("hypergradient", ["auto", "reverse"])
def test_straight_through_and_no_grad_in_the_model(kind, hypergradient):
    world = world_of(Wrapped(STRAIGHT_THROUGH[kind]))
    reweighter = reweighter_of(world, hypergradient=hypergradient)
    assert max(deviation(world, reweighter=reweighter, as_backward=True) for _ in range(2)) < CLOSE
    # Forward mode stops at detach() as backward does.
    assert reweighter.engine == (
        "forward" if hypergradient == "auto" and "no_grad" not in kind and kind != "sign" else "reverse"
    )


def bootstrapped(outputs, targets):
    with torch.no_grad():
        soft = 0.7 * F.one_hot(targets, 3) + 0.3 * outputs.softmax(1)
    return -(soft * outputs.log_softmax(1)).sum(1)


def focal(outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    with torch.no_grad():
        factor = (1 - torch.exp(-losses)) ** 2
    return factor * losses


def asymmetric(outputs, targets):
    p, y = outputs.sigmoid(), F.one_hot(targets, 3)
    with torch.no_grad():
        factor = torch.where(y > 0, 1 - p, p) ** 4
    return -(factor * torch.where(y > 0, p, 1 - p).log()).sum(1)


@pytest.mark.parametrize("loss_fn", [bootstrapped, focal, asymmetric])
def test_no_grad_in_the_loss(loss_fn):
    world = world_of(net(nn.BatchNorm1d(7)), loss_fn=loss_fn)
    assert deviation(world, as_backward=True) < CLOSE
    with pytest.raises(RuntimeError, match=r"'finite' is .* off"):
        plain_loop(world, reweighter_of(world, hypergradient="finite").loss)
    with pytest.raises(RuntimeError, match=r"'forward' is .* off"):
        hypergradient(
            world.model,
            world.optimizers[0],
            world.batch,
            world.validation,
            torch.ones(6).double(),
            loss_fn=loss_fn,
            engine="forward",
        )


def test_unrolled_is_right_with_no_grad_in_the_loss():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    arguments = model, optimizer, data(1), data(2), torch.rand(6).double()
    found, unrolled = (hypergradient(*arguments, loss_fn=focal, engine=engine) for engine in ("auto", "unrolled"))
    assert relative(found, unrolled) < 1e-9


# 6. Hidden state


def count(module, h):
    module.calls += 1
    module.log.append(module.calls)
    module.seen["latest"] = h.detach().mean()
    module.total += 1.0
    return h * (1 + 0.1 * module.calls) * (1 + 0.01 * module.total)


def test_counters_and_temperatures():
    def make():
        attributes = {"calls": 0, "log": [], "seen": {}, "total": torch.zeros((), dtype=torch.double)}
        return world_of(Wrapped(count, **attributes))

    world = make()
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(3)) < CLOSE
    assert (world.model.calls, world.model.log, float(world.model.total)) == (3, [1, 2, 3], 3.0)
    assert_left_alone(make, state=lambda w: [p.detach() for p in w.parameters()] + [w.model.seen["latest"]])


def remember(module, h):
    """A recurrent state, in a tuple and, written in place, in a list."""
    state, module.hidden = module.hidden[0], (torch.tanh(h + 0.5 * module.hidden[0]).detach(),)
    module.written[0].mul_(0.5).add_(h.detach())
    return h + state + 0.1 * module.written[0]


def test_a_recurrent_state_that_is_kept():
    def make():
        zeros = [torch.zeros(6, 7).double() for _ in range(2)]
        return world_of(Wrapped(remember, hidden=(zeros[0],), written=[zeros[1]]))

    world = make()
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter, as_backward=True) for _ in range(3)) < CLOSE
    assert_left_alone(make, state=lambda w: (w.model.state_dict(), w.model.hidden, w.model.written))


def grow(module, h):
    """A buffer that appears, and one that grows."""
    if "mean" not in module._buffers:
        module.register_buffer("mean", h.detach().mean(0))
    module.mean = 0.9 * module.mean + 0.1 * h.detach().mean(0)
    module.bank = torch.cat([module.bank, h.detach()[:1]])
    return h - module.mean + module.bank.mean(0)


def test_buffers_that_appear_and_grow():
    def make():
        world = world_of(Wrapped(grow))
        world.model.register_buffer("bank", torch.zeros(1, 7).double())
        return world

    world = make()
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter, as_backward=True) for _ in range(3)) < CLOSE
    assert len(world.model.bank) == 4
    assert_left_alone(make)


def test_a_buffer_that_two_modules_share():
    class Counting(nn.Module):
        def __init__(self, count, step):
            super().__init__()
            self.register_buffer("count", count)
            self.step = step

        def forward(self, h):
            self.count += self.step
            return h * (1 + 0.1 * self.count)

    def make():
        shared = torch.zeros((), dtype=torch.double)
        return world_of(net(Counting(shared, 1.0), Counting(shared, 2.0)))

    world = make()
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE
    assert_left_alone(make)


def test_a_teacher_in_a_list():
    """Its batch statistics move in training mode."""

    def make():
        model = Wrapped(lambda module, h: h + 0.1 * module.teacher[0](h).detach())
        model.teacher = [nn.BatchNorm1d(7).double()]
        return world_of(model)

    assert deviation(make()) > 0  # through the teacher there is a gradient of the true loss, and none in backward
    assert_left_alone(make, state=lambda w: (w.model.state_dict(), w.model.teacher[0].state_dict()))


def test_hooks_that_look_on_run_once_a_step():
    world = world_of(net(nn.BatchNorm1d(7)))
    ran = dict.fromkeys(("before", "after", "backward"), 0)

    def tick(name):
        def hook(*_):
            ran[name] += 1

        return hook

    layer = world.model[0]
    layer.register_forward_pre_hook(tick("before"))
    layer.register_forward_hook(tick("after"))
    reweighter = reweighter_of(world)
    for _ in range(4):
        plain_loop(world, reweighter.loss)
    assert reweighter.engine == "finite"
    assert ran["before"] == ran["after"] == 4
    layer.register_full_backward_hook(tick("backward"))
    plain_loop(world, reweighter.loss)
    assert ran["backward"] == 1


def test_hooks_that_change_what_is_computed():
    world = world_of(net(nn.BatchNorm1d(7)))
    world.model[0].register_forward_hook(lambda module, inputs, outputs: outputs * 1.5)
    world.model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE
    assert reweighter.engine == "finite"
    world.model[3].register_forward_hook(lambda module, inputs, outputs: outputs + outputs.square())
    assert deviation(world, reweighter=reweighter) < CLOSE


def test_features_that_a_hook_catches_for_the_loss():
    caught = {}

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none") + caught["h"].square().mean(1)

    world = world_of(net(), loss_fn=loss_fn)
    world.model[1].register_forward_hook(lambda module, inputs, outputs: caught.update(h=outputs))
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE
    assert reweighter.engine == "finite"


# 7. Inputs that are edited


@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_a_model_that_edits_its_inputs_is_refused_at_the_first_step(warmup_steps):
    world = world_of(nn.Sequential(nn.ReLU(inplace=True), net()))
    reweighter = reweighter_of(world, validation=ValidationBuffer(), warmup_steps=warmup_steps)
    with pytest.raises(ValueError, match="clone them"):
        plain_loop(world, reweighter.loss)
    with pytest.raises(ValueError, match="clone them"):
        reweighter.check(world.batch)


# 8. Checkpoints


def checkpointed(reentrant, frozen=False):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Linear(5, 7).double()
            self.block, self.head = (
                net(nn.BatchNorm1d(7), nn.Dropout(0.3), width=7, classes=7),
                nn.Linear(7, 3).double(),
            )
            self.embedding.requires_grad_(not frozen)

        def forward(self, x):
            h = self.embedding(x)
            if frozen:
                h.requires_grad_()  # enable_input_require_grads in transformers
            return self.head(checkpoint(self.block, h, use_reentrant=reentrant))

    torch.manual_seed(0)
    return world_of(Checkpointed())


@pytest.mark.parametrize("engine", ["auto", "forward", "reverse"])
def test_checkpoints_recompute_at_the_look_ahead(engine):
    world = checkpointed(reentrant=False)
    reweighter = reweighter_of(world, hypergradient=engine)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE
    assert_left_alone(lambda: checkpointed(reentrant=False), hypergradient=engine)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("engine", ["auto", "finite", "forward", "reverse"])
def test_reentrant_checkpoints_are_refused(frozen, engine):
    world = checkpointed(reentrant=True, frozen=frozen)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        warnings.simplefilter("ignore")
        plain_loop(world, reweighter_of(world, hypergradient=engine).loss)


# 9. Parameters that a replay may not reach


def test_parameters_in_a_list_are_refused():
    extra = nn.Parameter(torch.randn(7).double())
    model = Wrapped(lambda module, h: h * module.scales[0], scales=[extra])
    world = world_of(model, torch.optim.SGD([*model.parameters(), extra], lr=0.2))
    with pytest.raises(RuntimeError, match=r"shapes \[\(7,\)\].*nn.ParameterList"):
        plain_loop(world, reweighter_of(world).loss)


@pytest.mark.parametrize("engine", ["auto", "finite", "forward", "reverse"])
@pytest.mark.parametrize("both", [False, True], ids=["only_by_the_list", "by_both"])
def test_a_reference_to_a_parameter_in_a_list_is_refused(engine, both):
    model = Wrapped(lambda module, h: h * module.scales[0] * (module.scale.exp() if both else 1.0))
    model.scale = nn.Parameter(torch.randn(7).double())
    model.scales = [model.scale]
    world = world_of(model)
    with pytest.raises(RuntimeError, match="attributes of the model"):
        plain_loop(world, reweighter_of(world, hypergradient=engine).loss)
    with pytest.raises(RuntimeError, match="attributes of the model"):
        hypergradient(model, world.optimizers[0], world.batch, world.validation, torch.rand(6).double(), engine=engine)


@pytest.mark.parametrize("engine", ["auto", "reverse"])
def test_cached_parametrizations(engine):
    """Refused while the cache is on; right once it is off."""
    world = world_of(net())
    parametrizations.weight_norm(world.model[0])
    world.optimizers = [torch.optim.SGD(world.model.parameters(), lr=0.2)]
    reweighter = reweighter_of(world, hypergradient=engine)
    with pytest.raises(RuntimeError, match=r"parametrize.cached"), parametrize.cached():
        plain_loop(world, reweighter.loss)
    assert deviation(world, reweighter=reweighter) < CLOSE


def test_old_style_weight_norm_spectral_norm_and_pruning():
    """Their forward pre-hooks make an attribute of what the parameters are, which keeps them from being copied."""
    ran = []

    def make():
        torch.manual_seed(6)
        model = net(nn.Linear(7, 7))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(model[0])
        nn.utils.spectral_norm(model[1])  # its power iteration runs without gradients
        prune.l1_unstructured(model[3], "weight", amount=0.4)
        model[1].register_forward_hook(lambda *_: ran.append(1))
        return world_of(model)

    assert_left_alone(make, steps=2)
    world = make()
    reweighter = reweighter_of(world)
    plain_loop(world, reweighter.loss)
    ran.clear()
    plain_loop(world, reweighter.loss)
    assert len(ran) == 1
    assert deviation(world, reweighter=reweighter, as_backward=True) < CLOSE


class ArcFace(nn.Module):
    """A criterion with parameters of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.weight = nn.Parameter(torch.randn(3, 3).double())

    def forward(self, outputs, targets):
        cosine = F.linear(F.normalize(outputs), F.normalize(self.weight))
        margin = 0.3 * F.one_hot(targets, 3)
        return F.cross_entropy(8 * torch.cos(torch.acos(cosine.clamp(-0.99, 0.99)) + margin), targets, reduction="none")


def test_a_criterion_with_parameters():
    model, criterion = net(nn.BatchNorm1d(7)), ArcFace()
    world = world_of(model, torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05), loss_fn=criterion)
    reweighter = reweighter_of(world)
    assert max(deviation(world, reweighter=reweighter) for _ in range(2)) < CLOSE
    assert deviation(world, reweighter=reweighter, as_backward=True) < CLOSE


def test_a_criterion_with_parameters_inside_a_function_is_refused():
    model, criterion = net(), ArcFace()
    parameters = [*model.parameters(), *criterion.parameters()]
    world = world_of(model, torch.optim.SGD(parameters, lr=0.05), loss_fn=lambda a, b: criterion(a, b))
    with pytest.raises(RuntimeError, match="pass the module that has them as loss_fn"):
        plain_loop(world, reweighter_of(world).loss)


def test_a_parameter_in_two_optimizers_is_refused():
    model = net()
    optimizers = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(model[2:].parameters(), lr=0.1)
    world = world_of(model, *optimizers)
    with pytest.raises(ValueError, match="several optimizers hold the same parameters"):
        plain_loop(world, reweighter_of(world).loss)

"""The look-ahead against the step really taken; its derivative against central differences of that step."""

import copy
import functools
import itertools

import pytest
import torch
from torch import optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_molere.hypergradients import update as update_module
from torch_molere.hypergradients.jacobians import diagonals, has_closed_form
from torch_molere.hypergradients.update import (
    Update,
    check_differentiable,
    differentiable_optimizer,
    maximizes,
    overflowed,
    unscaled,
)

CLOSED = [
    (optim.SGD, {}),
    (optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adam, {}),
    (optim.Adam, {"weight_decay": 0.1, "betas": (0.7, 0.95), "eps": 1e-3}),
    (optim.Adam, {"weight_decay": 0.1, "maximize": True}),
    (optim.AdamW, {}),
    (optim.AdamW, {"weight_decay": 0.3, "maximize": True}),
]
OTHERS = [
    (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (optim.SGD, {"lr": torch.tensor(0.05), "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (optim.NAdam, {}),
    (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.RAdam, {}),
    (optim.RAdam, {"weight_decay": 0.1, "maximize": True}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (optim.Adagrad, {"lr_decay": 0.1}),
    (optim.Adadelta, {"weight_decay": 0.1}),
    (optim.Adamax, {}),
    (optim.ASGD, {"lambd": 0.1}),
]
NO_EPS = (optim.SGD, optim.ASGD)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def counts_in_double():
    """PyTorch's differentiable steps compute corrections of bias in the precision of their count of steps."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def prepared(kind, options, taken, dtype=torch.double):
    """An optimizer of three parameters after some steps, of which the last had no gradient so far."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)

    parameters = [torch.nn.Parameter(normal(*shape)) for shape in [(3, 4), (5,), (2, 2)]]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.2}]
    optimizer = kind(groups, **{"lr": 0.05, **options})
    for _ in range(taken):
        for parameter in parameters[:2]:
            parameter.grad = normal(*parameter.shape)
        optimizer.step()
    gradients = [normal(*parameter.shape) for parameter in parameters]
    cotangents = [normal(*parameter.shape) for parameter in parameters]
    return optimizer, parameters, gradients, cotangents


def contents(optimizer):
    """The whole optimizer: by parameter, its value, its gradient and its state; and the options."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [(p.detach(), p.grad, dict(optimizer.state.get(p, {}))) for p in parameters]
    options = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    return copy.deepcopy((found, options, optimizer.defaults))


def assert_same_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# The step that follows.


@pytest.mark.parametrize(("kind", "options"), CLOSED + OTHERS)
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("taken", [0, 6])
def test_looks_at_the_very_step_that_follows(kind, options, implementation, taken):
    if "fused" in implementation and kind not in (optim.SGD, optim.Adam, optim.AdamW):
        pytest.skip("PyTorch has no fused one for the CPU")
    if "foreach" in implementation and implementation["foreach"] and isinstance(options.get("lr"), torch.Tensor):
        pytest.skip("PyTorch refuses it")
    optimizer, parameters, gradients, _ = prepared(kind, options | implementation, taken, torch.float)
    after = Update([optimizer], parameters, gradients).look_ahead()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert_same_bits(after, [parameter.detach() for parameter in parameters])
    assert not any(value.requires_grad for value in after)


@pytest.mark.parametrize(("kind", "options"), CLOSED + OTHERS)
@pytest.mark.parametrize("taken", [0, 3])
def test_changes_no_bit_of_the_optimizer(kind, options, taken, default_dtype):
    """Issue 13, item 13: a ``.double()`` of a float64 count of steps was no copy."""
    optimizer, parameters, gradients, cotangents = prepared(kind, options, taken, default_dtype)
    given = copy.deepcopy((gradients, cotangents))
    before, attributes, held = contents(optimizer), list(vars(optimizer)), list(optimizer.state)
    update = Update([optimizer], parameters, gradients)
    first = update.look_ahead(), update.vjp(cotangents)
    assert_same_bits(contents(optimizer), before)
    assert list(vars(optimizer)) == attributes
    assert [id(parameter) for parameter in optimizer.state] == [id(parameter) for parameter in held]
    assert_same_bits((gradients, cotangents), given)
    assert not any(gradient.requires_grad for gradient in gradients)
    again = Update([optimizer], parameters, gradients)
    assert_same_bits((again.look_ahead(), again.vjp(cotangents)), first)


def test_runs_no_hooks_on_the_copies():
    optimizer, parameters, gradients, cotangents = prepared(optim.NAdam, {}, 2)
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: ran.append("global"))
    update = Update([optimizer], parameters, gradients)
    update.look_ahead(), update.vjp(cotangents)
    handle.remove()
    assert not ran


# The derivative.


@pytest.mark.parametrize(("kind", "options"), CLOSED + OTHERS)
@pytest.mark.parametrize("taken", [0, 1, 7])
@pytest.mark.usefixtures("counts_in_double")
def test_vjp_is_a_central_difference_of_the_step(kind, options, taken):
    # With a small eps the first step hardly depends on the gradient's size: a difference of it would be rounding.
    options = options if issubclass(kind, NO_EPS) else {"eps": 1e-2, **options}
    optimizer, parameters, gradients, cotangents = prepared(kind, options, taken)
    found = Update([optimizer], parameters, gradients).vjp(cotangents)
    # Every element alone, as an update of each depends on its own gradient only.
    small = 1e-5

    def moved(sign):
        stepped = copy.deepcopy((optimizer, parameters))
        for parameter, gradient in zip(stepped[1], gradients, strict=True):
            parameter.grad = gradient + sign * small
        stepped[0].step()
        return [parameter.detach() for parameter in stepped[1]]

    for u, v, plus, minus in zip(found, cotangents, moved(1), moved(-1), strict=True):
        torch.testing.assert_close(u, v * (plus - minus) / (2 * small), rtol=1e-5, atol=1e-9)
        assert u.abs().max() > 1e-4


@pytest.mark.usefixtures("counts_in_double")
@pytest.mark.parametrize(("kind", "options"), CLOSED)
@pytest.mark.parametrize("taken", [0, 1, 6])
@pytest.mark.parametrize("without", [None, 0, 2])
def test_closed_form_equals_autograd(kind, options, taken, without, monkeypatch):
    optimizer, parameters, gradients, cotangents = prepared(kind, options, taken)
    assert has_closed_form(optimizer)
    if without is not None:
        gradients[without] = None
    cotangents[1] = None
    update = Update([optimizer], parameters, gradients)
    found = update.vjp(cotangents)
    monkeypatch.setattr(update_module, "has_closed_form", lambda _: False)
    # At Adam's first step, here always the third parameter's, autograd is left with rounding.
    torch.testing.assert_close(found, update.vjp(cotangents), rtol=1e-10, atol=1e-15)
    assert found[0 if without == 2 else 2].abs().min() > 0
    assert not found[1].any()
    if without is not None:
        assert not found[without].any()


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_single_precision_is_enough(taken):
    """At Adam's first step all but a term of the size of eps cancels."""
    single, double = (prepared(optim.AdamW, {}, taken, dtype) for dtype in (torch.float, torch.double))
    for found, expected in zip(*(Update([s[0]], *s[1:3]).vjp(s[3]) for s in (single, double)), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_all_parameters_together_as_one_by_one(options):
    """A group's parameters go through together, whatever the count of their steps."""
    optimizer, parameters, gradients, _ = prepared(optim.Adam, options, 3)
    optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]  # one that has taken no step
    pairs = dict(zip(parameters, gradients, strict=True))
    one_by_one = [diagonals(optimizer, {parameter: pairs[parameter]})[parameter] for parameter in parameters]
    together = diagonals(optimizer, pairs)
    assert_same_bits([together[parameter] for parameter in parameters], one_by_one)


@pytest.mark.parametrize(("kind", "options"), [*CLOSED[3:6], *OTHERS[1:3]])
@pytest.mark.parametrize(("most", "number"), [(1, 3), (16, 2), (17, 2), (20, 2), (21, 1)])
def test_in_portions_as_all_together(kind, options, most, number, monkeypatch):
    optimizer, parameters, gradients, cotangents = prepared(kind, options, 3)
    cotangents[0] = None
    update = Update([optimizer], parameters, gradients)
    expected = update.look_ahead(), update.vjp(cotangents)
    monkeypatch.setattr(update_module, "PORTION", most)
    portions = [portion for _, portion in update._portions()]
    assert len(portions) == number  # of 12, 5 and 4 elements
    assert [id(each) for portion in portions for each in portion] == [id(each) for each in parameters]
    assert_same_bits((update.look_ahead(), update.vjp(cotangents)), expected)


@pytest.mark.parametrize("closed_form", [True, False])
def test_zero_where_there_is_no_finite_derivative(closed_form, monkeypatch):
    if not closed_form:
        monkeypatch.setattr(update_module, "has_closed_form", lambda _: False)
    optimizer, parameters, gradients, cotangents = prepared(optim.Adam, {}, 0)
    gradients[0][1:] = 0.0
    cotangents[1][0] = torch.nan
    u = Update([optimizer], parameters, gradients).vjp(cotangents)
    assert not u[0][1:].any()
    assert u[0][0].all()
    assert u[1].isnan().tolist() == [True, False, False, False, False]  # what is wrong with v does not get lost


@pytest.mark.usefixtures("counts_in_double")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.Adam, {"amsgrad": True}),
        (optim.SGD, {"momentum": 0.9, "lr": torch.tensor(0.05, dtype=torch.double)}),
        (optim.AdamW, {"lr": torch.tensor(0.05, dtype=torch.double), "foreach": False}),
    ],
)
def test_leaves_to_autograd_what_it_does_not_know(kind, options):
    parameters = [torch.randn(3, 4, dtype=torch.double)]
    gradients, cotangents = ([torch.randn(3, 4, dtype=torch.double)] for _ in range(2))
    asked = kind(parameters, **({"lr": 0.05} | options))
    assert not has_closed_form(asked)
    plain = kind(parameters, lr=0.05, momentum=0.9) if kind is optim.SGD else kind(parameters, lr=0.05)
    assert has_closed_form(plain)
    # At a first step the largest second moment is the second moment.
    found, expected = (Update([optimizer], parameters, gradients) for optimizer in (asked, plain))
    torch.testing.assert_close(found.look_ahead(), expected.look_ahead(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.vjp(cotangents), expected.vjp(cotangents), rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize(("kind", "options"), [(optim.SGD, {"momentum": 0.9}), (optim.AdamW, {}), (optim.RMSprop, {})])
def test_sharded_parameters_as_whole_ones(kind, options):
    """FSDP2's DTensors, here on a mesh of one process."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = []
        for sharded in (False, True):
            _, *tensors = prepared(optim.SGD, {}, 0)
            if sharded:
                tensors = [[distribute_tensor(each.detach(), mesh, [Shard(0)]) for each in kin] for kin in tensors]
            parameters, gradients, cotangents = tensors
            parameters = [torch.nn.Parameter(parameter) for parameter in parameters]
            optimizer = kind(parameters, lr=0.05, **options)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            update = Update([optimizer], parameters, gradients)
            results = [*update.look_ahead(), *update.vjp(cotangents)]
            assert all(isinstance(each, DTensor) == sharded for each in results)
            found.append([each.full_tensor() if sharded else each for each in results])
        assert_same_bits(*found)
    finally:
        distributed.destroy_process_group()


# Several optimizers.


def test_two_optimizers_as_each_alone():
    first, second = prepared(optim.SGD, {"momentum": 0.9}, 3), prepared(optim.RMSprop, {}, 2)
    alone = [Update([optimizer], *rest[:2]) for optimizer, *rest in (first, second)]
    mixed = [list(itertools.chain(*zip(*pair, strict=True))) for pair in zip(first[1:], second[1:], strict=True)]
    parameters, gradients, cotangents = mixed
    both = Update([second[0], first[0]], parameters, gradients)
    for place, (update, (*_, own)) in enumerate(zip(alone, (first, second), strict=True)):
        assert_same_bits(both.look_ahead()[place::2], update.look_ahead())
        assert_same_bits(both.vjp(cotangents)[place::2], update.vjp(own))


def test_each_parameter_in_exactly_one_optimizer():
    optimizer, parameters, gradients, _ = prepared(optim.SGD, {}, 0)
    other = optim.SGD([parameters[1]], lr=0.1)
    with pytest.raises(ValueError, match=r"parameters\[1\] of shape \(5,\) is held by 2 of the 2 optimizers"):
        Update([optimizer, other], parameters, gradients)
    with pytest.raises(ValueError, match=r"parameters\[0\] of shape \(3, 4\) is held by 0 of the 1 optimizers"):
        Update([other], parameters, gradients)
    assert_same_bits(Update([optimizer], parameters[1:2], gradients[1:2]).vjp(gradients[1:2]), [-0.05 * gradients[1]])


# What cannot be looked ahead through.


class DefaultsOnly(optim.AdamW):
    """A subclass that changes no step."""

    def __init__(self, parameters, name):
        super().__init__(parameters, lr=0.01, betas=(0.9, 0.98))
        self.name = name

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)

    def rate(self):
        return self.param_groups[0]["lr"]


class EditsGradients(optim.SGD):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(2.0)
        return super().step(closure)


class ChangesHowGradientsAreFound(optim.Adam):
    def _init_group(self, *args):
        return super()._init_group(*args)


class Doubling:
    def step(self, closure=None):
        super().step(closure)
        return super().step(closure)


class Twice(Doubling, optim.SGD):
    pass


class Behind(optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


class AdamWBeforeIt(optim.AdamW, Behind):
    """AdamW's own step is Adam's: here the one between them."""


def decorated(step):
    @functools.wraps(step)
    def clipped(self, closure=None):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return step(self, closure)

    return clipped


class Decorated(optim.SGD):
    step = decorated(optim.SGD.step)


class SAM(optim.Optimizer):
    """The usual public one (davda54/sam), shortened."""

    def __init__(self, parameters, base_optimizer, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def step(self, closure=None):
        raise AssertionError("not called here")


class Lookahead(optim.Optimizer):
    """As timm's: no call of the parent's constructor, the inner optimizer in ``_base_optimizer``."""

    def __init__(self, base_optimizer):
        self._optimizer_step_pre_hooks = {}
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults

    def step(self, closure=None):
        raise AssertionError("not called here")


class Wrapper:
    """As many public ones, with an attribute ``optimizer`` and all else passed on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class Own(optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "differentiable": False})

    def step(self, closure=None):
        raise AssertionError("not called here")


def parameter():
    return torch.nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(("kind", "options"), CLOSED + OTHERS)
def test_accepts_every_differentiable_optimizer(kind, options):
    optimizer = kind([parameter()], **options)
    optim.lr_scheduler.StepLR(optimizer, 1)  # which puts a counter around its step
    check_differentiable(optimizer)
    check_differentiable(copy.deepcopy(optimizer))
    check_differentiable(type("Renamed", (kind,), {})([parameter()], **options))
    assert differentiable_optimizer(optimizer) is optimizer


def test_accepts_a_subclass_that_changes_no_step():
    optimizer = DefaultsOnly([parameter()], "a name")
    check_differentiable(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 3)
    held = optimizer.param_groups[0]["params"]
    assert has_closed_form(optimizer)
    update = Update([optimizer], held, [torch.ones(3, 3)])
    # The derivative of -γ g / (|g| + ε) at g = 1.
    torch.testing.assert_close(update.vjp([torch.ones(3, 3)])[0], torch.full((3, 3), -0.01 * 1e-8), rtol=1e-5, atol=0)
    after = update.look_ahead()
    optimizer.step()
    assert_same_bits(after, [held[0].detach()])


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Adafactor", "Muon"])
@pytest.mark.parametrize("loaded", [False, True])
def test_refuses_optimizers_without_the_option(name, loaded):
    if not hasattr(optim, name):
        pytest.skip("a newer PyTorch has it")
    optimizer = getattr(optim, name)([parameter()], lr=0.1)
    if loaded:  # upon which PyTorch writes "differentiable" into the defaults of any optimizer
        optimizer.load_state_dict(optimizer.state_dict())
        assert "differentiable" in optimizer.defaults
    with pytest.raises(TypeError, match=f"{name} cannot be differentiated: .* use SGD, Adam"):
        check_differentiable(optimizer)


def test_refuses_rprop_whose_derivative_is_zero():
    with pytest.raises(TypeError, match="Rprop uses only the signs of the gradients"):
        check_differentiable(optim.Rprop([parameter()]))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (EditsGradients, "step of torch.optim.SGD"),
        (ChangesHowGradientsAreFound, "_init_group of torch.optim.Adam,"),
        (Twice, "step of torch.optim.SGD"),
        (AdamWBeforeIt, "step of torch.optim.AdamW"),
        (Decorated, "step of torch.optim.SGD"),
    ],
)
def test_refuses_a_subclass_with_a_step_of_its_own(kind, changed):
    with pytest.raises(TypeError, match=f"{kind.__name__} changes {changed}.* use torch.optim.*SAM"):
        check_differentiable(kind([parameter()], lr=0.1))


def test_refuses_a_step_put_on_the_optimizer_itself():
    optimizer = optim.SGD([parameter()], lr=0.1)
    optimizer.step = decorated(optim.SGD.step).__get__(optimizer)
    with pytest.raises(TypeError, match=r"SGD changes step of torch.optim.SGD"):
        check_differentiable(optimizer)


@pytest.mark.parametrize(
    ("wrapped", "attribute"),
    [
        (lambda: SAM([parameter()], optim.SGD, lr=0.1), "base_optimizer"),
        (lambda: Lookahead(optim.SGD([parameter()], lr=0.1)), "_base_optimizer"),
        (lambda: Wrapper(optim.SGD([parameter()], lr=0.1)), "optimizer"),
    ],
)
def test_refuses_wrappers_and_names_the_optimizer_to_give(wrapped, attribute):
    optimizer = wrapped()
    assert differentiable_optimizer(optimizer) is optimizer
    with pytest.raises(TypeError, match=rf"give the SGD inside \(here optimizer.{attribute}\).*SAM"):
        check_differentiable(optimizer)
    check_differentiable(getattr(optimizer, attribute))


@pytest.mark.parametrize("given", [None, "SGD", torch.nn.Linear(1, 1)])
def test_refuses_what_is_no_optimizer(given):
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got "):
        check_differentiable(given)


def test_refuses_a_class_that_is_not_of_pytorch():
    with pytest.raises(TypeError, match=r"Own cannot be differentiated: .* use SGD, Adam"):
        check_differentiable(Own([parameter()]))


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_refuses_groups_that_go_up_and_down(kind):
    up, down = (kind([parameter()], lr=0.1, maximize=maximize) for maximize in (True, False))
    assert maximizes([up]) and not maximizes([down])
    mixed = kind([{"params": [parameter()], "maximize": True}, {"params": [parameter()]}], lr=0.1)
    with pytest.raises(ValueError, match="maximize is True in some parameter groups"):
        check_differentiable(mixed)
    with pytest.raises(ValueError, match="maximize is True in some parameter groups"):
        maximizes([up, down])


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_refuses_sparse_gradients(layout):
    optimizer, parameters, gradients, _ = prepared(optim.SGD, {}, 0)
    gradients[0] = gradients[0].to_sparse() if layout == "coo" else gradients[0].to_sparse_csr()
    with pytest.raises(TypeError, match="sparse=False"):
        Update([optimizer], parameters, gradients)


# Wrappers and scalers that change nothing in a step.


def test_sees_through_accelerate():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    class OwnStep(AcceleratedOptimizer):
        def step(self, closure=None):
            raise AssertionError("not called here")

    inner = optim.SGD([parameter()], lr=0.1)
    wrapped = Accelerator(cpu=True).prepare(inner)
    assert wrapped is not inner and differentiable_optimizer(wrapped) is inner
    check_differentiable(wrapped)
    own = OwnStep(optim.SGD([parameter()], lr=0.1))
    assert differentiable_optimizer(own) is own
    with pytest.raises(TypeError, match="OwnStep wraps another one"):
        check_differentiable(own)
    with pytest.raises(TypeError, match="EditsGradients changes step"):
        check_differentiable(Accelerator(cpu=True).prepare(EditsGradients([parameter()], lr=0.1)))


def test_sees_through_lightning():
    from lightning.pytorch.core.optimizer import LightningOptimizer

    inner = optim.AdamW([parameter()], lr=0.1)
    wrapped = LightningOptimizer(inner)
    assert differentiable_optimizer(wrapped) is inner
    check_differentiable(wrapped)
    wrapped.load_state_dict(inner.state_dict())  # upon which PyTorch puts its hooks around the wrapper's step
    assert differentiable_optimizer(wrapped) is inner


def test_a_gradient_scaler_of_a_fused_optimizer():
    optimizer, _, gradients, _ = prepared(optim.SGD, {"fused": True}, 0)
    gradients[1] = None
    assert not overflowed(optimizer)
    assert unscaled(optimizer, gradients) == gradients
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    found = unscaled(optimizer, gradients)
    assert not overflowed(optimizer) and found[1] is None
    assert_same_bits(found[0], gradients[0] / 4.0)
    optimizer.found_inf = torch.tensor(1.0)
    assert overflowed(optimizer)

"""What people do with a model, its loss and its gradients around a step works as without reweighting, or is refused."""

import copy
import io
import shutil
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from oracle import Given, NoForwardRule, World, data, deviation, net, plain_loop, reweighter_of, world_of
from torch import nn

from torch_molere import MetaReweighter, ValidationBuffer
from torch_molere.hypergradients.functional import gradients_apart

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-5


# Backward


def test_backward_twice():
    def loop(world, criterion):
        world.optimizers[0].zero_grad()
        loss = criterion(world.model(world.batch[0]), world.batch[1])
        loss.backward(retain_graph=True)
        loss.backward()
        world.optimizers[0].step()

    world = world_of(net(nn.Dropout(0.3)))
    reweighter = reweighter_of(world)
    assert max(deviation(world, loop, reweighter) for _ in range(2)) < CLOSE
    assert reweighter.steps == 2


def test_the_gradient_of_a_layer_first():
    """An adaptive weight, as GANs take it from two gradients of the last layer."""

    def loop(world, criterion):
        world.optimizers[0].zero_grad()
        last = world.model[-1].weight
        outputs = world.model(world.batch[0])
        loss, other = criterion(outputs, world.batch[1]), outputs.square().mean()
        norms = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (loss, other)]
        share = world.constants.keep("share", lambda: float(norms[0] / (norms[1] + 1e-4)))
        (loss + 0.1 * share * other).backward()
        world.optimizers[0].step()

    world = world_of(net())
    reweighter = reweighter_of(world)
    assert max(deviation(world, loop, reweighter) for _ in range(2)) < CLOSE
    assert reweighter.steps == 2


def test_a_gradient_alone_is_no_step():
    world = world_of(net())
    reweighter = reweighter_of(world)
    loss = reweighter.loss(world.model(world.batch[0]), world.batch[1])
    torch.autograd.grad(loss, list(world.model.parameters()))
    world.optimizers[0].step()
    assert reweighter.steps == 0


# Copies


@dataclass
class Record:
    h: Any = None


class Keeping(nn.Module):
    """Keeps what it has computed, in every way that a module can."""

    def __init__(self, forward_rule=True):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        self.register_buffer("mean", torch.zeros(7).double())
        self.latest, self.states, self.by_name, self.pair = None, [], {}, (None, None)
        self.space, self.record = SimpleNamespace(h=None, calls=0), Record()
        self.forward_rule = forward_rule

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        self.latest = h.detach()
        self.states.append(h.detach())
        self.by_name["h"] = h.detach()
        self.pair = (h.detach(), 0)
        self.space.h, self.space.calls, self.record.h = h.detach(), self.space.calls + 1, h.detach()
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        outputs = self.outer(h)
        return outputs if self.forward_rule else NoForwardRule.apply(outputs)


@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("order", ["after", "before"])
def test_the_model_can_be_copied_and_saved_after_forward_mode(succeeds, order):
    world = world_of(Keeping(succeeds))
    parameters = dict(world.model.named_parameters())
    reweighter = reweighter_of(world, hypergradient="forward", order=order)
    if succeeds:
        plain_loop(world, reweighter.loss)
    else:
        with pytest.raises(RuntimeError, match="'forward' cannot be used"):
            plain_loop(world, reweighter.loss)
    assert all(p is parameters[name] for name, p in world.model.named_parameters())
    assert len(world.model.states) == world.model.space.calls == 1
    twin = copy.deepcopy(world.model)
    file = io.BytesIO()
    torch.save(world.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (twin, again):
        assert torch.equal(other(world.batch[0]), world.model(world.batch[0]))
        assert torch.equal(other.states[0], world.model.states[0])


def test_a_copy_has_no_reweighter():
    world = world_of(net())
    reweighter = reweighter_of(world)
    twin = copy.deepcopy(world.model)
    with pytest.raises(RuntimeError, match="not what a call of the model returned"):
        reweighter.loss(twin(world.batch[0]), world.batch[1])


# Other forms of the model


def wrapped(**options):
    world = world_of(net(nn.Dropout(0.3)))
    reweighter = reweighter_of(world, **options)
    plain_loop(world, reweighter.loss)
    return world, reweighter


def still_right(world, reweighter):
    world.model.train()
    return deviation(world, reweighter=reweighter) < CLOSE


def test_trace():
    world, reweighter = wrapped()
    world.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(world.model, world.batch[0])
    assert torch.equal(traced(world.batch[0]), world.model(world.batch[0]))
    assert still_right(world, reweighter)


def test_script():
    world, reweighter = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=r"reweighter\.close\(\)"):
            torch.jit.script(world.model)
        assert still_right(world, reweighter)
        reweighter.close()
        torch.jit.script(world.model)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    world, reweighter = wrapped()
    world.model.eval()
    exported = torch.export.export(world.model, (world.batch[0],), strict=strict).module()
    assert torch.equal(exported(world.batch[0]), world.model(world.batch[0]))
    assert still_right(world, reweighter)
    torch._dynamo.reset()


def test_onnx_and_tensorboard_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    world, reweighter = wrapped()
    world.model.eval()
    with warnings.catch_warnings(), tensorboard.SummaryWriter(tmp_path) as writer:
        warnings.simplefilter("ignore")
        writer.add_graph(world.model, world.batch[0])
    assert still_right(world, reweighter)


def test_functional_call_and_vmap_of_the_wrapped_model():
    """As people take Fisher information or per-sample gradients."""
    world, reweighter = wrapped()
    world.model.eval()
    parameters = {name: p.detach() for name, p in world.model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(world.model, parameters, (x[None],)), y[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *world.batch)
    assert found["0.weight"].shape == (6, 7, 5)
    assert still_right(world, reweighter)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_that_is_called_while_the_bare_one_is_wrapped(backend):
    torch._dynamo.reset()
    world = world_of(net())
    reweighter = reweighter_of(world)
    compiled = torch.compile(world.model, backend=backend)
    loss = reweighter.loss(compiled(world.batch[0]), world.batch[1])
    loss.backward()
    world.optimizers[0].step()
    reference = reweighter_of(other := world_of(net()))
    plain_loop(other, reference.loss)
    torch.testing.assert_close(reweighter.result.meta_gradient, reference.result.meta_gradient, rtol=1e-4, atol=1e-8)
    torch._dynamo.reset()


def test_a_compiled_model_that_was_called_before_the_bare_one_was_wrapped():
    """Its graphs know of no hooks."""
    torch._dynamo.reset()
    world = world_of(net())
    compiled = torch.compile(world.model, backend="eager")
    compiled(world.batch[0])
    reweighter = reweighter_of(world)
    with pytest.raises(RuntimeError, match="the compiled or DDP-wrapped one"):
        reweighter.loss(compiled(world.batch[0]), world.batch[1])
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's own compiler needs g++")
@pytest.mark.parametrize("called", ["before", "after"])
def test_a_model_that_is_compiled_by_default(called, request):
    """Its backward gives its buffers away, which the check cannot have: PyTorch is told so. The hooks make it compile
    anew, so that it may have been called before."""
    torch._dynamo.reset()
    before, torch._functorch.config.donated_buffer = torch._functorch.config.donated_buffer, True
    request.addfinalizer(lambda: setattr(torch._functorch.config, "donated_buffer", before))
    world, plain = (world_of(net(nn.GELU(), nn.Linear(7, 7), nn.GELU())) for _ in range(2))
    model = torch.compile(world.model)
    if called == "before":
        torch.nn.functional.cross_entropy(model(world.batch[0]), world.batch[1]).backward()
        world.optimizers[0].zero_grad()
    reweighter = MetaReweighter(
        model, world.optimizers, weighting=Given(), validation=[world.validation], every=1, warmup_steps=0
    )
    reference = reweighter_of(plain)
    for _ in range(2):
        reweighter.step(world.batch)
        reference.step(plain.batch)
    found, expected = reweighter.result.meta_gradient, reference.result.meta_gradient
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    torch._dynamo.reset()


def test_a_backward_that_runs_once_is_refused_with_the_remedy():
    """As PyTorch's compiler says it."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer = False before"):
        gradients_apart([nn.Linear(1, 1)], Once.apply(x).sum(), [x])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["function", "method"])
def test_a_compiled_model(backend, how):
    torch._dynamo.reset()
    world, plain = (world_of(net(nn.BatchNorm1d(7))) for _ in range(2))
    if how == "function":
        model = torch.compile(world.model, backend=backend)
    else:
        model = world.model
        model.compile(backend=backend)
    reweighter = MetaReweighter(
        model, world.optimizers, weighting=Given(), validation=[world.validation], every=1, warmup_steps=0
    )
    reference = reweighter_of(plain)
    for _ in range(2):
        reweighter.step(world.batch)
        reference.step(plain.batch)
    found, expected = reweighter.result.meta_gradient, reference.result.meta_gradient
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert reweighter.engine == "finite"
    torch._dynamo.reset()


# What can never work


def test_traced_and_scripted_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net(), data(1)[0])
        part = nn.Sequential(torch.jit.script(net()))
    for model in (traced, part):
        with pytest.raises(TypeError, match="traced or scripted"):
            MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_embeddings_are_refused():
    model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"model\.0 has sparse gradients"):
        MetaReweighter(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_of_a_function_are_refused_at_the_first_step():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(F.embedding(tokens, self.table, sparse=True).mean(1))

    model = Sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randint(10, (6, 4)), torch.randint(3, (6,))
    world = World(model, [optimizer], batch, batch)
    reweighter = reweighter_of(world, warmup_steps=100, validation=ValidationBuffer())
    with pytest.raises(TypeError, match="sparse=False"):
        plain_loop(world, reweighter.loss)
    with pytest.raises(TypeError, match="sparse=False"):
        reweighter.check(batch)

"""Accelerate: prepared or bare objects, either way the plain loop, bit for bit."""

import copy

import pytest
import torch
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter, ValidationBuffer, with_indices

accelerate = pytest.importorskip("accelerate", reason="the extra 'accelerate' is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def loader():
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(96, 1, 6, generator=generator), torch.randint(3, (96,), generator=generator)
    )
    return torch.utils.data.DataLoader(with_indices(data), batch_size=16)


@pytest.fixture(autouse=True)
def one_accelerator():
    """Accelerate's state is one for the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def reweighting(model, optimizer):
    validation = ValidationBuffer(fraction=0.2, hold_out=True)
    return MetaReweighter(model, optimizer, validation=validation, warmup_steps=3, every=2)


def plain(accumulate=1, precision="no"):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = reweighting(model, optimizer)
    for _ in range(3):
        for number, (inputs, targets, indices) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = reweighter.loss(model(inputs), targets, indices)
            (loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return model, reweighter


def prepared(before, accumulate=1, precision="no"):
    """With the reweighter made before ``prepare`` or after it."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = reweighting(model, optimizer) if before else None
    network_, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    reweighter = reweighter or reweighting(network_, optimizer)
    for _ in range(3):
        for inputs, targets, indices in batches:
            with accelerator.accumulate(network_):
                loss = reweighter.loss(network_(inputs), targets, indices)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network_.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return model, reweighter


@pytest.mark.parametrize("setting", [{}, {"accumulate": 2}, {"precision": "bf16"}])
def test_a_prepared_loop_is_the_plain_one(setting):
    model, reweighter = plain(**setting)
    assert not torch.equal(network()[0].weight, model[0].weight)
    for before in (True, False):
        found, other = prepared(before, **setting)
        assert_same(found.state_dict(), model.state_dict())
        assert_same(other.state_dict(), reweighter.state_dict())
        assert other.steps == 18 // setting.get("accumulate", 1)
        assert other.meta_updates > 0
        assert other.engine == reweighter.engine == "finite"


def test_step_takes_prepared_objects():
    """``step(batch)`` with the wrappers is ``step(batch)`` without them, and a loop of one's own."""
    found = []
    for wrap, own_loop in ((False, False), (True, False), (True, True)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = loader()
        if wrap:
            model, optimizer, batches = accelerate.Accelerator(cpu=True).prepare(model, optimizer, batches)
        reweighter = reweighting(model, optimizer)
        for inputs, targets, indices in batches:
            if own_loop:
                optimizer.zero_grad()
                reweighter.loss(model(inputs), targets, indices).backward()
                optimizer.step()
            else:
                reweighter.step((inputs, targets, indices))
        found.append((model.state_dict(), reweighter.state_dict()))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("own_loop", [False, True])
def test_the_scaler_of_a_prepared_optimizer(own_loop):
    """It scales by a power of two, so that nothing changes; a step that it skips is none."""
    accelerate.Accelerator(cpu=True)
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
        reweighter = reweighting(model, optimizer)

        def step(inputs, targets, indices, model=model, optimizer=optimizer, reweighter=reweighter, scaler=scaler):
            if not own_loop:
                return reweighter.step((inputs, targets, indices))
            loss = reweighter.loss(model(inputs), targets, indices)
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
            optimizer.zero_grad()

        for batch in loader():
            step(*batch)
        found.append((copy.deepcopy(model.state_dict()), reweighter.state_dict()))
    assert reweighter.meta_updates == 2
    assert_same(found[0], found[1])

    scaler.update(float("inf"))  # the next gradients overflow
    step(*batch)
    assert optimizer.step_was_skipped
    assert_same([p.detach() for p in model.parameters()], [found[1][0][name] for name, _ in model.named_parameters()])
    assert_same(reweighter.state_dict(), found[1][1])


def test_checkpoints_of_the_accelerator(tmp_path):
    found = []
    for resumed in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        model, batches = accelerator.prepare(network(), loader())
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        reweighter = reweighting(model, optimizer)
        accelerator.register_for_checkpointing(reweighter)
        if resumed:
            accelerator.load_state(tmp_path / "state")
        for number, batch in enumerate(batches):
            if number == 3 and not resumed:
                accelerator.save_state(tmp_path / "state")
            if number >= 3 or not resumed:
                reweighter.step(batch)
        found.append((model.state_dict(), reweighter.state_dict()))
    assert_same(found[0], found[1])

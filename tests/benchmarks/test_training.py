"""Single runs, and the reweighters that methods describe."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import models
from benchmarks.catalogue import STUDIES
from benchmarks.methods import DEFAULT, PLAIN, RANDOM, TRUSTED, Method, Shuffled, reweighter, shuffled
from benchmarks.problems import Judged, Setting
from benchmarks.training import TrustedBatches, augmented, plain_epochs, train
from torch_molere import LearnedSplitter, MarginSplitter, RandomWeighting, SignalWeighting

TINY = Setting("tiny", data="digits", epochs=3, batch_size=16)
NOW = {"warmup_steps": 0, "every": 1}


def made(method, problem, setting=TINY):
    torch.manual_seed(0)
    model = models.build("mlp", (5,), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return reweighter(method, problem, TrustedBatches(problem, setting, 0), model, optimizer, 40, 0)


def test_plain_training_is_the_textbook_loop(problem):
    run = train(TINY, PLAIN, problem, 3)
    torch.manual_seed(3)
    model = models.build("mlp", (5,), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        if step % 4 == 0:
            batches = torch.randperm(60, generator=generator).tensor_split(4)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 12)) / 2
        optimizer.zero_grad()
        F.cross_entropy(model(problem.inputs[batches[step % 4]]), problem.labels[batches[step % 4]]).backward()
        optimizer.step()
    torch.testing.assert_close(run.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-7)
    assert run.steps == 12 and run.numbers == {"weight_sd": 0.0} and run.reweighter is None


def test_the_best_epoch_is_by_the_selection_rows_alone(problem):
    """Of a selection set whose labels are turned round the first epoch is best, of the true one a later one."""
    setting = replace(TINY, epochs=8, lr=0.02)
    turned = replace(problem, selection=Judged(problem.selection.inputs, (problem.selection.labels + 1) % 3))
    late, early = train(setting, PLAIN, problem, 0), train(setting, PLAIN, turned, 0)
    assert early.best_epoch < late.best_epoch
    assert not train(setting, PLAIN, problem, 0, judge=False).best
    for run, rows in ((late, problem.selection), (early, turned.selection)):
        run.model.load_state_dict(run.best)
        best = (run.model(rows.inputs).argmax(dim=1) == rows.labels).double().mean()
        others = plain_epochs(setting, problem, torch.arange(60), 0)
        assert best >= max((m(rows.inputs).argmax(dim=1) == rows.labels).double().mean() for m in others) - 1e-9


@pytest.mark.parametrize("method", [PLAIN, DEFAULT.but("now", **NOW), TRUSTED.but("now", **NOW), RANDOM])
def test_a_run_repeats_exactly(problem, method):
    first, again, other = (train(TINY, method, problem, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first.model.state_dict(), again.model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.model[1].weight, other.model[1].weight)


def test_weights_that_stay_equal_are_plain_training(problem):
    """Same initialisation and order of data for every method, whatever its own randomness."""
    warming, plain = (train(TINY, method, problem, 0) for method in (DEFAULT.but("", warmup_steps=100), PLAIN))
    torch.testing.assert_close(warming.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert warming.numbers["weight_sd"] < 1e-6


def test_mean_losses_of_plain_training(problem):
    run = train(replace(TINY, lr=0.0, weight_decay=0.0), PLAIN, problem, 0)
    expected = F.cross_entropy(run.model(problem.inputs), problem.labels, reduction="none")
    torch.testing.assert_close(run.losses, expected.detach(), rtol=1e-4, atol=1e-5)


def test_augmented_images_are_shifted_and_flipped_copies():
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    assert augmented(images, "", generator) is images
    for kind in ("crops", "crops and flips"):
        flipped = 0
        for image, original in zip(augmented(images, kind, generator), images, strict=True):
            padded = F.pad(original, (1, 1, 1, 1))
            shifts = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
            straight = any(torch.equal(image, shift) for shift in shifts)
            mirrored = any(torch.equal(image, shift.flip(2)) for shift in shifts)
            assert straight or mirrored
            flipped += mirrored
        assert (flipped == 0) if kind == "crops" else (60 < flipped < 140)


def test_trusted_batches_are_of_the_trusted_rows_each_once_a_pass(problem):
    batches = TrustedBatches(problem, TINY, 0)
    assert len(batches) == 2
    for _ in range(2):
        seen = torch.cat([inputs for inputs, _ in batches])
        assert sorted(seen[:, 0].tolist()) == sorted(problem.inputs[problem.trusted, 0].tolist())
    sizes = [len(labels) for _, labels in TrustedBatches(problem, replace(TINY, batch_of_trusted=12), 0)]
    assert sizes == [12]


def test_methods_become_reweighters(problem):
    assert isinstance(made(DEFAULT, problem).validation.splitter, MarginSplitter)
    assert made(TRUSTED, problem).validation.trusted
    hard = made(Method("", arguments={"splitter": "hard", "hold_out": True, "trim": 0.1, "fraction": 0.2}), problem)
    splitter = hard.validation.splitter
    assert (splitter.sharpness, splitter.trim, splitter.fraction, hard.validation.holds_out) == (
        math.inf,
        0.1,
        0.2,
        True,
    )
    learned = made(Method("", arguments={"splitter": "learned", "shrinkage": None}), problem)
    assert isinstance(learned.validation.splitter, LearnedSplitter) and learned.shrinkage.strength is None
    assert made(Method("", arguments={"warmup": 0.25}), problem).warmup_steps == 10
    assert isinstance(made(RANDOM, problem).weighting, RandomWeighting)
    paper = made(Method("", arguments={"as_in_paper": True}), problem)
    assert paper.order == "before" and paper.max_weight is None and paper.warmup_steps == 10
    with pytest.raises(TypeError, match="unknown_argument"):
        made(Method("", arguments={"unknown_argument": 1}), problem)


def test_a_method_with_trusted_validation_needs_trusted_rows(problem):
    nobody = replace(problem, trusted=torch.arange(0))
    with pytest.raises(ValueError, match="needs a setting with trusted rows"):
        train(TINY, TRUSTED, nobody, 0)


def test_shuffled_weights_are_the_learned_ones_elsewhere_and_learn_from_their_own():
    class Given(torch.nn.Module):
        meta_decay = 0.4

        def __init__(self):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.arange(50.0))

        def forward(self, samples):
            return self.scores

    weighting = Shuffled(Given())
    assert weighting.meta_decay == 0.4
    weights = weighting(None)
    assert not torch.equal(weights, torch.arange(50.0)) and torch.equal(weights.sort().values, torch.arange(50.0))
    gradient = torch.arange(50.0) ** 2
    weights.backward(gradient)
    assert torch.equal(weighting.weighting.scores.grad, gradient)


def test_the_shuffled_control_wraps_what_it_controls(problem):
    control = made(shuffled(TRUSTED), problem)
    assert isinstance(control.weighting, Shuffled) and isinstance(control.weighting.weighting, SignalWeighting)
    assert control.validation.trusted


def test_every_method_of_every_study_trains(problem):
    """Two steps of each, images where they are needed."""
    methods = {method.name: method for study in STUDIES.values() for method in study.methods}
    setting = replace(TINY, epochs=1, batch_size=30)
    for method in methods.values():
        if method.kind in ("reweighted", "plain"):
            training = {name: value for name, value in method.training.items() if name != "epochs"}
            run = train(setting, replace(method, training=training), problem, 0, judge=False)
            assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters()), method.name

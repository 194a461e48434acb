"""The studies on a tiny data set: whole, stopped and resumed; and what they measure, against other libraries."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from sklearn.metrics import accuracy_score, brier_score_loss
from test_datasets import colours, write_parquet
from typer.testing import CliRunner

from benchmarks.datasets import DataOptions
from benchmarks.features import PatchOptions
from benchmarks.study import __main__ as command_line
from benchmarks.study import claims, gap, overhead, people, rendering, studies
from benchmarks.study.measures import Reference, measure
from benchmarks.study.methods import ERM, LRW, MOLERE, Method, TrimmedSplitter, reweighter
from benchmarks.study.problems import SHIFTS, Corpus, Setting, shifted
from benchmarks.study.store import Stored, described
from benchmarks.study.training import Laboratory, train
from torch_molere import MetaReweighter, Samples

CLASSES = 3
TINY = Setting("tiny", rows=60, hidden=8, epochs=3, batch_size=16)
OTHER = replace(TINY, name="wrong labels", labels="label_worst", trusted=9, trusted_by_class=True)
SHIFTED = Setting("shift", rows=40, hidden=8, epochs=6, trusted=18, trusted_shifts=("noise", "blur"))
METHODS = (ERM, LRW["Hard"], LRW["Hard"].control, MOLERE, Method("LRW, trusted", "fixed", "trusted", False))
STUDY = studies.Study("tiny", "Does it run?", (TINY, OTHER), METHODS, seeds=3, margins=True)


def images(count, seed):
    """Images whose class is the colour that is brightest, and their labels."""
    labels = np.arange(count) % CLASSES
    pixels = colours(count, 8, seed) // 2
    pixels[np.arange(count), :, :, labels] += 100
    return pixels, labels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pixels, labels = images(120, 0)
    wrong = np.where(np.arange(120) % 4 == 0, (labels + 1) % CLASSES, labels)
    write_parquet(folder / "train.parquet", pixels, labels, label_worst=pa.array(wrong, pa.int8()))
    write_parquet(folder / "test.parquet", *images(50, 1))
    return folder


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    patches = PatchOptions(patches=6, size=3, samples=500, iterations=2)
    return Corpus(DataOptions(f"parquet:{data}"), tmp_path_factory.mktemp("cache"), patches, selection=30)


@pytest.fixture
def laboratory(corpus):
    return Laboratory(corpus, on_test=True, reference=replace(TINY, name="reference"))


def test_problems_keep_their_rows_apart_and_know_the_truth(corpus):
    assert not set(corpus.pool) & set(corpus.selection_rows)
    assert len(corpus.pool) == 90
    problem = corpus.problem(OTHER, 0, on_test=True)
    assert set(problem.source) <= set(corpus.pool) and len(set(problem.source)) == 60
    torch.testing.assert_close(problem.inputs, corpus.inputs[problem.source], rtol=0, atol=0)
    assert problem.clean.tolist() == (problem.source % CLASSES).tolist()
    assert np.bincount(problem.clean[problem.trusted]).tolist() == [3, 3, 3]
    assert torch.equal(problem.labels[problem.trusted], problem.clean[problem.trusted])
    others = np.setdiff1d(np.arange(60), problem.trusted)
    wrong = problem.source[others] % 4 == 0
    assert ((problem.labels != problem.clean).numpy()[others] == wrong).all()
    assert set(corpus.problem(OTHER, 1, on_test=True).source) != set(problem.source)
    assert len(problem.evaluations["clean"][1]) == 50
    assert len(corpus.problem(OTHER, 0, on_test=False).evaluations["clean"][1]) == 30
    tail = corpus.problem(Setting("tail", rows=None, imbalance=10.0), 0, on_test=True)
    counts = np.bincount(tail.labels)
    assert counts[0] >= 25 and counts[2] <= 4
    noisy = corpus.problem(Setting("noisy", rows=50, labels="symmetric:0.4"), 0, on_test=True)
    assert (noisy.labels != noisy.clean).sum() == 20
    with pytest.raises(typer.BadParameter, match="label_column_that_is_not_there"):
        corpus.problem(Setting("none", rows=5, labels="label_column_that_is_not_there"), 0, on_test=True)


def test_shifted_images_are_used_where_the_setting_says(corpus):
    problem = corpus.problem(SHIFTED, 0, on_test=True)
    assert list(problem.evaluations) == ["clean", *(f"{kind}_{strength}" for kind in SHIFTS for strength in (1, 2, 3))]
    changed = (problem.inputs != corpus.inputs[problem.source]).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == problem.trusted.tolist()
    pixels = corpus.pixels[problem.source]
    kinds = [("noise", 1), ("noise", 2), ("noise", 3), ("blur", 1), ("blur", 2), ("blur", 3)]
    for (kind, strength), rows in zip(kinds, np.array_split(problem.trusted, 6), strict=True):
        expected = corpus.features.features(shifted(pixels[rows], kind, strength, seed=1))
        torch.testing.assert_close(problem.inputs[rows], expected, rtol=0, atol=0)
    inputs, targets = problem.evaluations["blur_3"]
    assert torch.equal(inputs, corpus.features.features(shifted(corpus.test_pixels, "blur", 3)))
    assert torch.equal(targets, corpus.test[1])


@pytest.mark.parametrize("kind", SHIFTS)
def test_a_stronger_shift_is_farther_from_the_image(corpus, kind):
    pixels = corpus.test_pixels
    strengths = [shifted(pixels, kind, strength + 1) for strength in range(len(SHIFTS[kind]))]
    distances = [(image.float() - pixels).square().mean(dim=(1, 2, 3)) for image in strengths]
    assert all(image.shape == pixels.shape and image.dtype == torch.uint8 for image in strengths)
    assert len(distances) == 3 and (distances[0] > 0).all()
    assert all((weaker < stronger).all() for weaker, stronger in pairwise(distances))
    assert torch.equal(shifted(pixels, kind, 2), strengths[1])


def test_seen_and_unseen_are_the_means_over_what_validation_holds_and_does_not(laboratory):
    row = laboratory.run(SHIFTED, MOLERE, 0)
    accuracy = {kind: [row[f"accuracy_{kind}_{strength}"] for strength in (1, 2, 3)] for kind in SHIFTS}
    assert len({value for values in accuracy.values() for value in values}) > 3
    assert row["accuracy_seen"] == pytest.approx(np.mean(accuracy["noise"] + accuracy["blur"]))
    assert row["accuracy_unseen"] == pytest.approx(np.mean(accuracy["contrast"] + accuracy["pixelate"]))
    other = laboratory.run(replace(SHIFTED, trusted_shifts=("contrast",)), ERM, 0)
    assert other["accuracy_seen"] == pytest.approx(np.mean([other[f"accuracy_contrast_{s}"] for s in (1, 2, 3)]))
    assert "accuracy_seen" not in laboratory.run(TINY, ERM, 0)


@pytest.mark.parametrize("name", ["conv", "resnet20", "vit"])
def test_other_models_train_on_the_images_themselves(corpus, laboratory, name):
    setting = replace(TINY, name=name, model=name, lr=0.05)
    problem = corpus.problem(setting, 0, on_test=True)
    pixels = corpus.pixels[problem.source].double()
    channels = corpus.pixels.double().transpose(0, 1).flatten(1)
    mean, std = channels.mean(dim=1), channels.std(dim=1)
    expected = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(problem.inputs.double(), expected, rtol=1e-3, atol=1e-3)
    half = corpus.problem(replace(setting, side=4), 0, on_test=True)
    torch.testing.assert_close(half.inputs, F.avg_pool2d(problem.inputs, 2))
    assert half.evaluations["clean"][0].shape == (50, 3, 4, 4)
    plain, weighed = (laboratory.run(setting, method, 0) for method in (ERM, MOLERE))
    assert plain["accuracy"] != weighed["accuracy"] or plain["nll"] != weighed["nll"]
    # How hard a test instance is does not depend on who is judged.
    on_features = laboratory.run(TINY, ERM, 0)
    assert all(plain[f"count_bucket_{b}"] == on_features[f"count_bucket_{b}"] for b in range(10))


def test_shifted_images_reach_a_model_on_images(corpus):
    setting = replace(SHIFTED, model="conv")
    problem, plain = (corpus.problem(s, 0, on_test=True) for s in (setting, replace(setting, trusted_shifts=())))
    changed = (problem.inputs != plain.inputs).flatten(1).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == problem.trusted.tolist()
    inputs = problem.evaluations["contrast_3"][0]
    assert inputs.shape == (50, 3, 8, 8) and inputs.std() < 0.5 * plain.evaluations["clean"][0].std()


def test_measures_agree_with_other_libraries():
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(300, 4, generator=generator), torch.randint(4, (300,), generator=generator)
    reference = Reference(torch.linspace(-1, 1, 300), torch.linspace(3, 0, 300))
    found = measure(outputs, targets, reference)
    probabilities, predictions = outputs.double().softmax(1).numpy(), outputs.argmax(1)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, predictions))
    assert found["brier"] == pytest.approx(brier_score_loss(targets, probabilities, scale_by_half=False), rel=1e-5)
    assert found["nll"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-5)
    sure, bins = probabilities.max(1), (probabilities.max(1) * 15).astype(int)
    right = (predictions == targets).numpy()
    gaps = [(bins == b).mean() * abs(right[bins == b].mean() - sure[bins == b].mean()) for b in set(bins)]
    assert found["ece"] == pytest.approx(sum(gaps), rel=1e-4)
    by_class = [right[targets == c].mean() for c in range(4)]
    assert found["worst_class"] == pytest.approx(min(by_class))
    assert found["balanced_accuracy"] == pytest.approx(np.mean(by_class))
    assert found["hard_third_by_margin"] == found["hard_third_by_loss"] == pytest.approx(right[:100].mean())
    assert found["easy_third_by_margin"] == pytest.approx(right[200:].mean())
    assert sum(found[f"count_bucket_{b}"] for b in range(10)) == 300
    assert np.nanmean([found[f"margin_bucket_{b}"] for b in range(10)]) == pytest.approx(found["margin"], abs=0.05)


def test_molere_is_studied_at_the_librarys_defaults(corpus):
    problem = corpus.problem(TINY, 0, on_test=True)
    model = torch.nn.Linear(problem.inputs.shape[1], CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    studied = reweighter(MOLERE, problem, np.empty(0, dtype=int), model, optimizer, CLASSES, 16, 500, seed=0)
    default = MetaReweighter(model, optimizer)
    for name in ("every", "order", "engine"):
        assert getattr(studied, name) == getattr(default, name)
    assert studied.holdout.hold_out == default.holdout.hold_out
    assert studied.weighting.floor == default.weighting.floor > 0
    assert studied.weighting_optimizer.defaults == default.weighting_optimizer.defaults
    plain = reweighter(LRW["Random"], problem, np.arange(6), model, optimizer, CLASSES, 16, 500, seed=0)
    assert plain.weighting.floor == 0


def test_every_method_trains_on_the_rows_it_says(laboratory):
    rows = {method.name: laboratory.run(TINY, method, 0)["train_rows"] for method in METHODS[:4]}
    assert rows == {"ERM": 60, "LRW-Hard": 54, "ERM on LRW-Hard's rows": 54, "MOLERE": 60}


def test_a_method_without_effect_is_plain_training(laboratory):
    """φ at a vanishing rate on the same rows ends where plain training does: same initialisation, order, schedule."""
    idle = Method("idle", "fixed", "random", arguments={"weighting_lr": 1e-30})
    weighed, plain = (laboratory.run(TINY, method, 0) for method in (idle, idle.control))
    for name in ("accuracy", "margin", "train_loss"):
        assert weighed[name] == pytest.approx(plain[name], abs=1e-5)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """All runs, of which the process was stopped after every fourth."""
    stored = Stored(tmp_path_factory.mktemp("results") / "study-tiny")
    config = {
        "data": {"judged_on": "test set", "judged_rows": 50},
        **described(STUDY.settings, STUDY.methods),
        "machine": {"cores": 2, "processor": "of some kind"},
        "command": "python -m benchmarks.study tiny",
    }
    stops = 0
    while len(stored.finished()) < 27:
        stored.start(config)
        laboratory = Laboratory(corpus, on_test=True, reference=replace(TINY, name="reference"))
        run, left = laboratory.run, iter(range(4))

        def stopping(*arguments, run=run, left=left):
            next(left)
            return run(*arguments)

        laboratory.run = stopping
        try:
            command_line.run_missing(STUDY, laboratory, stored, STUDY.seeds)
        except StopIteration:
            stops += 1
    assert stops == 6
    return stored


def test_a_resumed_study_equals_an_uninterrupted_one(finished, laboratory):
    frame = finished.frame().set_index(["setting", "method", "seed"])
    assert len(frame) == 27 and frame.index.is_unique
    for setting, method, seed in [(TINY, LRW["Hard"], 1), (OTHER, METHODS[4], 2)]:
        numbers = laboratory.run(setting, method, seed)
        for name in ("accuracy", "margin", "train_loss", "ece"):
            assert frame.loc[(setting.name, method.name, seed), name] == pytest.approx(numbers[name], rel=1e-5)


def test_a_folder_refuses_another_configuration_but_may_grow(finished):
    config = json.loads(finished.config.read_text())
    grown = described([TINY, OTHER, replace(TINY, name="new")], METHODS)
    finished.start(config | grown)
    assert "new" in json.loads(finished.config.read_text())["settings"]
    with pytest.raises(typer.BadParameter, match="settings 'tiny'"):
        finished.start(config | described([replace(TINY, epochs=4)], METHODS))


def test_runs_from_before_an_attribute_of_settings_had_its_default(tmp_path):
    stored = Stored(tmp_path)
    config = {"data": {}, **described([TINY], [ERM])}
    older = json.loads(json.dumps(config))
    del older["settings"]["tiny"]["model"]
    stored.config.write_text(json.dumps(older))
    with pytest.raises(typer.BadParameter, match="settings 'tiny'"):
        stored.start(config | described([replace(TINY, model="conv")], [ERM]))
    stored.start(config)
    assert json.loads(stored.config.read_text())["settings"]["tiny"]["model"] == "mlp"


def test_the_page_follows_from_the_runs(finished, monkeypatch):
    monkeypatch.setattr(rendering, "STUDIES", {"tiny": STUDY})
    rendering.render(finished.folder.parent)
    page = (finished.folder.parent / "README.md").read_text()
    frame = finished.frame()
    own = frame[frame["setting"] == "tiny"].pivot(index="seed", columns="method", values="accuracy")
    change = 100 * (own["MOLERE"] - own["ERM"])
    half = scipy.stats.t.ppf(0.975, 2) * change.std(ddof=1) / 3**0.5
    assert f"| MOLERE | {change.mean():+.2f} ± {half:.2f} |" in page.replace("**", "")
    for name in ("differences.png", "margins.png"):
        assert f"study-tiny/{name}" in page
        with Image.open(finished.folder / name) as image:
            assert image.width > 600


def test_the_command_line(data, tmp_path, monkeypatch):
    small = replace(STUDY, settings=(TINY,), methods=(ERM, MOLERE), seeds=1, margins=False)
    monkeypatch.setattr(command_line, "STUDIES", {"tiny": small})
    monkeypatch.setattr(command_line, "Laboratory", lambda corpus, on_test: Laboratory(corpus, on_test, TINY))
    monkeypatch.setattr(command_line, "Corpus", lambda *arguments: Corpus(*arguments, selection=30))
    threads = torch.get_num_threads()
    options = ["--data", f"parquet:{data}", "--results", tmp_path / "results", "--cache", tmp_path, "--patches", 4]
    arguments = [str(argument) for argument in ["tiny", *options]]
    first, again = (CliRunner().invoke(command_line.app, arguments) for _ in range(2))
    torch.set_num_threads(threads)
    assert first.exit_code == 0 and again.exit_code == 0, first.output + again.output
    assert "tiny, MOLERE, seed 0: accuracy" in first.output and not again.output
    assert len(pd.read_csv(tmp_path / "results" / "study-tiny" / "results.csv")) == 2
    config = (tmp_path / "results" / "study-tiny" / "config.json").read_text()
    assert str(data.parent) not in config and '"pool_rows": 90' in config
    assert CliRunner().invoke(command_line.app, ["unknown"]).exit_code == 2


def test_agreement_with_people(tmp_path, corpus, monkeypatch):
    """A score that counts the annotators who were wrong agrees with them; MOLERE's are there, and stored once."""
    rows = corpus.labels["label"]
    for number, name in enumerate(people.ANNOTATORS):
        missed = np.arange(len(rows)) % 3 < number
        monkeypatch.setitem(corpus.labels, name, np.where(missed, (rows + 1) % CLASSES, rows))
    wrong = np.where(np.arange(len(rows)) % 4 == 0, (rows + 1) % CLASSES, rows)
    monkeypatch.setitem(corpus.labels, "label_aggregate", wrong)
    chosen = replace(people.STUDY, settings=(TINY,))
    monkeypatch.setattr(people, "STUDY", chosen)

    def scores(corpus, setting, method, problem, seed):
        missed = sum(corpus.labels[name][problem.source] != problem.clean.numpy() for name in people.ANNOTATORS)
        truth = (problem.labels != problem.clean).numpy().astype(float)
        return {"people": missed.astype(float), "truth": truth, **real(corpus, setting, method, problem, seed)}

    real = people._scores
    monkeypatch.setattr(people, "_scores", scores)
    stored = Stored(tmp_path / "study-human")
    stored.start(command_line._config(chosen, "tiny", PatchOptions(), corpus))
    for _ in range(2):
        command_line.add_missing(chosen, people.rows, corpus, stored, 3)
    frame = stored.frame()
    clean, noisy = (frame[frame.setting == name] for name in ("clean labels", "label_aggregate"))
    assert (clean[clean.method == "people"].spearman > 0.999).all()
    assert (noisy[noisy.method == "truth"].auroc == 1.0).all()
    assert (noisy[noisy.method == "truth"].average_precision == 1.0).all()
    assert noisy.wrong.between(0.1, 0.4).all()
    assert set(clean.groupby("method").size()) == {3}
    assert {"MOLERE: mean weight", "MOLERE: time spent in validation", "ERM: final loss"} < set(clean.method)
    page = rendering.human_section(tmp_path / "study-human")
    assert "| truth | " in page and "| 1.000 ± 0.000 | 1.000 ± 0.000 |" in page
    assert rendering.human_section(tmp_path / "nothing") == ""


def test_validation_rows_are_others_of_the_same_kind(corpus):
    setting = replace(TINY, rows=50, labels="label_worst", validated=20)
    problem, without = (corpus.problem(s, 0, on_test=True) for s in (setting, replace(setting, validated=0)))
    assert problem.source.tolist() == without.source.tolist()
    inputs, labels = problem.validation
    found = (corpus.inputs[:, None] == inputs).all(dim=2).int().argmax(dim=0).numpy()  # the rows in the training file
    assert len(set(found)) == 20 and set(found) <= set(corpus.pool) and not set(found) & set(problem.source)
    assert labels.tolist() == corpus.labels["label_worst"][found].tolist()
    assert without.validation is None


def test_the_curve_is_of_the_model_after_each_epoch(corpus, laboratory):
    setting = replace(TINY, validated=20, epochs=4)
    row = laboratory.run(setting, ERM, 0)
    problem, seen = corpus.problem(setting, 0, on_test=True), []

    def after_epoch(model):
        (inputs, labels), (test, targets) = problem.validation, problem.evaluations["clean"]
        losses = [F.cross_entropy(model(x), y).item() for x, y in ((inputs, labels), (problem.inputs, problem.labels))]
        seen.append((losses[0] - losses[1], losses[0], (model(test).argmax(1) == targets).double().mean().item()))

    plain = train(setting, ERM, problem, CLASSES, 0, after_epoch=after_epoch)
    gaps, losses, accuracies = zip(*seen, strict=True)
    assert len(seen) == 4 and len(set(gaps)) == 4
    assert [row[f"gap_{epoch}"] for epoch in range(1, 5)] == pytest.approx(gaps, abs=1e-6)
    assert [row[f"accuracy_{epoch}"] for epoch in range(1, 5)] == pytest.approx(accuracies)
    assert row["gap"] == row["gap_4"] and row["accuracy"] == row["accuracy_4"]
    assert row["epoch_least"] == 1 + np.argmin(losses)
    assert row["accuracy_stable"] == row[f"accuracy_{row['epoch_stable']:.0f}"]
    unwatched = train(setting, ERM, problem, CLASSES, 0)
    torch.testing.assert_close(plain.model.state_dict(), unwatched.model.state_dict(), rtol=0, atol=0)


def test_the_first_stable_gap_by_hand():
    assert gap.first_stable([0.0, 0.5, 0.8, 0.85, 0.86]) == 3
    assert gap.first_stable([0.5, 1.0, 2.0]) == 2
    assert gap.first_stable([-0.1, -0.1, 1.0]) == 1
    assert gap.first_stable([0.3]) == 0


def test_trimmed_instances_stay_in_training():
    splitter = TrimmedSplitter(0)
    outputs, targets = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    losses = F.cross_entropy(outputs, targets, reduction="none")
    samples = Samples(((outputs,), {}), targets, outputs, losses, outputs.argmax(1) == targets)
    found, learned = splitter(samples), splitter.learned(samples)
    lowest = samples.margins.argsort()[:2]
    others = np.setdiff1d(np.arange(20), lowest)
    assert found[lowest].tolist() == [1.0, 1.0] and (learned[lowest] < 1.0).all()
    assert torch.equal(found[others], learned[others])


def test_claims_are_judged_by_paired_differences(tmp_path, monkeypatch):
    frame = pd.DataFrame(
        [
            (setting, method, seed, 0.5 + 0.01 * seed + change + jitter * (-1) ** seed)
            for setting, change, jitter in (("up", 0.02, 0.001), ("down", -0.03, 0.001), ("unclear", 0.001, 0.02))
            for seed in range(4)
            for method, change, jitter in (("ERM", 0.0, 0.0), ("MOLERE", change, jitter))
        ],
        columns=["setting", "method", "seed", "accuracy"],
    )
    chosen = studies.Study("noise", "?", tuple(replace(TINY, name=name) for name in set(frame.setting)), (ERM, MOLERE))
    monkeypatch.setattr(claims, "STUDIES", {name: chosen for name in studies.STUDIES})
    monkeypatch.setattr(claims, "CLAIMS", (claims.Claim("it helps", "MOLERE", "ERM", "accuracy", ("noise",)),))
    assert claims.section(tmp_path) == ""
    Stored(tmp_path / "study-noise").folder.mkdir()
    Stored(tmp_path / "study-noise").add(frame.to_dict("records"))
    half = 100 * scipy.stats.t.ppf(0.975, 3) * np.std([0.001, -0.001] * 2, ddof=1) / 2
    up, down = (f"noise: {name} ({change} ± {half:.1f})" for name, change in (("up", "+2.0"), ("down", "-3.0")))
    assert f"| it helps | {up} | {down} | 1 of 3 |" in claims.section(tmp_path)


def test_every_claim_is_about_methods_and_measures_that_are_studied():
    for claim in claims.CLAIMS:
        for name in claim.studies:
            chosen = studies.STUDIES[name]
            assert {claim.method, claim.other} <= {method.name for method in chosen.methods}, (claim.text, name)
            assert claim.measure in rendering.NAMES


def test_overhead_is_of_processes_of_their_own(corpus, tmp_path, monkeypatch):
    heavy = Method("all rows many times", "rho", arguments={"share": 0.05})
    chosen = replace(overhead.STUDY, settings=(replace(TINY, hidden=2_000, epochs=2),), methods=(ERM, MOLERE, heavy))
    monkeypatch.setattr(overhead, "STUDY", chosen)
    stored = Stored(tmp_path / "study-overhead")
    stored.start(command_line._config(chosen, "tiny", PatchOptions(), corpus))
    command_line.add_missing(chosen, overhead.costs, corpus, stored, 1)
    frame = stored.frame().set_index("method")
    assert set(frame.index) == {method.name for method in chosen.methods}
    assert (frame.added >= 0).all() and frame.seconds[heavy.name] > frame.seconds["ERM"] > 0
    assert rendering.overhead_section(stored.folder) == ""  # too few seeds
    for seed in (1, 2):
        stored.add([{**row, "seed": seed} for row in stored.frame()[lambda f: f.seed == 0].to_dict("records")])
    ratio = frame.seconds["MOLERE"] / frame.seconds["ERM"]
    assert f"| MOLERE | {ratio:.2f} ± 0.00 |" in rendering.overhead_section(stored.folder)


def test_a_study_may_look_at_the_runs_of_another(finished, monkeypatch):
    view = replace(STUDY, name="calibration", shares="tiny", measures=("ece",), margins=False)
    monkeypatch.setattr(rendering, "STUDIES", {"tiny": STUDY, "calibration": view})
    rendering.render(finished.folder.parent)
    page = (finished.folder.parent / "README.md").read_text()
    assert "## `calibration`" in page and "(study-tiny/calibration.png)" in page
    assert (finished.folder / "calibration.png").exists()


def test_the_stored_page_is_what_the_stored_files_say(tmp_path):
    stored = Path(__file__).parents[2] / "benchmarks" / "results"
    for folder in stored.glob("study-*"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*.png"))
    rendering.render(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (stored / "README.md").read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("study-*/differences.png"))) == len(list(stored.glob("study-*/differences.png")))

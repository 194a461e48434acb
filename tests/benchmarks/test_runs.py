"""Jobs, studies and the command line, on digits."""

import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as main
from benchmarks import demo
from benchmarks.catalogue import STUDIES
from benchmarks.methods import DEFAULT, PLAIN, TRUSTED, Method
from benchmarks.problems import Setting
from benchmarks.runs import Job, Place, execute, run_all
from benchmarks.studies import Study, grid_of, tried

TINY = Setting("tiny", data="digits", epochs=2, batch_size=50, rows=200)
NEXT = replace(TINY, name="next", labels="next:0.4", trusted=50)
SMALL = Study("small", "?", (TINY, NEXT), (DEFAULT, TRUSTED, replace(DEFAULT, name="tuned", tuned=True)), seeds=2)


def test_the_main_job_needs_its_own_extra_alone():
    """What only other extras bring is not imported by ``python -m benchmarks``."""
    others = ["jinja2", "altair", "vl_convert", "playwright", "lightning", "accelerate", "hypothesis", "betty"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import benchmarks.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, tmp_path / "cache")


def without_time(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_jobs_give_the_same_rows_in_processes_as_here(place):
    jobs = [Job(TINY, PLAIN, seed) for seed in (0, 1)]
    here = {(job.method.name, job.seed): without_time(row) for job, row in run_all(jobs, place, 1)}
    there = {(job.method.name, job.seed): without_time(row) for job, row in run_all(jobs, place, 2)}
    pd.testing.assert_frame_equal(pd.DataFrame(here), pd.DataFrame(there)[list(here)])
    assert here["plain", 0]["accuracy"] > 0.3 and here["plain", 0] != here["plain", 1]


def test_a_method_may_train_otherwise(place):
    row = execute(Job(TINY, Method("slow", "plain", training={"lr": 0.001, "epochs": 1}), 0), place)
    assert row["lr"] == 0.001 and row["accuracy"] < execute(Job(TINY, PLAIN, 0), place)["accuracy"]


def test_thirds_are_of_a_reference_that_is_trained_once(place):
    first = execute(Job(TINY, PLAIN, 0, thirds=True), place)
    (kept,) = place.cache.glob("reference-*.npy")
    before = kept.stat().st_mtime_ns
    second = execute(Job(TINY, DEFAULT, 0, thirds=True), place)
    assert kept.stat().st_mtime_ns == before
    for row in (first, second):
        assert row["hard_third"] < row["middle_third"] < row["easy_third"]


def test_cleanlab_and_training_find_wrong_labels(place):
    setting = replace(NEXT, epochs=10, labels="random:0.3")
    plain = execute(Job(setting, PLAIN, 0, find=True), place)
    cleanlab = execute(Job(setting, Method("cleanlab", "cleanlab"), 0, find=True), place)
    assert plain["auroc: mean loss"] > 0.85 and cleanlab["auroc: self confidence"] > 0.8


def test_plain_training_is_tuned_first(place):
    first = list(SMALL.first(None))
    assert {job.method.name for job in first if job.setting is TINY} == {
        *(tried(*pair).name for pair in grid_of(TINY)),
        "plain",
        "default",
    }
    assert "default, trusted" in {job.method.name for job in first if job.setting is NEXT}
    assert [job.seed for job in first] == sorted(job.seed for job in first)
    rows = [(TINY.name, job.method.name, 0, job.method.training.get("weight_decay") == 1e-3) for job in first]
    frame = pd.DataFrame(rows, columns=["setting", "method", "seed", "selection"])
    second = list(SMALL.second(None, frame))
    assert [(job.setting.name, job.method.name, job.seed) for job in second] == [
        ("tiny", "tuned", 0),
        ("tiny", "tuned", 1),
    ]
    assert all(job.method.training["weight_decay"] == 1e-3 for job in second)


def test_studies_have_names_of_their_own_and_claims_of_what_they_run():
    for study in (*STUDIES.values(), demo.STUDY):
        assert len({setting.name for setting in study.settings}) == len(study.settings)
        assert len({method.name for method in study.methods}) == len(study.methods)
        for claim in study.claims:
            assert {claim.method, claim.other} <= set(study.rows)
            assert set(claim.settings) <= {setting.name for setting in study.settings}
    untuned = replace(SMALL, untuned=("tiny",), settings=(TINY,))
    assert {job.method.name for job in untuned.first(None)} == {"plain", "default"} and not untuned.tried
    for setting in SMALL.settings:
        assert SMALL.seeds_of(setting, None) == 2 and SMALL.seeds_of(setting, 7) == 7
    assert SMALL.seeds_of(replace(TINY, model="conv"), None) == 3


@pytest.fixture
def small(monkeypatch):
    settings = tuple(replace(setting, epochs=1) for setting in demo.STUDY.settings)
    monkeypatch.setattr(demo, "STUDY", replace(demo.STUDY, settings=settings))


def test_the_main_job_ends_with_the_path_of_its_picture_and_goes_on(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "console", Console(width=100))
    arguments = ["--jobs", "1", "--seeds", "1"]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("runs/main/main.png")
    for text in ("clean labels", "45 % wrong labels", "plain training", "… validation=trusted", "± 95 %"):
        assert text in result.output
    assert Image.open("runs/main/main.png").width > 1000
    frame = pd.read_csv("runs/main/results.csv")
    assert len(frame) == 3 * 4 + 1
    again = CliRunner().invoke(main.app, arguments)
    assert again.exit_code == 0 and len(pd.read_csv("runs/main/results.csv")) == len(frame)
    assert "seed 0" in result.output and "seed 0" not in again.output  # nothing was run
    assert "four situations" in demo.section(tmp_path / "runs" / "main")


def test_a_study_from_the_command_line(tmp_path, monkeypatch):
    store = main.go(SMALL, tmp_path / "small", Place(tmp_path, tmp_path / "cache"), 1, 1, "tiny")
    frame = store.frame()
    assert set(frame["setting"]) == {"tiny"} and "tuned" in set(frame["method"])
    best = frame[frame["method"].str.startswith("plain, rate")].set_index("method")["selection"].idxmax()
    tuned = frame[frame["method"] == "tuned"].iloc[0]
    chosen = frame[frame["method"] == best].iloc[0]
    assert (tuned["lr"], tuned["weight_decay"]) == (chosen["lr"], chosen["weight_decay"])
    assert torch.get_num_threads() == 1


def test_a_tuned_run_is_made_again_where_another_rate_has_become_best(tmp_path):
    method = replace(DEFAULT, name="tuned", tuned=True)
    store = main.Store(tmp_path)
    for seed in (0, 1):
        for name in ("default", "tuned"):
            store.add({"setting": "tiny", "method": name, "seed": seed, "lr": 0.05, "weight_decay": 1e-4})
    for lr, decay, expected in ((0.05, 1e-4, [2]), (0.2, 1e-4, [0, 1, 2]), (0.05, 1e-3, [0, 1, 2])):
        tuned = replace(method, training={"lr": lr, "weight_decay": decay})
        jobs = [Job(TINY, tuned, seed) for seed in (0, 1, 2)] + [Job(TINY, DEFAULT, 0)]
        assert [job.seed for job in main.missing_of(jobs, store)] == expected


def test_ctrl_c_keeps_what_has_finished(tmp_path, monkeypatch):
    def stopping(jobs, place, processes):
        yield jobs[0], {"setting": "tiny", "method": "plain", "seed": 0, "accuracy": 0.5, "seconds": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run_all", stopping)
    with pytest.raises(main.typer.Exit) as stopped:
        main.go(SMALL, tmp_path / "small", Place(tmp_path, tmp_path), 1, 1, "")
    assert stopped.value.exit_code == 130 and len(main.Store(tmp_path / "small").frame()) == 1

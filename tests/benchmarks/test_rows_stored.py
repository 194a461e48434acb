"""Runs on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from benchmarks.catalogue import STUDIES
from benchmarks.methods import DEFAULT, PLAIN
from benchmarks.problems import Setting
from benchmarks.store import Store, write

TINY = Setting("tiny")
MADE = {"command": "python -m benchmarks", "machine": {"processor": "some", "cores": 2}}


def test_rows_are_kept_with_what_made_them(tmp_path):
    store = Store(tmp_path / "results")
    assert store.frame().empty and not store.finished()
    store.start([TINY], [PLAIN, DEFAULT], MADE)
    store.add({"setting": "tiny", "method": "plain", "seed": 0, "accuracy": 0.5})
    store.add({"setting": "tiny", "method": "default", "seed": 0, "accuracy": 0.25, "weight_sd": 0.1})
    again = Store(tmp_path / "results")
    assert set(again.finished()) == {("tiny", "plain", 0), ("tiny", "default", 0)}
    assert again.frame()["accuracy"].tolist() == [0.5, 0.25] and again.frame()["weight_sd"].isna().tolist() == [
        True,
        False,
    ]
    assert again.described()["settings"]["tiny"]["lr"] == TINY.lr
    assert not list((tmp_path / "results").glob("*.partial"))
    again.add({"setting": "tiny", "method": "plain", "seed": 0, "accuracy": 0.75})  # made again
    assert again.frame()["accuracy"].tolist() == [0.25, 0.75] and len(again.table.read_text().splitlines()) == 3


def test_a_store_grows_but_does_not_mix(tmp_path):
    store = Store(tmp_path)
    store.start([TINY], [PLAIN], MADE)
    store.start([replace(TINY, name="other", lr=1.0)], [DEFAULT], MADE)
    store.start([TINY], [PLAIN], {**MADE, "command": "another"})
    described = store.described()
    assert list(described["settings"]) == ["tiny", "other"] and list(described["methods"]) == ["plain", "default"]
    assert [made["command"] for made in described["made_by"]] == [MADE["command"], "another"]
    with pytest.raises(typer.BadParameter, match="another setting 'tiny'"):
        store.start([replace(TINY, lr=0.3)], [PLAIN], MADE)
    with pytest.raises(typer.BadParameter, match="another method 'default'"):
        store.start([TINY], [DEFAULT.but("default", every=1)], MADE)


def test_an_attribute_that_came_later_had_its_default(tmp_path):
    store = Store(tmp_path)
    store.start([TINY], [PLAIN], MADE)
    config = json.loads(store.config.read_text())
    del config["settings"]["tiny"]["momentum"]
    write(store.config, json.dumps(config))
    store.start([TINY], [PLAIN], MADE)
    write(store.config, json.dumps(config))
    with pytest.raises(typer.BadParameter, match="another setting"):
        store.start([replace(TINY, momentum=0.0)], [PLAIN], MADE)


@pytest.mark.parametrize("study", [study for study in STUDIES.values() if study.grid], ids=lambda study: study.name)
def test_stored_runs_are_tuned_to_what_is_best_by_now(study):
    store = Store(Path(__file__).parents[2] / "benchmarks/results" / study.name)
    finished, frame = store.finished(), store.frame()
    for job in study.second(9, frame):
        training = job.method.training
        rates = (training["lr"], training["weight_decay"])
        assert finished.get((job.setting.name, job.method.name, job.seed), rates) == rates

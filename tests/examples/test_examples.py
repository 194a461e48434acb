"""The scripts in ``examples/``: few lines differ, equal weights give the plain script's numbers, and φ does learn."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch

import torch_molere

ROOT = Path(__file__).parents[2] / "examples"
LINES = 5
ARGUMENTS = {
    "mnist": ["--data", "fake", "--epochs", "2", "--batch-size", "16"],
    "cifar": ["--data", "fake", "--epochs", "1", "--batch-size", "3", "--workers", "0"],
    "tables": ["--epochs", "2"],
    "lightning": ["--epochs", "2"],
    "finetune": [
        "--model",
        "resnet18",
        "--weights",
        "none",
        "--size",
        "32",
        "--epochs",
        "2",
        "--frozen-epochs",
        "1",
        "--batch-size",
        "4",
        "--workers",
        "0",
    ],
    "language_model": ["--sequences", "256", "--length", "8", "--epochs", "2"],
    "hf_trainer": ["--rows", "64", "--epochs", "2"],
    "hf_accelerate": ["--rows", "128", "--epochs", "2"],
}
FOLDERS = {"cifar": "--out", "lightning": "--folder", "hf_trainer": "--out", "hf_accelerate": "--out"}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_every_script_is_here():
    assert {folder.name for folder in ROOT.iterdir() if (folder / "plain.py").exists()} == set(ARGUMENTS) | {"imagenet"}


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    for number in range(16):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 60.0 + number).convert("RGB").save(path)
    return tmp_path / "images"


def run(name, script, tmp_path, images, more=()):
    """The losses of a script."""
    path = ROOT / name / f"{script}.py"
    specification = importlib.util.spec_from_file_location(f"{name}_{script}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    arguments = [*ARGUMENTS[name], *([str(images)] if name == "finetune" else []), *more]
    if name in FOLDERS:
        arguments += [FOLDERS[name], str(tmp_path / script)]
    return module.main(arguments)


@pytest.fixture
def made(monkeypatch):
    """Every reweighter that scripts make, with options of the test's own."""
    found, own = [], {}

    class Watched(torch_molere.MetaReweighter):
        @functools.wraps(torch_molere.MetaReweighter.__init__)
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **{**options, **own})
            found.append(self)

    monkeypatch.setattr(torch_molere, "MetaReweighter", Watched)
    found_with = lambda **options: (own.clear(), own.update(options), found.clear())  # noqa: E731
    return found, found_with


@pytest.mark.parametrize("name", ARGUMENTS)
def test_equal_weights_give_the_plain_script(name, tmp_path, images, made):
    found, options = made
    plain = run(name, "plain", tmp_path, images)
    options(warmup_steps=10**6)
    reweighted = run(name, "reweighted", tmp_path, images)
    assert len(plain) > 3 and plain == reweighted
    (reweighter,) = found
    assert reweighter.steps > 1 and reweighter.meta_updates == 0 and len(reweighter.history) > 0


@pytest.mark.parametrize("name", ARGUMENTS)
def test_meta_updates_happen(name, tmp_path, images, made):
    found, options = made
    options(warmup_steps=2, every=1)
    assert all(map(torch.isfinite, map(torch.tensor, run(name, "reweighted", tmp_path, images))))
    (reweighter,) = found
    assert reweighter.meta_updates > 0
    assert reweighter.meta_updates >= reweighter.steps - 4


def stopped():
    raise KeyboardInterrupt


def lines_changed(name):
    command = [
        "git",
        "diff",
        "--no-index",
        "--numstat",
        *(str(ROOT / name / f"{s}.py") for s in ("plain", "reweighted")),
    ]
    return int(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])


@pytest.mark.parametrize("name", [*ARGUMENTS, "imagenet"])
def test_few_lines_differ(name):
    changed = lines_changed(name)
    assert 3 <= changed <= LINES
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {changed} |" in next(line for line in table.splitlines() if f"({name}/" in line)


def test_an_accelerated_run_is_resumed_bit_for_bit(tmp_path, images, made, monkeypatch):
    _, options = made
    options(warmup_steps=2, every=1)
    whole = run("hf_accelerate", "reweighted", tmp_path / "whole", images)
    save = accelerate.Accelerator.save_state
    states = iter((save, lambda *_: stopped()))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(accelerate.Accelerator, "save_state", lambda *given: next(states)(*given))
        run("hf_accelerate", "reweighted", tmp_path / "parts", images)
    torch.manual_seed(99)
    rest = run("hf_accelerate", "reweighted", tmp_path / "parts", images, ["--resume"])
    assert rest == whole[len(whole) // 2 :] and len(rest) == 8


def test_a_cifar_run_is_resumed_bit_for_bit(tmp_path, images, made, monkeypatch):
    _, options = made
    options(warmup_steps=2, every=2)
    two = ["--epochs", "2"]
    whole = run("cifar", "reweighted", tmp_path / "whole", images, two)
    save = torch.save
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", lambda state, path: stopped() if state.get("epoch") == 1 else save(state, path))
        run("cifar", "reweighted", tmp_path / "parts", images, two)
    torch.manual_seed(99)
    rest = run("cifar", "reweighted", tmp_path / "parts", images, [*two, "--resume"])
    assert rest == whole[len(whole) // 2 :] and len(rest) == 4


IMAGENET = ["--model", "resnet18", "--size", "32", "--epochs", "2", "--batch-size", "2", "--workers", "0", "--warmup"]
IMAGENET += ["2", "--processes", "2", "--lr", "0.01"]


def script(which, images, out, *more):
    """A script of ``imagenet/`` in processes of its own."""
    command = [sys.executable, str(ROOT / "imagenet" / f"{which}.py"), str(images), "--out", str(out), *IMAGENET, *more]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return torch.load(out / "losses0.pt")


def test_the_large_script_in_two_processes_and_in_the_middle_of_an_epoch(images, tmp_path):
    """Its warm-up is longer than this run, so all is plain training; stopped after the 6th of 8 steps, it goes on from
    the 5th."""
    plain = script("plain", images, tmp_path / "plain")
    first = script("reweighted", images, tmp_path / "parts", "--save-every", "5", "--stop", "6")
    rest = script("reweighted", images, tmp_path / "parts", "--resume")
    assert first == plain[:6] and rest == plain[5:] and len(plain) == 8


def test_lora_by_peft():
    """The adapters alone are trained; their meta-gradient is that of the really taken steps' difference."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    validation = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    reweighter = torch_molere.MetaReweighter(model, optimizer, validation=validation, every=1, warmup_steps=3)
    for step in range(8):
        rows = torch.arange(8) + 8 * (step % 2)
        result = reweighter.step((torch.randn(8, 6), torch.randint(3, (8,)), rows))
    assert reweighter.meta_updates == 5 and reweighter.metrics()["check/error"] < 0.01
    assert result.meta_gradient.abs().max() > 0

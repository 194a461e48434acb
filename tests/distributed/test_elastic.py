"""A rank that dies under ``torchrun --max-restarts``: training ends as if it had not, bit for bit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("elastic.py")
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")


def ends(folder, *step):
    """What each rank says at its end: restarts, the step that it began with, and the digest of all its states."""
    folder.mkdir()
    recipe = folder / "recipe.py"
    recipe.write_text(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "1", str(SCRIPT), str(folder), str(recipe), *step]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(folder / f"end-{rank}").read_text().split() for rank in range(2)]


def test_a_restart_goes_on_bit_for_bit(tmp_path):
    whole = ends(tmp_path / "whole")
    again = ends(tmp_path / "again", "7")
    assert [found[:2] for found in whole] == [["0", "0"]] * 2
    assert [found[:2] for found in again] == [["1", "6"]] * 2
    assert [found[2] for found in again] == [found[2] for found in whole]
    assert whole[0][2] != whole[1][2]  # each rank has something of its own, so the digest sees it

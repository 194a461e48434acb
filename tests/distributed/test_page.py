"""The script of docs/distributed.md runs, under torchrun on two ranks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
def test_the_script_of_the_page_runs(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, script, tmp_path / "checkpoint"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) rows seen, (\d+) of them sent to validation", done.stdout)
    assert found is not None
    assert int(found[1]) == 512
    assert 512 * 0.1 <= int(found[2]) <= 512 * 0.4  # a tenth of them at each of three passes

"""The Python of README and documentation runs from top to bottom, and the README's commands are the ones that work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_python_blocks_run_in_order(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if "init_process_group" in PAGES[page] else []
    command = [sys.executable, *launch, script, tmp_path / "checkpoint"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    command = "python -m pytest"
    assert f"pip install -e '.[test]' && {command}\n" in PAGES["README.md"]
    assert f"\n{command} " in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_support_page_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGES["support.md"]))
    files = (ROOT / "tests").rglob("*.py")
    there = {name for file in files for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))}
    assert len(named) > 40
    assert named <= there, named - there
    assert (ROOT / "tests" / "test_sequences.py").is_file()

"""The Python of README and documentation runs from top to bottom, and what the pages name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}


ELSEWHERE = {"distributed.md", "checkpoints.md"}  # run in tests/distributed/test_page.py and tests/test_checkpoint.py


@pytest.mark.parametrize("page", sorted(name for name in PAGES.keys() - ELSEWHERE if "```python" in PAGES[name]))
def test_python_blocks_run_in_order(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", sorted(PAGES))
def test_what_a_page_names_is_there(page):
    """Files that it links to, and tests."""
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", PAGES[page]) if "://" not in link]
    assert not [link for link in links if not (FILES[page].parent / link).exists()]
    files = list((ROOT / "tests").rglob("test_*.py"))
    tests = {name for file in files for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))}
    named = set(re.findall(r"`(test_\w+)`", PAGES[page]))
    assert not named - tests
    modules = set(re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)`", PAGES[page]))
    assert not modules - {file.relative_to(ROOT / "tests").as_posix() for file in files}
    assert page != "support.md" or len(named) > 60


def test_ci_runs_the_test_command_of_the_readme():
    command = "python -m pytest -n 2 --dist worksteal"
    assert f"pip install -e '.[test]' && {command}\n" in PAGES["README.md"]
    assert re.search(rf"^{command}( |$)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_public_name_is_in_the_reference():
    import torch_molere
    import torch_molere.report

    named = set(re.findall(r"^::: (\S+)$", PAGES["api.md"], re.MULTILINE))
    assert {f"torch_molere.{name}" for name in torch_molere.__all__} <= named
    assert {f"torch_molere.report.{name}" for name in torch_molere.report.__all__} <= named


def test_every_page_is_in_the_site():
    """Which CI builds with warnings as errors."""
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"(\S+\.md)$", contents, re.MULTILINE))
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")

"""CONTRIBUTING.md does what it says: the test of its first change fails before the change and passes after it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.reruns.fingerprint import Code

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
CHAPTER = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A first change\n")[2]
SECTION = CHAPTER.partition("\n## ")[0]
COMMAND = r"^    python -m (pytest \S+) +# (.*)$"


def block(language: str) -> str:
    """The only block of the section in a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
    return str(text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the section's commands need of the repository, with the section's test."""
    folder = tmp_path_factory.mktemp("first") / "clone"
    shutil.copytree(
        REPOSITORY / "workflow_scripts", folder / "workflow_scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    (place,) = re.findall(r"Save this as\s+`(tests/\S+\.py)`", SECTION)
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_text(block("python"), encoding="utf-8")
    return folder


def run(folder: Path, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """A command in the clone, as if nothing else were around it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH", "GIT_"))}
    environment = kept | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(command, cwd=folder, env=environment, input=given, capture_output=True, text=True)


def fingerprints(folder: Path) -> dict[str, str]:
    """Stage -> fingerprint of its code."""
    code = Code(folder / "workflow_scripts")
    return {
        path.stem: code.fingerprint(path.stem) for path in sorted((folder / "workflow_scripts/stages").glob("*.py"))
    }


def test_the_first_change_is_a_change(clone: Path) -> None:
    (before, after) = re.findall(COMMAND, SECTION, re.MULTILINE)
    assert before[0] == after[0]
    test = [sys.executable, "-m", *before[0].split(), "-p", "no:cacheprovider"]
    failed = run(clone, *test)
    count, _, reason = before[1].partition(" failed: ")
    assert f"= {count} failed in " in failed.stdout, failed.stdout + failed.stderr
    assert reason in failed.stdout
    old = fingerprints(clone)
    applied = run(clone, "git", "apply", "-", given=block("diff"))
    assert applied.returncode == 0, applied.stderr
    passed = run(clone, *test)
    assert f"= {after[1]} in " in passed.stdout, passed.stdout + passed.stderr
    for arguments in (["check"], ["format", "--check"]):
        checked = run(clone, "ruff", *arguments, "--no-cache", ".")
        assert checked.returncode == 0, checked.stdout
    new = fingerprints(clone)
    (told,) = re.findall(r"\*\*What runs again\.\*\* (.*?) can reach", SECTION)
    assert [stage for stage in old if old[stage] != new[stage]] == re.findall(r"`(\w+)`", told)

"""Versions of packages and of the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lowrank.versions import git_state, package_version


def test_versions_of_packages() -> None:
    assert package_version("torch").startswith("2.")
    assert package_version("no-such-package") == "absent"


def test_commit_and_uncommitted_changes_are_told(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": None}

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    assert git_state(tmp_path)["commit"] == "unknown", "no commit yet"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner")["commit"] == "unknown", "another repository's commit is not ours"

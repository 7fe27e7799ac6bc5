"""Which versions made a result: of packages, and of this checkout."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def package_version(package: str) -> str:
    """The installed version of a package, or `absent`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def git_state(project: Path) -> dict[str, Any]:
    """Commit of the project's checkout and whether it has uncommitted changes; `unknown` and null without one."""
    unknown = {"commit": "unknown", "dirty": None}
    top = _git(project, "rev-parse", "--show-toplevel")
    # A copy of the project that lies inside some other repository must not claim that repository's commit.
    if top is None or Path(top).resolve() != project.resolve():
        return unknown
    commit, status = _git(project, "rev-parse", "--verify", "HEAD"), _git(project, "status", "--porcelain")
    return unknown if commit is None or status is None else {"commit": commit, "dirty": bool(status)}


def _git(project: Path, *arguments: str) -> str | None:
    """What a git command prints; None without git, or where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(project), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

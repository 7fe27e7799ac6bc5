"""Programs of Debian that tests need: installed where that is possible, else the reason for a skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"
"""Folders of system programs, which are not in everybody's path."""


class Unavailable(Exception):
    """Something is not here and cannot be installed; the message says why."""


def install(name: str, programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install packages if one of their programs is missing; one process at a time, as tests run in several.

    Raises:
        Unavailable: it is missing, and this is no Debian, or the user is not root, or apt failed.
    """
    with FileLock(Path(tempfile.gettempdir()) / f"rankwise-apt-{os.getuid()}.lock"):
        missing = [program for program in programs if find(program) is None]
        if not missing:
            return
        if shutil.which("apt-get") is None:
            raise Unavailable(
                f"{name} is not installed ({missing[0]} is missing), and there is no apt-get to install it"
            )
        if os.geteuid() != 0:
            raise Unavailable(f"{name} is not installed ({missing[0]} is missing), and only root may install it")
        options = ["-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
        for command in (["apt-get", "update"], ["apt-get", "install", *options, *packages]):
            _run(command)


def find(program: str) -> str | None:
    """Where a program is, in the folders of system programs too."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM}")


def _run(command: Sequence[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(command)}` took longer than {error.timeout:.0f} s") from error
    if run.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed: {(run.stderr or run.stdout).strip()[-300:]}")

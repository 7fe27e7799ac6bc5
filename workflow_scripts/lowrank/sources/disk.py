"""Is there room? Asked before a big write, so that a job does not fail after an hour of copying."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowrank.errors import RankwiseError
from lowrank.files import existing_parent

MIB = 2**20


def require_free(target: Path, needed: int, what: str) -> None:
    """Check that `needed` bytes are free on the disk of `target`.

    Raises:
        RankwiseError: there are fewer; it names the folder, both sizes and what to do.
    """
    folder = target if target.is_dir() else existing_parent(target)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RankwiseError(
            f"{folder}: {what} needs {needed / MIB:.0f} MiB and only {free / MIB:.0f} MiB are free. Free some space, "
            "or move `results` and the `cache` of the config to a larger disk; finished results are intact."
        )

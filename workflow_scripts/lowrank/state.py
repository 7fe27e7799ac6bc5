"""Folders for work in progress, so that a killed job goes on where it stopped.

Snakemake deletes a rule's outputs before each try, so unfinished work lives beside them, in a folder whose
name is a digest of everything that decides the result. A changed setting, input or line of code gives another
folder: a job never resumes from a state that belongs to other settings.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank.files import digest_of, read_json, sha256_file, write_json

log = logging.getLogger(__name__)


class Clock:
    """Seconds of work, those before a kill included."""

    def __init__(self, path: Path) -> None:
        """Args: path: a JSON file in the folder of the unfinished work."""
        self.path = path
        self.before = float(read_json(path)) if path.is_file() else 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of all parts so far."""
        return self.before + time.monotonic() - self.started

    def save(self) -> None:
        """Remember the time until now."""
        write_json(self.path, self.seconds)


@contextmanager
def resumable_state(root: str | Path, stage: str, settings: Any, inputs: Mapping[str, str | Path]) -> Iterator[Path]:
    """Yield the folder of a job's unfinished work; it is removed when the block succeeds and kept otherwise.

    Args:
        root: the folder of all states of a run.
        stage: the stage's name, the first part of the folder's name.
        settings: a JSON value of every setting (and the code's fingerprint) that decides the result.
        inputs: name -> file; their contents enter the digest.
    """
    key = {
        "stage": stage,
        "settings": settings,
        "inputs": {name: sha256_file(path) for name, path in sorted(inputs.items())},
    }
    folder = Path(root) / f"{stage}-{digest_of(key)[:16]}"
    if folder.is_dir() and any(folder.iterdir()):
        log.info("resuming from %s", folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "key.json", key)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)

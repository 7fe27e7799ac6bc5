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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.errors import RankwiseError
from lowrank.files import digest_of, load_tensors, read_json, save_tensors, sha256_file, write_error, write_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KEY = "key.json"
"""In a folder of unfinished work: all that decides the result, in full."""


SECONDS = "seconds.json"
"""There too: the time that was spent on it, see `Clock`."""


class Clock:
    """Seconds of work, those before a kill included."""

    def __init__(self, path: Path) -> None:
        """Args: path: a JSON file in the folder of the unfinished work."""
        self.path = path
        self.before = _seconds(path) if path.is_file() else 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of all parts so far."""
        return self.before + time.monotonic() - self.started

    def leave_out(self, seconds: float) -> None:
        """Do not count so many of them, which are counted elsewhere."""
        self.before -= seconds

    def save(self) -> None:
        """Remember the time until now."""
        write_json(self.path, self.seconds)


class Parts:
    """Parts of a job's work that another try need not do again, each a file of tensors in the folder of the state."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: of the unfinished work."""
        self.folder, self.clock = folder, Clock(folder / SECONDS)

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """A part, or None if it is not there yet.

        Raises:
            RankwiseError: it is damaged; the folder to delete is named.
        """
        path = self.folder / f"{name}.safetensors"
        return load_tensors(path, whole=self.folder) if path.is_file() else None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a part, and the time until now."""
        save_tensors(self.folder / f"{name}.safetensors", tensors)
        self.clock.save()


def _seconds(path: Path) -> float:
    value = read_json(path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RankwiseError(f"{path}: damaged, it holds no number. Delete {path.parent} and run the workflow again.")
    return float(value)


@contextmanager
def resumable_state(root: str | Path, stage: str, settings: Any, inputs: Mapping[str, str | Path]) -> Iterator[Path]:
    """Yield the folder of a job's unfinished work; it is removed when the block succeeds and kept otherwise.

    Args:
        root: the folder of all states of a run.
        stage: the stage's name, the first part of the folder's name.
        settings: a JSON value of every setting (and the code's fingerprint) that decides the result.
        inputs: name -> file; their contents enter the digest.

    Raises:
        RankwiseError: the folder cannot be made, or the disk is full.
    """
    key = {
        "stage": stage,
        "settings": settings,
        "inputs": {name: sha256_file(path) for name, path in sorted(inputs.items())},
    }
    folder = Path(root) / f"{stage}-{digest_of(key)[:16]}"
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if _holds(folder / KEY, key):
                log.info("resuming from %s", folder)
            else:
                log.warning("%s belongs to another job, or its %s is damaged: starting afresh", folder, KEY)
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    write_json(folder / KEY, key)
    yield folder
    with suppress(OSError):
        (folder / KEY).unlink()  # first: what a kill leaves of the rest must not be taken for unfinished work
    shutil.rmtree(folder, ignore_errors=True)


def _holds(path: Path, key: Any) -> bool:
    """Whether a file holds a key."""
    try:
        return bool(digest_of(read_json(path)) == digest_of(key))
    except RankwiseError:
        return False

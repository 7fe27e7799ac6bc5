"""Checkpoints that are deleted after their last use, and what makes one again without making its results again.

Evaluations are compared with the content of a checkpoint's manifest, which also says how long the work took and where
it was done. So the manifest of a checkpoint that was given up is kept beside it, and stands again, byte for byte, if
the same checkpoint is made once more. That file is the mark of the deletion too: it goes when the checkpoint is made
again, so that `snakemake all` gives that up again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.files import read_record, write_json

KEPT = "given_up.json"
"""The manifest of the last checkpoint that was given up, beside it."""
MADE_AGAIN = "was_given_up.json"
"""The same, once that checkpoint is being made again; it stays, for a job that is killed and tried again."""
OF_THE_WORK = ("seconds", "environment", "processes")
"""What a manifest says of the work alone, and not of what came out."""


def give_up(folder: str | Path, kept: str | Path) -> None:
    """Delete a checkpoint; what its manifest says stays there, and goes to `kept` too.

    Args:
        folder: with the folder `checkpoint` and `manifest.json`.
        kept: the file named `KEPT` in it.

    Raises:
        OSError: the checkpoint cannot be deleted.
    """
    write_json(kept, read_record(Path(folder) / "manifest.json"))
    if (checkpoint := Path(folder) / "checkpoint").is_dir():
        shutil.rmtree(checkpoint)


def write_manifest(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint; that of before, if the same checkpoint was given up."""
    kept, made_again = (Path(path).with_name(name) for name in (KEPT, MADE_AGAIN))
    if kept.is_file():
        os.replace(kept, made_again)
    before = read_record(made_again) if made_again.is_file() else None
    # Numbers and lists as they come back from a file.
    write_json(path, manifest)
    if before is not None and _outcome(read_record(path)) == _outcome(before):
        write_json(path, before)


def _outcome(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What came out. A licence in the config decides none of it, nor does the base's size, which older manifests lack.

    Both stand in the card, which has no checksum.
    """
    came_out = {key: value for key, value in manifest.items() if key not in OF_THE_WORK}
    base = {key: value for key, value in came_out.get("base", {}).items() if key not in ("license", "bytes")}
    training = {key: value for key, value in came_out.get("training", {}).items() if key not in OF_THE_WORK}
    return came_out | {"base": base, "training": training}

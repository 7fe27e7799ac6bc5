"""The config of a run's head, kept for its jobs: what they compute does not change with the file while they wait."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from lowrank.config.shapes import found_shape, with_shapes
from lowrank.config.sources import FoundShape
from lowrank.config.study import Study
from lowrank.config.use import with_presets
from lowrank.errors import RankwiseError
from lowrank.files import write_text

FROZEN = "RANKWISE_CONFIG"
"""The variable by which jobs know the file, and the hash of what their head has written into it: `hash:file`."""


def freeze(raw: Mapping[str, Any], files: Sequence[str | Path], head: Mapping[str, Any], target: str | Path) -> None:
    """Write the config that a head has read, with its presets and the shapes that it found, and tell all jobs of it.

    Args:
        raw: as it was read and checked.
        files: where it was read from.
        head: what tells this start from every other; jobs of an earlier one stop where there is a later one.
        target: the file to write.
    """
    merged, _ = with_presets(dict(raw), files)
    seen, _ = with_shapes(merged)
    found = {
        name: model["shape"].model_dump()
        for name, model in seen["models"].items()
        if isinstance(model.get("shape"), FoundShape)
    }
    text = json.dumps({"head": dict(head), "config": merged, "found": found})
    write_text(target, text)
    os.environ[FROZEN] = f"{sha256(text.encode()).hexdigest()}:{os.path.abspath(target)}"


def frozen_study() -> Study | None:
    """The study that this job's head has read; None where no head told of one.

    Raises:
        RankwiseError: the file is gone, or another head has written its own since.
    """
    digest, _, file = os.environ.get(FROZEN, "").partition(":")
    if not file:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RankwiseError(
            f"{file}: the config of this run cannot be read ({error}); run the workflow again"
        ) from error
    if sha256(text.encode()).hexdigest() != digest:
        raise RankwiseError(
            f"{file}: another start of this run has written its config since this job was submitted. If the start that "
            "submitted it was killed, cancel the jobs that it left; if not, let one start at a time work on a run"
        )
    told = json.loads(text)
    for name, numbers in told["found"].items():
        told["config"]["models"][name]["shape"] = found_shape(numbers)
    return Study.model_validate(told["config"])

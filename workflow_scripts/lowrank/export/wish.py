"""What `make export` is asked for, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowrank.config.messages import did_you_mean
from lowrank.errors import RankwiseError

TARGETS = ("same", "dense", "gguf")
GGUF = ".gguf"


@dataclass(frozen=True)
class Export:
    """What is wanted.

    Attributes:
        checkpoint: an existing folder.
        to: one of `TARGETS`: as it is, multiplied out for its base architecture, or a GGUF file.
        out: the folder or the file to make; not there yet.
    """

    checkpoint: Path
    to: str
    out: Path

    @classmethod
    def of(cls, checkpoint: str, to: str, out: str) -> Export:
        """A wish that can be tried.

        Args:
            checkpoint, to, out: as they are given; empty where nothing is.

        Raises:
            RankwiseError: no checkpoint, a target that is not there, or a place that is taken.
        """
        if not checkpoint:
            raise RankwiseError("CHECKPOINT: missing; name the folder of a checkpoint, compressed or tuned")
        if to not in TARGETS:
            raise RankwiseError(f"TO: '{to}' is no target; there are {', '.join(TARGETS)}{did_you_mean(to, TARGETS)}")
        if not out:
            raise RankwiseError(
                "OUT: missing; name the folder to make, or with TO=gguf a file whose name ends in .gguf"
            )
        source, place = Path(checkpoint).expanduser(), Path(out).expanduser()
        if not (source / "config.json").is_file():
            raise RankwiseError(f"CHECKPOINT: {checkpoint} is no checkpoint, it has no config.json")
        if place.exists():
            raise RankwiseError(f"OUT: {out} is there already. Choose another place, or delete it.")
        if to == "gguf" and place.suffix != GGUF:
            raise RankwiseError(f"OUT: {out} must end in {GGUF}, as tools expect it")
        return cls(source, to, place)

"""Where post-training has the weights of its model, by DeepSpeed's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowrank.config.tuning import Tuning
from lowrank.files import read_json

DIVIDED_STAGE = 3
"""From which on a process holds a part of the weights."""
LIVE_NUMBERS = 1_000_000_000
"""Numbers of gathered layers that ZeRO's third stage holds at once unless its file says otherwise: DeepSpeed's own."""


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed's own configuration says of where the weights are.

    Attributes:
        stage: 3: each process holds a part of them; below, all.
        offloads: they are in main memory, but for those that are needed now.
        live: numbers of them that a process has gathered at most.
    """

    stage: int
    offloads: bool
    live: int

    @property
    def divided(self) -> bool:
        """Whether a process holds a part of the weights."""
        return self.stage == DIVIDED_STAGE


def zero_of(tuning: Tuning, folder: str | Path) -> Zero:
    """Where a post-training preset has the weights, by the file that it names in the repository's `config`."""
    section = read_json(Path(folder) / "deepspeed" / f"{tuning.deepspeed}.json").get("zero_optimization", {})
    offload = section.get("offload_param") or {}
    live = int(section.get("stage3_max_live_parameters", LIVE_NUMBERS))
    return Zero(int(section.get("stage", 0)), offload.get("device", "none") != "none", live)

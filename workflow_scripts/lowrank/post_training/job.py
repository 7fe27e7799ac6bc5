"""What a stage and its training processes exchange through the job's state folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank.files import read_record, write_json

TRAIN_FILE = "train.safetensors"
VALIDATION_FILE = "validation.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class TrainingJob:
    """What a training process needs to know; a plain JSON value.

    Attributes:
        checkpoint: folder of the compressed model.
        folder: state of the job: the tokenised rows lie there, progress and vectors are written there.
        tuning: a preset of `tuning` as a plain dict.
        deepspeed: content of a file of config/deepspeed.
        seed: of the random subspace or matrices, of dropout, and of the order of rows.
        earlier: files of what the stages before this one learnt, which are merged first.
    """

    checkpoint: str
    folder: str
    tuning: dict[str, Any]
    deepspeed: dict[str, Any]
    seed: int
    earlier: list[str] = field(default_factory=list)


@dataclass
class Progress:
    """State of the loop after `step` optimiser steps. It is written last, so all it names exists.

    Attributes:
        step: steps done.
        loss: (step, mean negative log-likelihood of a scored token of that step's batch, before its update).
        validation: (step, the same over the validation rows, after that many steps).
        best: step of the lowest validation loss after training began, whose vectors are kept.
        seconds: time spent in the loop, over all resumed parts.
    """

    step: int = 0
    loss: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None
    seconds: float = 0.0

    @property
    def best_loss(self) -> float:
        """The lowest validation loss after training began; infinite before the first."""
        return dict(self.validation)[self.best] if self.best is not None else float("inf")

    @property
    def checkpoint(self) -> str:
        """Tag of the DeepSpeed checkpoint of this step."""
        return f"step{self.step}"

    def save(self, folder: Path) -> None:
        """Write atomically."""
        write_json(folder / PROGRESS_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read the progress of a job; that of a fresh one if there is none."""
        if not (folder / PROGRESS_FILE).is_file():
            return cls()
        values = read_record(folder / PROGRESS_FILE)
        curves = {name: [(step, loss) for step, loss in values[name]] for name in ("loss", "validation")}
        return cls(**{**values, **curves})


def joined(stages: Sequence[Progress]) -> Progress:
    """One progress of stages that followed each other: steps count on, and the best is the last stage's."""
    whole = Progress()
    for stage in stages:
        curves = {
            name: [*getattr(whole, name), *((whole.step + step, loss) for step, loss in getattr(stage, name))]
            for name in ("loss", "validation")
        }
        best = None if stage.best is None else whole.step + stage.best
        whole = Progress(whole.step + stage.step, best=best, seconds=whole.seconds + stage.seconds, **curves)
    return whole


def vectors_file(folder: Path, step: int) -> Path:
    """Where the vectors lie that gave the best validation loss, at `step`."""
    return folder / f"vectors-step{step}.safetensors"

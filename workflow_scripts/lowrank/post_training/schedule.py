"""How many steps a post-training takes, which rows each step sees, and at which learning rate."""

from __future__ import annotations

from typing import Any

import torch

from lowrank.config.tuning import Tuning
from lowrank.errors import RankwiseError
from lowrank.model.runtime import SEEDS_APART

# Keys of a DeepSpeed configuration that follow from the `tuning` preset, so that one number has one place.
SET_BY_TUNING = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
)


def total_steps(tuning: Tuning, rows: int) -> int:
    """Optimiser steps: `steps`, or as many full batches as `epochs` passes over `rows` training rows hold.

    Raises:
        RankwiseError: the warm-up leaves no step at the full learning rate.
    """
    steps = tuning.steps or max(1, int((tuning.epochs or 0) * rows) // tuning.batch_size)
    if tuning.warmup_steps >= steps:
        raise RankwiseError(
            f"tuning: `warmup_steps: {tuning.warmup_steps}` leaves nothing of the {steps} steps. "
            "Lower it, or raise `steps` or `epochs`."
        )
    return steps


def accumulation_steps(tuning: Tuning, processes: int) -> int:
    """Micro-batches that each process sums up before a step.

    Raises:
        RankwiseError: the batch cannot be shared evenly.
    """
    together = tuning.micro_batch_size * processes
    if tuning.batch_size % together:
        raise RankwiseError(
            f"tuning: `batch_size: {tuning.batch_size}` is no multiple of `micro_batch_size: "
            f"{tuning.micro_batch_size}` x {processes} processes. Change one of the three."
        )
    return tuning.batch_size // together


def engine_config(deepspeed: dict[str, Any], tuning: Tuning, processes: int) -> dict[str, Any]:
    """A file of config/deepspeed, completed by what the tuning preset decides.

    Raises:
        RankwiseError: the file sets one of those keys itself.
    """
    doubled = sorted(set(deepspeed) & set(SET_BY_TUNING))
    if doubled:
        raise RankwiseError(
            f"config/deepspeed/{tuning.deepspeed}.json: {', '.join(doubled)} follows from the `tuning` preset; "
            "take it out of this file."
        )
    return {
        "steps_per_print": 10**9,
        **deepspeed,
        "train_micro_batch_size_per_gpu": tuning.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(tuning, processes),
    }


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then linear decay that would reach 0 after the last of `steps`.

    Steps count from 0; every step has a positive rate, and the first one after the warm-up has the peak.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (steps - step) / (steps - warmup)


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """Which training rows step `step` sees: each epoch is a new permutation, and batches run across epochs.

    A function of the step alone, so a resumed job needs no state of a sampler.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = sorted({position // rows for position in positions})
    order = {epoch: _epoch_order(rows, seed, epoch) for epoch in epochs}
    return [order[position // rows][position % rows] for position in positions]


def _epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    # Seeds of neighbouring epochs and of neighbouring studies must differ.
    generator = torch.Generator().manual_seed(seed * SEEDS_APART + epoch)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order

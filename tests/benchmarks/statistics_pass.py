"""Statistics against a forward pass of the same tokens: what adding up moments takes, and what files take."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from lowrank.calibration.moments import MomentAccumulator
from lowrank.calibration.statistics import TOKENS_PER_BATCH, collect_statistics
from lowrank.model.checkpoint import family_of
from lowrank.model.losses import last_hidden
from tests.benchmarks.measuring import Row, Setting, in_turns, on, random_model, random_windows, row_of, seconds

PASSES = 2
"""Groups of blocks: half of the accumulators are held at once."""


def rows(setting: Setting) -> list[Row]:
    """For each dtype, how much longer a forward pass is that adds up moments, and the seconds that files take."""
    return [row for dtype in setting.dtypes for row in _of_dtype(setting, dtype)]


def _of_dtype(setting: Setting, dtype: str) -> list[Row]:
    size, device = setting.size, torch.device(setting.device)
    model, windows = random_model(size, dtype, setting.device), random_windows(size)
    batches = [ids.to(device) for ids in windows.split(max(1, TOKENS_PER_BATCH // size.length))]

    @torch.inference_mode()
    def forward() -> None:
        for ids in batches:
            last_hidden(model, ids)

    def adding() -> None:
        handles = _add_up(model, device)
        forward()
        for handle in handles:
            handle.remove()

    times = in_turns({"forward": forward, "adding": adding}, size.turns, setting.device)
    added = [(a - b) / b for a, b in zip(times["adding"], times["forward"], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        blocks_a_pass = -(-size.blocks // PASSES)
        whole = seconds(lambda: collect_statistics(model, windows, blocks_a_pass, Path(folder), device), setting.device)
    files = whole - statistics.median(times["adding"])
    return [
        row_of("statistics: what moments add / forward pass", added, dtype, target=on(setting, None, 1.0)),
        row_of("statistics: what files add, once", [files], dtype, "s", on(setting, None, 20.0)),
    ]


def _add_up(model: Any, device: torch.device) -> list[Any]:
    """Let every input site of every block feed an accumulator of its own."""
    family, handles = family_of(model), []
    for number, block in enumerate(model.get_submodule(family.blocks)):
        for linear in family.sites.values():
            module = block.get_submodule(linear.path)
            moments = MomentAccumulator(module.in_features, device)
            name = f"{number}.{linear.path}"
            handles.append(
                module.register_forward_pre_hook(lambda _, args, to=moments, name=name: to.update(args[0], name))
            )
    return handles

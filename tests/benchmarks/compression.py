"""What `compress_model` of `rankwise` takes for a block: ranks, slices and identity blocks; bases are there."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank.bases.principal import Bases
from lowrank.compression.compress import compress_model
from lowrank.files import layer_name, save_tensors
from lowrank.ranks.budget import Budget
from tests.benchmarks.measuring import Row, Setting, on, random_basis, random_model, row_of, seconds

REMOVED = 20
SETTINGS = {"kind": "rankwise", "calibration": "none", "covariance": "none", "influence": False}
WHOLE_MODEL = {"cpu": 600.0, "cuda": 120.0}
"""Seconds that a model of LLaMA-2-7B's shapes may take, on 8 threads of a processor or a GPU."""


def rows(setting: Setting) -> list[Row]:
    """Seconds a block. The target is that of the whole 7B model; narrower blocks have none."""
    size = replace(setting.size, blocks=1)
    budget = Budget.of(size.shape)
    model = random_model(size, "float32", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        tensors: dict[str, Any] = {}
        for module in budget.modules:
            m, n = module.out_features, module.in_features
            tensors |= random_basis(m, n, min(m, n)).tensors(module.type.name)
        save_tensors(Path(folder) / layer_name(0), tensors)

        def compress() -> None:
            task = {"model": work.pop(), "budget": budget, "ratio": REMOVED, "seed": 0, "bases": Bases(folder, 1)}
            compress_model(SETTINGS["kind"], SETTINGS, task)

        times = []
        for _ in range(setting.size.turns):
            work = [copy.deepcopy(model)]
            times.append(seconds(compress, setting.device))
    is_7b = setting.size.hidden == 4096
    limit = WHOLE_MODEL[setting.device] / setting.size.blocks if is_7b else None
    return [row_of("compress_model of rankwise, a block", times, "float32", "s", on(setting, limit, limit))]

"""Disk and GPU hours of the paper's study, by the plan; nothing is measured."""

from __future__ import annotations

from pathlib import Path

from lowrank.cluster.plan import make_plan
from lowrank.config.load import load_study
from tests.benchmarks.measuring import Row, Setting, row_of

CONFIG = Path(__file__).parents[2] / "config" / "paper.yaml"


def rows(setting: Setting) -> list[Row]:
    """Of `make plan`, whatever the setting."""
    plan = make_plan(load_study(CONFIG))
    return [
        row_of("disk of config/paper.yaml, planned", [plan.disk / 1e12], unit="TB", target=1.3),
        row_of("GPU hours of config/paper.yaml, planned", [plan.gpu_hours], unit="h", target=170),
    ]

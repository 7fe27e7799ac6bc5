"""A study with every kind of job for one model of a given shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.config.load import check_study
from lowrank.config.study import Study

ROOT = Path(__file__).parents[3]


def study_of(shape: dict[str, Any], dtype: str = "float16", **changes: Any) -> Study:
    """The paper's kinds of jobs for one model of a shape."""
    text = {"source": {"path": "text.jsonl"}, "format": "jsonl"}
    bases = {"calibration": "c4", "covariance": "pooled"}
    return check_study(
        {
            "run": "sizes",
            "models": {"one": {"source": {"path": "one"}, "shape": shape, "dtype": dtype, "max_length": 4096}},
            "corpora": {"text": text, "test": text | {"source": {"path": "test.jsonl"}}},
            "instructions": {"alpaca": {"source": {"path": "alpaca.json"}}},
            "tasks": {"piqa": {"source": {"path": "piqa.jsonl"}, "reader": "jsonl"}},
            "calibration": {"c4": {"corpora": ["text"], "windows": 1024, "length": 4096}},
            "covariance": {"pooled": {"estimator": "pooled", "groups": 32}},
            "validation": {
                "top": {"corpora": ["text"], "windows": 768, "length": 4096, "select": bases | {"keep": 100}}
            },
            "search": {"bo": {"evaluations": 50}},
            "sensitivity": {
                "types": bases | {"model": "one", "corpus": "text", "windows": 32, "length": 2048, "kept": [0.5]}
            },
            "methods": {"bolaco": bases | {"kind": "bolaco", "validation": "top", "search": "bo"}},
            "tuning": {
                "scales": {"kind": "scaled-subspace", "instructions": "alpaca"},
                "distilled": {"kind": "feature-distillation", "calibration": "c4", "batch_size": 1},
            },
            "suites": {
                "held-out": {"kind": "perplexity", "corpora": ["test"], "length": 4096},
                "zero-shot": {"kind": "zero-shot", "tasks": {"piqa": "acc"}},
                "cost": {"kind": "cost"},
                "prompts": {"kind": "generation", "prompts": ["One"]},
            },
        }
        | changes
    )


CALIBRATION = {"model": "one", "calibration": "c4", "covariance": "pooled"}


BOLACO = {"model": "one", "method": "bolaco", "ratio": "20", "seed": "0", "tuning": "none"}


JOBS = {
    "collect_statistics": CALIBRATION,
    "compute_bases": CALIBRATION,
    "eliminate_neurons": CALIBRATION | {"multiple": "8"},
    "select_validation": {"model": "one", "validation": "top"},
    "measure_sensitivity": {"sensitivity": "types"},
    "search_allocation": BOLACO,
    "post_train": BOLACO | {"tuning": "scales"},
    "distil_features": BOLACO | {"tuning": "distilled"},
    "evaluate_perplexity": BOLACO | {"suite": "held-out"},
    "evaluate_zero_shot": BOLACO | {"suite": "zero-shot"},
    "evaluate_cost": BOLACO | {"suite": "cost"},
    "evaluate_generation": BOLACO | {"suite": "prompts"},
}


def half(width: int) -> float:
    """Numbers of a symmetric matrix in a file: half, and half of the panels of 256 on the diagonal."""
    return width * (width + 256) / 2

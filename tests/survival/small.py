"""The smallest study that has all the long steps: statistics, a search, post-training, evaluations, tables."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests import tiny, tiny_study
from tests.warm import ENVIRONMENT

ROOT = Path(__file__).parents[2]
RUN = "results/small"


def config(folder: Path) -> dict[str, Any]:
    """The config; its sources lie in `folder`."""
    vocabulary = len(tiny.tokenizer())
    row = {"model": "tiny", "ratio": 20, "tolerance": 4, "method": "bolaco"}
    return {
        "run": "small",
        "smoke": True,
        "models": {
            "tiny": {
                "source": {"path": str(folder / "model")},
                "shape": tiny.shape("llama-gqa", vocabulary),
                "max_length": 256,
            }
        },
        "corpora": {
            name: {"source": {"path": str(folder / f"{name}.jsonl")}, "format": "jsonl"} for name in ("texts", "tests")
        },
        "instructions": {"tiny": {"source": {"path": str(folder / "instructions.jsonl")}, "format": "jsonl"}},
        "calibration": {"c": {"corpora": ["texts"], "windows": 8, "length": 32}},
        "covariance": {"pooled": {"estimator": "pooled", "groups": 2}},
        "validation": {
            "top": {
                "corpora": ["texts"],
                "windows": 4,
                "length": 32,
                "select": {"keep": 2, "allocations": 2, "groups": 2, "calibration": "c", "covariance": "pooled"},
            }
        },
        "search": {"bo": {"evaluations": 5, "initial": 3}},
        "methods": {
            "bolaco": {
                "kind": "bolaco",
                "calibration": "c",
                "covariance": "pooled",
                "validation": "top",
                "search": "bo",
            }
        },
        "tuning": {
            "scales": {
                "kind": "scaled-subspace",
                "instructions": "tiny",
                "rank": 4,
                "steps": 4,
                "batch_size": 4,
                "micro_batch_size": 2,
                "warmup_steps": 1,
                "max_length": 250,
                "validation_examples": 4,
                "evaluate_every": 1,
                "dtype": "float32",
            }
        },
        "suites": {
            "held-out": {"kind": "perplexity", "corpora": ["tests"], "length": 64, "windows": 2},
            "cost": {"kind": "cost", "prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
        },
        "tables": {
            "table_1": {
                "kind": "accuracy",
                "title": "Perplexity",
                "suites": ["held-out"],
                "rows": [row, {**row, "tuning": "scales"}],
            },
            "table_7": {"kind": "statistics", "title": "Statistics", "suites": ["cost"], "rows": [row]},
            "table_8": {"kind": "allocations", "title": "Ranks", "rows": [row]},
            "times": {"kind": "times", "title": "Times", "suites": ["cost"], "rows": [row]},
        },
    }


def write_study(folder: Path) -> None:
    """All inputs, and `small.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = tiny.tokenizer()
    tiny.model("llama-gqa", len(trained)).save_pretrained(folder / "model")
    trained.save_pretrained(folder / "model")
    for offset, name in enumerate(("texts", "tests")):
        rows = [{"text": tiny.text(100 * offset + index, 100)} for index in range(12)]
        tiny_study.write_lines(folder / f"{name}.jsonl", rows)
    rows = [{"instruction": tiny.text(i, 6), "input": "", "output": tiny.text(900 + i, 12)} for i in range(20)]
    tiny_study.write_lines(folder / "instructions.jsonl", rows)
    (folder / "small.yaml").write_text(yaml.safe_dump(config(folder), sort_keys=False), encoding="utf-8")


def arguments(folder: Path, *more: str) -> list[str]:
    """What a user types after `snakemake`."""
    return [
        *("--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)),
        *("--configfile", str(folder / "small.yaml"), "--profile", str(ROOT / "profiles/local"), *more),
    ]


def environment(**more: str) -> dict[str, str]:
    """All variables of a run."""
    return os.environ | ENVIRONMENT | more


def succeeded(run: subprocess.CompletedProcess[str]) -> str:
    """What it printed, after a check that it succeeded."""
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def tables(folder: Path) -> dict[str, bytes]:
    """All tables of a run but the measured times, byte by byte."""
    files = sorted((folder / RUN / "tables").glob("table_*.*"))
    return {path.name: path.read_bytes() for path in files}


def weights(folder: Path) -> dict[str, bytes]:
    """All weights of compressed and post-trained checkpoints."""
    return {
        str(path.relative_to(folder / RUN)): path.read_bytes()
        for kind in ("compressed", "tuned")
        for path in sorted((folder / RUN / kind).rglob("*.safetensors"))
    }

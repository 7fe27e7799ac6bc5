"""A small study of a model with experts, by the workflow, from texts to tables."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from lowrank.model.checkpoint import load_checkpoint
from tests import tiny, tiny_study
from tests.warm import ENVIRONMENT, Warm

ROOT = Path(__file__).parents[2]
LEAST = 185
PAIRS = ("svd-llm", "bolaco", "rankwise")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The results of a study of `qwen3_moe`."""
    folder = tmp_path_factory.mktemp("tiny mixture")
    tiny_study.write_inputs(folder)
    trained = tiny.tokenizer()
    tiny.model("qwen3_moe", len(trained)).save_pretrained(folder / "mixture", save_original_format=False)
    trained.save_pretrained(folder / "mixture")
    raw = tiny_study.config(folder)
    row = {"model": "mixture", "ratio": 20, "tolerance": 2}
    rows = [{"model": "mixture", "method": "dense"}, *({**row, "method": method} for method in PAIRS)]
    study = (
        {key: raw[key] for key in ("corpora", "covariance", "validation", "search")}
        | {
            "run": "mixture",
            "smoke": True,
            "models": {
                "mixture": {"source": {"path": str(folder / "mixture")}, "max_length": 256}
            },  # its shape is read
            "calibration": {"c8": raw["calibration"]["c8"] | {"expert_tokens": LEAST}},
            "methods": {
                "dense": {"kind": "dense"},
                "bolaco": raw["methods"]["bolaco"],
                "rankwise": {"kind": "rankwise", "calibration": "c8", "covariance": "fisher"},
                "svd-llm": {"kind": "svd-llm", "calibration": "c8"},
            },
            "tuning": raw["tuning"],
            "instructions": raw["instructions"],
            "suites": {name: raw["suites"][name] for name in ("held-out", "cost")},
            "tables": {
                "table_1": {
                    "kind": "accuracy",
                    "title": "Perplexity",
                    "suites": ["held-out"],
                    "rows": [*rows, {**row, "method": "svd-llm", "tuning": "scales"}],
                },
                "table_2": {"kind": "allocations", "title": "Ranks", "rows": rows[1:]},
                "table_3": {"kind": "statistics", "title": "Sizes", "suites": ["cost"], "rows": rows[:2]},
            },
        }
    )
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    arguments = [
        *("--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)),
        *("--configfile", str(folder / "study.yaml"), "--profile", str(ROOT / "profiles/local")),
    ]
    done = warm.run(arguments, os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stdout
    return folder / "results/mixture"


def test_experts_with_few_tokens_are_named_from_the_statistics_to_the_checkpoints(run: Path) -> None:
    named = json.loads((run / "statistics/mixture/c8/manifest.json").read_text())["experts_left_dense"]
    assert 0 < len(named) < 8
    assert all(count < LEAST for count in named.values())
    for method in PAIRS:
        folder = run / f"compressed/mixture/{method}/20/seed0"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["experts_left_dense"] == named
        assert 0.78 < manifest["kept"]["linears"] <= 0.8
        dense = {name for name, rank in manifest["ranks"].items() if rank is None}
        assert {f"{expert}.{each}_proj" for expert in named for each in ("gate", "up", "down")} <= dense
        model = load_checkpoint(folder / "checkpoint", torch.float32)
        for expert in named:
            assert type(model.get_submodule(f"{expert}.gate_proj")) is torch.nn.Linear
    logs = (run / "logs/collect_statistics/mixture/c8.log").read_text()
    assert all(f"{name} got {count} tokens, fewer than {LEAST}" in logs for name, count in named.items())


def test_the_tables_hold_perplexities_ranks_and_sizes(run: Path) -> None:
    perplexities = pd.read_csv(run / "tables/table_1.csv")
    assert len(perplexities) == 5
    assert perplexities.filter(like="perplexity").notna().all(axis=None)
    ranks = pd.read_csv(run / "tables/table_2.csv", dtype=str)
    of_bolaco = ranks[ranks["method"] == "bolaco"]
    assert of_bolaco["rank_gate"].str.fullmatch(r"\d+(–NA)?").all()  # one rank, but where an expert is left dense
    statistics = pd.read_csv(run / "tables/table_3.csv")
    assert len(statistics) == 2

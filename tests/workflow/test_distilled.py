"""Through the real rules: a row that is distilled stands in a table beside the row that it began with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from lowrank.files import read_json
from tests import tiny_study
from tests.warm import ENVIRONMENT, REPOSITORY, Warm

RUN = "results/tiny"
TABLE = f"{RUN}/tables/table_1.csv"


def study(folder: Path) -> dict[str, Any]:
    """The tiny study, of which two rows are left: plain SVD at 20 %, and the same distilled."""
    content = tiny_study.config(folder)
    row = {"model": "tiny", "method": "svd", "ratio": 20, "tolerance": 4}
    table = {"kind": "accuracy", "title": "Distilled", "suites": ["held-out"]}
    distilled = {"kind": "feature-distillation", "calibration": "c8", "learning_rate": 0.001, "batch_size": 2}
    return {
        **content,
        "models": {"tiny": content["models"]["tiny"]},
        "tuning": {"distilled": {**distilled, "epochs": 3, "validation_windows": 2, "evaluate_every": 3}},
        "tables": {"table_1": {**table, "rows": [row, {**row, "tuning": "distilled"}]}},
        "figures": {},
    }


@pytest.mark.slow
def test_a_distilled_row_has_its_numbers_and_its_curves(tmp_path: Path, warm: Warm) -> None:
    """The training itself is started as a user starts it, by an interpreter that has loaded nothing."""
    tiny_study.write_inputs(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study(tmp_path), sort_keys=False))
    options = [
        "--snakefile",
        str(REPOSITORY / "Snakefile"),
        "--configfile",
        str(tmp_path / "tiny.yaml"),
        "--cores",
        "1",
    ]
    options += ["--directory", str(tmp_path)]
    folder = tmp_path / "results/tiny/tuned/tiny/svd/20/distilled/seed0"
    compressed = f"{RUN}/compressed/tiny/svd/20/seed0/manifest.json"
    before = warm.run([*options, compressed, f"{RUN}/calibration/tiny/c8.safetensors"], os.environ | ENVIRONMENT)
    assert before.returncode == 0, before.stdout
    typed = [sys.executable, "-m", "snakemake", *options, str(folder.relative_to(tmp_path) / "manifest.json")]
    run = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    after = warm.run([*options, TABLE], os.environ | ENVIRONMENT)
    assert after.returncode == 0, after.stdout
    rows = pd.read_csv(tmp_path / TABLE).set_index("tuning")
    assert list(rows.index) == ["none", "distilled"]
    perplexities = rows[[f"{corpus}_perplexity" for corpus in ("test-a", "test-b", "test-c")]]
    assert not perplexities.isna().any(axis=None)
    assert (perplexities.loc["none"] != perplexities.loc["distilled"]).all()
    assert rows.loc["none", "kept_percent"] == rows.loc["distilled", "kept_percent"]
    manifest = read_json(folder / "manifest.json")
    beginning = read_json(tmp_path / compressed)
    assert (manifest["ranks"], manifest["kept"]) == (beginning["ranks"], beginning["kept"])
    assert list(manifest["training"]["blocks"]) == ["0", "1"]
    assert manifest["training"]["steps"] == 2 * 9, "6 windows, 2 a step, 3 times, in two blocks"
    assert not list((tmp_path / "results/tiny/.state").glob("*"))
    log = (tmp_path / "results/tiny/logs/distil_features/tiny/svd/20/distilled/seed0.log").read_text()
    assert "block 2 of 2: loss of held-out windows" in log

"""docs/adding_a_method.md does what it says: its file and its preset make a working method."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs/adding_a_method.md").read_text(encoding="utf-8")

USE = """
import json, torch, yaml
from tests import tiny, tiny_study
from lowrank.ranks.budget import Budget
from lowrank.compression.compress import compress_model
from lowrank.model.parameters import count_parameters
from lowrank.config.sources import ModelShape
from lowrank.config.study import Study

(name, preset), = yaml.safe_load(PRESET)["methods"].items()
config = tiny_study.config(FOLDER) | {"methods": {name: preset}, "tables": {}, "figures": {}}
plain = Study.model_validate(config).method(name)
torch.manual_seed(0)
model, shape = tiny.model(KIND), ModelShape.model_validate(tiny.shape(KIND))
ids = torch.arange(12)[None]
before = model(ids).logits
ranks = compress_model(plain.kind, plain.plain(), {"model": model, "budget": Budget.of(shape), "ratio": 40, "seed": 0})
counts = count_parameters(model, shape)
print(json.dumps({
    "removed": 1 - counts["decoder_linears"] / counts["decoder_linears_dense"],
    "changed": float((model(ids).logits - before).abs().max()),
    "ranks": sum(rank is not None for rank in ranks.values()),
    "random": plain.is_random,
}))
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the library in which the page's file is saved."""
    scripts = tmp_path / "workflow_scripts"
    shutil.copytree(REPOSITORY / "workflow_scripts", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (place,) = re.findall(r"Save this as `(workflow_scripts/\S+\.py)`", PAGE)
    target = tmp_path / place
    target.write_text(code, encoding="utf-8")
    return scripts


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_the_page_adds_a_method_by_one_file_and_one_preset(copied: Path, kind: str) -> None:
    (preset,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    names = f"from pathlib import Path\nPRESET, FOLDER, KIND = {preset!r}, Path({str(copied)!r}), {kind!r}\n"
    run = subprocess.run(
        [sys.executable, "-c", names + USE],
        env={**os.environ, "PYTHONPATH": f"{copied}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert 0.4 <= result["removed"] < 0.45
    assert result["changed"] > 0
    assert result["ranks"] > 0
    assert result["random"]

"""Through the real rules: text that calibration has seen under another name stops a study, and other text does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests import tiny, tiny_study
from tests.workflow.clones import REPOSITORY

COMPARED = "results/tiny/compared_texts.json"


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run in a folder with `tiny.yaml`."""
    options = ["--snakefile", str(REPOSITORY / "Snakefile"), "--configfile", "tiny.yaml", "--cores", "1"]
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *options, "--directory", str(folder), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def study(folder: Path) -> dict[str, Any]:
    """The tiny study with its texts; the model is not needed."""
    for offset, name in enumerate(("calibration", "validation", "test-a", "test-b", "test-c")):
        rows = [{"text": tiny.text(100 * offset + index, 120)} for index in range(4)]
        tiny_study.write_lines(folder / f"{name}.jsonl", rows)
    return tiny_study.config(folder)


def test_a_copy_of_the_calibration_text_stops_the_study(tmp_path: Path) -> None:
    content = study(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    first = snakemake(tmp_path, COMPARED)
    assert first.returncode == 0, first.stdout + first.stderr
    assert all(pair["shared"] == 0 for pair in json.loads((tmp_path / COMPARED).read_text())["pairs"])

    shutil.copy(tmp_path / "calibration.jsonl", tmp_path / "test-b.jsonl")
    second = snakemake(tmp_path, COMPARED)
    assert second.returncode == 1
    said = second.stdout + second.stderr
    assert "suites.held-out.corpora[1]: 4 of the 4 documents of 'test-b' are in 'calibration' too, which" in said
    assert "calibration.c8 reads; one begins" in said
    assert "Traceback" not in said
    assert not (tmp_path / COMPARED).exists()

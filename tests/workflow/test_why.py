"""`make why` for a target that is none: one line says so, and what may have been meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflow.clones import REPOSITORY

RUN = "results/quickstart"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            "table_1",
            "nothing makes it in this study - did you mean results/quickstart/tables/table_1.md, "
            "results/quickstart/tables/table_1.tex, results/quickstart/tables/table_1.csv?",
        ),
        (f"{RUN}/tables/table_3.csv", f"nothing makes it in this study - did you mean {RUN}/tables/table_"),
        (f"{RUN}/truncations/figure_1/naive.json", f"nothing makes it in this study - did you mean {RUN}/"),
        (
            f"{RUN}/tuned/smollm2-135m/svd/20/none/seed0/manifest.json",
            f"nothing makes it in this study - did you mean {RUN}/compressed/smollm2-135m/svd/20/seed0/manifest.json",
        ),
        ("make_table", "a rule for many results; name one of them, or `all`, `data` or `checkpoints`"),
        ("xyz", "nothing makes it in this study; targets are `all`, `data`, `checkpoints` and files of the results"),
    ],
)
def test_a_target_that_is_none(target: str, says: str, tmp_path: Path) -> None:
    script = [sys.executable, "workflow_scripts/why.py", target]
    command = [*script, "--configfile", "config/quickstart.yaml", "--cores", "1", "--directory", str(tmp_path)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert not run.stdout
    said = run.stderr.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"{target}: {says}")


def test_the_report_is_all_that_is_printed(tmp_path: Path) -> None:
    command = [sys.executable, "workflow_scripts/why.py", "data", "--configfile", "config/quickstart.yaml"]
    options = ["--cores", "1", "--directory", str(tmp_path)]
    run = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "jobs would run." in run.stdout.splitlines()[0]
    wrong = subprocess.run([*command, "--no-such"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert wrong.returncode
    assert "unrecognized arguments: --no-such" in wrong.stderr

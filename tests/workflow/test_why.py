"""`make why` for a target that is none: one line says so, and what may have been meant."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.clones import REPOSITORY, pool

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
    config = ("--configfile", "config/quickstart.yaml", "--cores", "1")
    with pool() as processes:
        ended = processes.submit(why, tmp_path, target, *config, "--directory", str(tmp_path)).result()
    assert ended == 1
    assert not (tmp_path / "out").read_text()
    said = (tmp_path / "err").read_text().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"{target}: {says}")


def why(folder: Path, *arguments: str) -> int:
    """The command, in a process of its own; what it says goes into two files. Returns its exit code."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(REPOSITORY)
    sys.argv = ["why.py", *arguments]
    try:
        runpy.run_path("workflow_scripts/why.py", run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr, flush=True)
        return int(bool(ended.code))
    finally:
        sys.stdout.flush()
    return 0


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    gone = "~/gone"
    command = [sys.executable, "workflow_scripts/why.py", "data", "--directory", gone, "--cores", "1"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | {"HOME": str(tmp_path)}}
    run = subprocess.run(command, cwd=REPOSITORY, check=False, **options)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"{tmp_path}/gone: there is no such folder; name the one of a run's results\n"
    assert not (tmp_path / "gone").exists()
    assert not (REPOSITORY / gone).exists()


def test_the_report_is_all_that_is_printed(tmp_path: Path) -> None:
    command = [sys.executable, "workflow_scripts/why.py", "data", "--configfile", "config/quickstart.yaml"]
    options = ["--cores", "1", "--directory", str(tmp_path)]
    run = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "jobs would run." in run.stdout.splitlines()[0]
    wrong = subprocess.run([*command, "--no-such"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert wrong.returncode
    assert "unrecognized arguments: --no-such" in wrong.stderr

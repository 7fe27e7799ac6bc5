"""The line of progress around Snakemake, as a user types it, on a workflow of its own that needs no model."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.warm import REPOSITORY

RULES = """
rule all:
    input: "results/x/b"

rule first:
    output: "results/x/a"
    log: "results/x/logs/first.log"
    shell: "echo chatter of a job; {first}"

rule second:
    input: "results/x/a"
    output: "results/x/b"
    log: "results/x/logs/second.log"
    shell: "touch {{output}}"
"""
FAILS = "echo '12:00:00 ERROR first: model.json: damaged. Fetch it again.' > {log}; exit 3"


def command(folder: Path, *more: str) -> Sequence[str]:
    script = str(REPOSITORY / "workflow_scripts/run.py")
    return [sys.executable, script, "--directory", str(folder), "--snakefile", str(folder / "Snakefile"), *more]


def run(folder: Path, first: str, *more: str) -> tuple[int, str, str]:
    """Exit code, what is shown, and the log."""
    (folder / "Snakefile").write_text(RULES.format(first=first))
    done = subprocess.run(command(folder, "--cores", "1", *more), capture_output=True, text=True, check=False)
    assert not done.stdout
    log = Path(done.stderr.splitlines()[0].removeprefix("log: "))
    assert log.parent == folder / ".snakemake/log"
    return done.returncode, done.stderr, log.read_text()


def test_a_run_is_few_lines_and_all_else_is_in_the_log(tmp_path: Path) -> None:
    code, shown, log = run(tmp_path, "touch {output}")
    assert code == 0
    lines = shown.splitlines()
    assert [line.partition(" |")[0] for line in lines[1:3]] == ["1 of 2 steps", "2 of 2 steps"]
    assert lines[3].startswith("2 steps done in ")
    assert len(lines) == 4
    assert "chatter of a job" in log
    assert "Finished jobid" in log
    code, shown, log = run(tmp_path, "touch {output}")
    assert (code, shown.splitlines()[1:]) == (0, ["nothing to be done"])


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--dry-run", "This was a dry-run"),
        ("--list-rules", "second"),
        ("--summary", "results/x/b"),
        ("--dag", "digraph"),
    ],
)
def test_what_only_answers_is_shown(option: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(RULES.format(first="touch {output}"))
    done = subprocess.run(command(tmp_path, "--cores", "1", option), capture_output=True, text=True, check=True)
    assert answer in done.stdout + done.stderr
    assert "nothing to be done" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_on_a_terminal_there_is_one_line_and_nothing_of_snakemake(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(RULES.format(first="sleep 3; touch {output}"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(tmp_path, "--cores", "1"), stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # of a terminal that nobody holds any more
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "0 of 2 steps | first | " in text
    assert "2 steps done in " in text
    assert not any(words in text for words in ("chatter of a job", "Finished jobid", "Job stats", "localrule"))


def test_paths_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[old]"
    folder.mkdir()
    code, shown, _ = run(folder, "touch {output}", "--configfile", "[/no].yaml")
    assert code == 1
    assert "[/no].yaml" in shown


def test_an_error_is_shown_with_the_jobs_own_words_and_the_exit_code_is_snakemakes(tmp_path: Path) -> None:
    code, shown, log = run(tmp_path, FAILS)
    assert code == 1
    lines = shown.splitlines()
    assert lines[1] == "failed first: model.json: damaged. Fetch it again."
    assert lines[2] == f"    log: {tmp_path}/results/x/logs/first.log"
    assert lines[3].startswith("stopped after ")
    assert "0 of 2 steps done; log: " in lines[3]
    assert len(lines) == 4
    assert "message: model.json: damaged. Fetch it again." in log
    assert "message: None" not in log


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("nowhere",), "No rule to produce nowhere"), (("--configfile", "no.yaml"), "No such file or directory")],
)
def test_an_error_before_the_first_job_is_shown(tmp_path: Path, arguments: Sequence[str], says: str) -> None:
    code, shown, _ = run(tmp_path, "touch {output}", *arguments)
    assert code == 1
    assert says in shown


def test_a_wrong_option_is_snakemakes_to_tell(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "--coers", "1"), capture_output=True, text=True, check=False)
    theirs = [sys.executable, "-m", "snakemake", "--coers", "1"]
    assert done.returncode == subprocess.run(theirs, capture_output=True, check=False).returncode == 2


def test_ctrl_c_ends_the_jobs_too(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(RULES.format(first="echo $$ > process; exec sleep 100"))
    process = subprocess.Popen(
        command(tmp_path, "--cores", "1"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    file = tmp_path / "process"
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped after " in shown
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)

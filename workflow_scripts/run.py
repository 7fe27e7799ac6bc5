"""Snakemake with one line of progress: `python workflow_scripts/run.py ARGUMENTS`, with the arguments of Snakemake.

All that Snakemake and its jobs say goes to a log file, whose path is printed. The terminal shows how far the study is,
and errors at once. Where there is no terminal, it prints a line for each tenth of the steps, and every two minutes.
Snakemake runs in this process, so signals reach it as ever, and its exit code is that of this command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import snakemake.cli
from rich.console import Console
from rich.live import Live
from rich.text import Text
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

sys.path.insert(0, str(Path(__file__).parent))
from lowrank.errors import RankwiseError
from lowrank.jobs.gpus import usable_gpus
from lowrank.jobs.log_file import ending
from lowrank.jobs.record import LOGS
from lowrank.layout import study_of
from lowrank.progress.course import Course, planned_seconds
from lowrank.progress.words import WITHOUT_A_WORD, duration, named

TARGETS = ("all", "data", "checkpoints", "total")
"""What Snakemake counts beside jobs."""
ANSWERS = (
    *("dryrun", "summary", "detailed_summary", "list_rules", "list_target_rules", "list_changes", "list_untracked"),
    *("dag", "rulegraph", "filegraph", "d3dag", "lint", "print_compilation", "unlock"),
)
"""Options by which Snakemake runs no job and prints an answer."""
LINES = 10
"""Printed in the course of a run where there is no terminal, for the steps that are done."""
SILENT = 120.0
"""Seconds after which, where there is no terminal, a line says that the run goes on."""
FAILED_ONCE_MORE = (
    "CalledProcessError in file",
    "Exiting because a job execution failed.",
    "At least one job did not complete successfully.",
)
"""What Snakemake says of a job that has failed, beside its own event for that."""
TAIL = 20


class Watch(logging.Filter):
    """Follows what Snakemake logs, and shows it; lets all records through, to the log file."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.course = Course()
        self.told = False
        self.tenths = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true; a mistake in here must not end the study, so it goes to the log."""
        try:
            self._follow(record)
        except Exception:
            traceback.print_exc()
        return True

    def _follow(self, record: logging.LogRecord) -> None:
        given = record.__dict__
        match given.get("event"):
            case LogEvent.RUN_INFO:
                self.course.will_run({rule: count for rule, count in given["stats"].items() if rule not in TARGETS})
            case LogEvent.JOB_INFO if given["rule_name"] not in TARGETS:
                wildcards = {name: str(value) for name, value in (given["wildcards"] or {}).items()}
                self.course.starts(given["jobid"], given["rule_name"], wildcards)
                self._plan(str(given["log"][0]) if given["log"] else "")
            case LogEvent.JOB_FINISHED:
                self.course.ends(given["job_id"])
                self._line()
            case LogEvent.JOB_ERROR:
                self._error(record)
            case LogEvent.ERROR | None if record.levelno >= logging.ERROR and record.msg:
                said = record.getMessage()
                if not any(words in said for words in FAILED_ONCE_MORE):
                    self._say(Text(said, style="red"))

    def _plan(self, log: str) -> None:
        """Learn what jobs are expected to take, from the config that the run has left beside its logs."""
        if not self.course.plan and LOGS in log:
            with contextlib.suppress(RankwiseError):  # without it, no time left is told
                study = study_of(Path(log.partition(LOGS)[0]))
                self.course.plan = planned_seconds(study, gpu=bool(usable_gpus(os.environ)))

    def _error(self, record: logging.LogRecord) -> None:
        """Show the job's own error; Snakemake's block of a failed job has it as its message, too."""
        said = record.__dict__
        job = self.course.running.get(said["jobid"])
        self.course.ends(said["jobid"], well=False)
        logs = [Path(log) for log in said["log"]]
        end = ending(logs[0]) if logs else None
        error = (end.error if end else "") or WITHOUT_A_WORD
        if said.get("rule_msg") is None:
            record.rule_msg = error
        what = named(said["rule_name"], job.wildcards if job else {})
        self._say(Text.assemble(("failed", "bold red"), f" {what}: {error}"))
        for log in logs:
            self._say(Text(f"    log: {log.absolute()}"))

    def _say(self, text: Text) -> None:
        self.told = True
        self.console.print(text, soft_wrap=True)

    def _line(self) -> None:
        """Where there is no terminal, a line for each tenth of the steps."""
        tenths = LINES * self.course.done // max(1, self.course.total)
        if tenths > self.tenths and not self.console.is_terminal:
            self.tenths = tenths
            self.console.print(str(self.course), soft_wrap=True)

    def __rich__(self) -> Text:
        return Text(str(self.course) if self.course.total else "planning", overflow="ellipsis", no_wrap=True)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[Console]:
    """Send all output of this process and of those that it starts to a file; yields what writes to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with log.open("ab") as stream, os.fdopen(os.dup(before[1]), "w", encoding="utf-8") as terminal:
        try:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            yield Console(file=terminal, highlight=False, markup=False)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in enumerate(before, start=1):
                os.dup2(old, number)
                os.close(old)


@contextlib.contextmanager
def spoken(watch: Watch, console: Console) -> Iterator[None]:
    """Print the line of progress now and then, for a run that nobody watches."""
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(SILENT):
            if watch.course.total:
                console.print(str(watch.course), soft_wrap=True)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def live(watch: Watch, console: Console) -> contextlib.AbstractContextManager[object]:
    """What keeps the line of progress up to date, if there is a terminal; else what prints it now and then."""
    if not console.is_terminal:
        return spoken(watch, console)
    # Without redirection: what this process prints goes to the log, not above the line.
    return Live(
        watch, console=console, refresh_per_second=1, transient=True, redirect_stdout=False, redirect_stderr=False
    )


def log_file(directory: str | None) -> Path:
    """Where the output goes: beside the logs that Snakemake writes by itself."""
    folder = Path(directory or ".").absolute() / ".snakemake/log"
    return folder / f"{time.strftime('%Y-%m-%dT%H%M%S')}.{os.getpid()}.rankwise.log"


def run(arguments: Sequence[str]) -> int:
    """Run Snakemake; returns its exit code."""
    options, _ = snakemake.cli.get_argument_parser().parse_known_args(list(arguments))
    sys.argv = ["snakemake", *arguments]  # the rules look targets up in it
    if any(getattr(options, name) not in (None, False) for name in ANSWERS):
        snakemake.cli.main(list(arguments))  # ends this process
    return run_with_progress(arguments, log_file(options.directory))


def run_with_progress(arguments: Sequence[str], log: Path) -> int:
    """Run Snakemake, with all that it says in a log file; returns its exit code."""
    with output_to(log) as console:
        console.print(f"log: {log}", soft_wrap=True)
        watch = Watch(console)
        logger.addFilter(watch)
        try:
            with live(watch, console):
                snakemake.cli.main(list(arguments))
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            logger.removeFilter(watch)
        spent, course = duration(watch.course.clock() - watch.course.began), watch.course
        if code:
            if not watch.told:
                console.print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:], sep="\n")
            console.print(
                f"stopped after {spent}, {course.done} of {course.total} steps done; log: {log}", soft_wrap=True
            )
        else:
            console.print(
                f"{course.done} steps done in {spent}" if course.done else "nothing to be done", soft_wrap=True
            )
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

"""What would run, and why, in plain words: `python workflow_scripts/why.py [TARGET...] [--configfile FILE] [...]`.

Takes the arguments of Snakemake, whose dry run it explains; nothing is run or written. `make why` calls it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import snakemake.cli
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

sys.path.insert(0, str(Path(__file__).parent))
from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.jobs.record import record_file
from lowrank.reruns.reasons import Planned, explained


class _Jobs(logging.Filter):
    """Keeps what Snakemake logs of the jobs that it plans, and lets only warnings and errors through."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Planned] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        job = record.__dict__
        if job.get("event") == LogEvent.JOB_INFO:
            wildcards = {name: str(value) for name, value in (job["wildcards"] or {}).items()}
            output = tuple(map(str, job["output"]))
            commit = _commit(str(job["log"][0]) if job["log"] else "")
            made = any(map(os.path.exists, output))
            self.found.append(Planned(job["rule_name"], wildcards, str(job["reason"]), output, commit, made))
        return record.levelno >= logging.WARNING


def planned(arguments: list[str]) -> list[Planned]:
    """The jobs of a dry run, in Snakemake's order; ends the program where Snakemake does."""
    jobs = _Jobs()
    logger.addFilter(jobs)
    try:
        with _where_it_was():
            snakemake.cli.main([*arguments, "--dry-run"])
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        logger.removeFilter(jobs)
    return jobs.found


def _commit(log: str) -> str:
    """The commit of the code that made what a job would make again; nothing if that is not known."""
    path = record_file(log)
    if path is None or not path.is_file():
        return ""
    try:
        found = str(read_record(path)["git"]["commit"])
    except RankwiseError:  # a damaged record: the reason is told without it
        return ""
    return "" if found == "unknown" else found


@contextlib.contextmanager
def _where_it_was() -> Iterator[None]:
    """Snakemake changes the working directory."""
    place = os.getcwd()
    try:
        yield
    finally:
        os.chdir(place)


if __name__ == "__main__":
    print(explained(planned(sys.argv[1:])))

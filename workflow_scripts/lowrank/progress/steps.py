"""The jobs of a run, and what has become of each: read off its locks, logs and records."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lowrank.cluster.planned_jobs import Job, planned_jobs
from lowrank.config.study import Study
from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.jobs.lock import SINCE, Fate, Holder, fate_of, read_lock
from lowrank.jobs.log_file import ending
from lowrank.jobs.record import record_file
from lowrank.layout import Layout

WITHOUT_LOCKS = {"logs", "records", ".state"}
"""Folders of a run that may be large, and hold no lock."""


HEAD = "head"
"""What a start of Snakemake is called beside rules."""


class State(Enum):
    """What has become of a job."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"
    MISSING = "missing"


@dataclass(frozen=True)
class Step:
    """A job of a study.

    Attributes:
        job: its rule and wildcards.
        state: what has become of it. `STOPPED`: it was killed, or has lost its machine.
        log: its log, which is there once it has begun.
        seconds: it took, or has taken so far; None if that is not known.
        error: of a job that failed, in one line.
    """

    job: Job
    state: State
    log: Path
    seconds: float | None = None
    error: str = ""


def steps_of(study: Study, root: Path) -> list[Step]:
    """All jobs of a study, each after those that it waits for.

    Args:
        study: its config.
        root: the folder that `results` is in.
    """
    layout = Layout(study)
    holders = {holder.log: holder for _, holder in _locks(root / layout.run)}
    return [_step(job, layout.log(job.rule, job.wildcards), holders, root) for job in planned_jobs(study)]


def refuse_while_jobs_run(run: str | Path) -> None:
    """See that no job of an earlier start is at work.

    Snakemake deletes the outputs of a job that it starts before that can look at a lock, and once more when it fails.

    Args:
        run: the folder of the run's results.

    Raises:
        RankwiseError: some are, or it cannot be told; each is named.
    """
    me, at_work = Holder.here(HEAD), []
    for path, holder in _locks(Path(run)):
        fate, why = fate_of(holder, me)
        if fate in (Fate.RUNS, Fate.UNKNOWN):
            at_work.append(f"  {path}: {holder}: {why}")
    if at_work:
        listed = "\n".join(sorted(at_work))
        raise RankwiseError(
            f"jobs of an earlier start may still write to {run}, by these locks:\n{listed}\nWait until they have "
            "ended, or end them (`scancel` or `kill` their number), and run again. If you know that a job has ended, "
            "delete its lock."
        )


def refuse_beside_another_start(frozen: str | Path) -> None:
    """See that no other start works on a run: its waiting jobs would find the config of this one.

    Args:
        frozen: the config that starts leave for their jobs.

    Raises:
        RankwiseError: its process runs on this machine.
    """
    try:
        head = Holder(**read_record(frozen)["head"])
    except (RankwiseError, KeyError, TypeError):  # there was none, or one of another version
        return
    if head.process != os.getpid() and fate_of(head, Holder.here(HEAD))[0] is Fate.RUNS:
        raise RankwiseError(
            f"another start works on this run (process {head.process} on {head.host}, since {head.since}): let it end, "
            "or end it, and run again"
        )


def _step(job: Job, name: str, holders: dict[str, Holder], root: Path) -> Step:
    log = root / name
    if (holder := holders.get(name)) and fate_of(holder, Holder.here("status"))[0] is not Fate.GONE:
        return Step(job, State.RUNNING, log, _seconds_since(holder))
    end = ending(log)
    if end and end.error:
        return Step(job, State.FAILED, log, error=end.error)
    if _is_made(name, root) and (end is None or end.seconds is not None):
        return Step(job, State.DONE, log, end.seconds if end else None)
    if end and end.seconds is None:
        return Step(job, State.STOPPED, log)
    return Step(job, State.MISSING, log)


def _is_made(log: str, root: Path) -> bool:
    """Whether a job has left its record, and all that this names is there."""
    record = root / (record_file(log) or "")
    if not record.is_file():
        return False
    try:
        return all((root / path).exists() for path in read_record(record)["outputs"])
    except RankwiseError:  # a damaged record, of which no result depends
        return False


def _locks(run: Path) -> Iterator[tuple[Path, Holder]]:
    """The locks of a run, and who holds them."""
    for folder, inner, files in os.walk(run):
        if Path(folder) == run:  # below it, a model may have any of these names
            inner[:] = [name for name in inner if name not in WITHOUT_LOCKS]
        for name in files:
            if name.startswith(".") and name.endswith(".lock") and (holder := read_lock(Path(folder) / name)):
                yield Path(folder) / name, holder


def _seconds_since(holder: Holder) -> float:
    return max(0.0, time.time() - time.mktime(time.strptime(holder.since, SINCE)))

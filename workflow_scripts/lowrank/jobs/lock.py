"""No two jobs write one result: while a job runs, a file beside its first output says who writes it.

Snakemake locks its folder against a second head, but it does not know the jobs that a killed head has left in the
cluster's queue. So each stage takes a lock of its own, `.<output>.lock`, and gives it back at its end, also after an
error. A job that was killed leaves its lock behind. The next one takes it over only where its holder is provably gone:
its process on this machine has ended, or SLURM says that its job has. Otherwise it stops and says who holds the lock.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from lowrank.errors import RankwiseError
from lowrank.files import write_error

ENDED = frozenset(
    [
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    ]
)
"""States of SLURM's jobs that write nothing any more, and will not."""
ENDING = "COMPLETING"
SINCE = "%Y-%m-%d %H:%M:%S"
PATIENCE = 120.0
"""Seconds to wait for a holder that is ending."""


class Fate(Enum):
    """What is known of the holder of a lock."""

    RUNS = "runs"
    ENDING = "is ending"
    GONE = "is gone"
    UNKNOWN = "cannot be told"


@dataclass(frozen=True)
class Holder:
    """A job that writes a result, as its lock tells.

    Attributes:
        token: differs for each job that ever takes a lock.
        boot, namespace: of the machine and of its numbers of processes; empty where the system does not tell.
        started: when the process was started, in the system's ticks, so that its number is not mistaken for another's.
        job, restarts, cluster: SLURM's job, how often SLURM has started it anew (-1: it does not say), and where;
            empty without SLURM.
        since: when the lock was taken, for people.
        log: of the job; empty if it has none.
    """

    token: str
    rule: str
    host: str
    boot: str
    namespace: str
    process: int
    started: str
    job: str
    restarts: int
    cluster: str
    since: str
    log: str = ""

    @classmethod
    def here(cls, rule: str, log: str = "") -> Holder:
        """This process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return cls(
            token=uuid.uuid4().hex,
            rule=rule,
            host=socket.gethostname(),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            namespace=_link("/proc/self/ns/pid"),
            process=os.getpid(),
            started=process_start(os.getpid()) or "",
            job=job,
            restarts=_restarts(job) if job else 0,
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
            since=time.strftime(SINCE),
            log=log,
        )

    def __str__(self) -> str:
        slurm = f"SLURM job {self.job}, " if self.job else ""
        return f"{slurm}{self.rule}, process {self.process} on {self.host}, since {self.since}"


def lock_path(output: str | Path) -> Path:
    """The lock of a job with this first output."""
    return Path(output).with_name(f".{Path(output).name}.lock")


@contextmanager
def output_lock(outputs: Iterable[str | Path], rule: str, log: str = "") -> Iterator[str]:
    """Hold the lock of a job's outputs.

    Args:
        outputs: its files and folders; the lock lies beside the first.
        rule, log: of the job, for who reads the lock.

    Yields:
        Whose lock was taken over, and why; empty if nobody's.

    Raises:
        RankwiseError: another job holds it, or may; the message says who, and what to do.
    """
    first = next(iter(outputs), None)
    if first is None:
        yield ""
        return
    with _held(lock_path(first), Holder.here(rule, log), str(first)) as found:
        yield found


@contextmanager
def _held(path: Path, me: Holder, result: str) -> Iterator[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _take(path, me, result)
    except OSError as error:
        raise write_error(Path(result), error) from error
    try:
        yield found
    finally:
        if read_lock(path) == me:
            path.unlink(missing_ok=True)


def _take(path: Path, me: Holder, result: str) -> str:
    """Create the lock or take it over; whose it was."""
    deadline = time.monotonic() + PATIENCE
    while not _create(path, me):
        holder = read_lock(path)
        if holder is None:  # it was given back just now
            time.sleep(0.05)
            continue
        if holder == me:  # over NFS, the answer to a link that was made may be lost
            break
        fate, why = fate_of(holder, me)
        if fate is Fate.ENDING and time.monotonic() < deadline:
            time.sleep(5)
        elif fate is not Fate.GONE:
            raise RankwiseError(_refusal(result, path, holder, fate, why))
        elif _replace(path, holder, me, result):
            return f"taking over the lock {path} of a job that is gone ({holder}): {why}"
    return ""


def _create(path: Path, me: Holder) -> bool:
    """Put the lock there, with its content at once; whether there was none."""
    temporary = _beside(path, me)
    try:
        _write(temporary, me)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: the lock is empty for a moment
            return _create_by_opening(path, me)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_by_opening(path: Path, me: Holder) -> bool:
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    try:
        _write(path, me)
    except OSError:
        path.unlink()
        raise
    return True


def _replace(path: Path, gone: Holder, me: Holder, result: str) -> bool:
    """Take over the lock of a holder that is gone; whether it was still its.

    Of several jobs that find the same lock, the one that holds a second lock, of this holder's token, may replace it.
    """
    with _held(path.with_name(f"{path.name}.{gone.token}"), me, result):
        if read_lock(path) != gone:
            return False
        temporary = _beside(path, me)
        _write(temporary, me)
        os.replace(temporary, path)
        return True


def _beside(path: Path, me: Holder) -> Path:
    return path.with_name(f"{path.name}-{me.token}")


def _write(path: Path, me: Holder) -> None:
    path.write_text(json.dumps(asdict(me), indent=1), encoding="utf-8")


def read_lock(path: Path) -> Holder | None:
    """Who holds a lock; None if nobody.

    Raises:
        RankwiseError: the file is no lock.
    """
    for last in (False, False, True):
        try:
            return Holder(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            if last:
                raise RankwiseError(
                    f"{path}: this lock cannot be read ({error}). If no job writes the file beside it, delete the lock "
                    "and run again."
                ) from error
            time.sleep(0.5)  # it may be empty for a moment
    return None


def _refusal(result: str, path: Path, holder: Holder, fate: Fate, why: str) -> str:
    end = f"`scancel {holder.job}`" if holder.job else f"`kill {holder.process}` on {holder.host}"
    if fate is Fate.UNKNOWN:
        cure = f"If you know that it has ended, delete {path} and run again; otherwise end it first ({end})"
    else:
        cure = f"Wait until it has ended, or end it ({end}), and run again"
    return f"{result}: another job writes it ({holder}), and two must never write one result: {why}. {cure}."


# --- whether the holder still runs ---


def fate_of(holder: Holder, me: Holder) -> tuple[Fate, str]:
    """What is known of a lock's holder, and why."""
    if holder.host == me.host:
        if holder.boot != me.boot:
            return Fate.GONE, f"{me.host} has been started anew since"
        if holder.namespace == me.namespace:
            return _fate_of_process(holder)
    if not holder.job:
        return Fate.UNKNOWN, f"from {me.host} it cannot be told whether the process still runs"
    if holder.cluster != (cluster := me.cluster or _cluster_here()):
        return Fate.UNKNOWN, f"it is a job of the cluster {holder.cluster or '?'}, and this is {cluster or 'none'}"
    if holder.job == me.job:
        if -1 < holder.restarts < me.restarts:
            return Fate.GONE, "SLURM has ended the job there and started it anew"
        if -1 in (holder.restarts, me.restarts):
            return Fate.UNKNOWN, "scontrol did not say whether SLURM has started this job anew"
        return Fate.RUNS, "it is a part of this same job"
    return _fate_of_job(holder.job)


def _fate_of_process(holder: Holder) -> tuple[Fate, str]:
    started = process_start(holder.process)
    if started is None:
        return Fate.GONE, f"process {holder.process} has ended"
    if started and holder.started and started != holder.started:
        return Fate.GONE, f"process {holder.process} has ended, and its number was given to another"
    return Fate.RUNS, "its process still runs"


def process_start(process: int) -> str | None:
    """When a process of this machine was started, in ticks; empty if the system does not tell, None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:  # also of another user's, if /proc hides them (`hidepid`)
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    except ProcessLookupError:  # it has ended between opening and reading
        return None
    return None if fields[0] in "ZX" else fields[19]


def _fate_of_job(job: str) -> tuple[Fate, str]:
    """What SLURM says of a job."""
    said = _slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    if said is None:
        return Fate.UNKNOWN, "squeue is not installed here, or does not answer"
    code, output, errors = said
    if code and "Invalid job id" not in errors:
        return Fate.UNKNOWN, f"squeue cannot tell ({errors or output})"
    states = set(output.split()) if not code else set()
    if states <= ENDED:
        return Fate.GONE, f"SLURM says {', '.join(sorted(states)) or 'that it does not know the job any more'}"
    if states <= ENDED | {ENDING}:
        return Fate.ENDING, f"SLURM says {ENDING}"
    return Fate.RUNS, f"SLURM says {', '.join(sorted(states - ENDED))}"


def _restarts(job: str) -> int:
    """How often SLURM has started a job anew, -1 if it does not say.

    SLURM's own variable for it does not reach the step that Snakemake starts in a job.
    """
    code, output, _ = _slurm("scontrol", "show", "job", job) or (1, "", "")
    found = re.search(r"\bRestarts=(\d+)", output)
    return int(found[1]) if found and not code else -1


def _cluster_here() -> str:
    """The cluster's name, outside of its jobs; empty without one."""
    code, output, _ = _slurm("scontrol", "show", "config") or (1, "", "")
    lines = [line.partition("=") for line in output.splitlines()] if not code else []
    return next((value.strip() for name, _, value in lines if name.strip() == "ClusterName"), "")


def _slurm(*command: str) -> tuple[int, str, str] | None:
    """Exit code, output and errors of a program of SLURM; None if it is missing or does not answer."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.returncode, run.stdout.strip(), run.stderr.strip()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""

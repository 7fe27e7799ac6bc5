"""Do a job in several processes, one a GPU, and wait for them; on one machine, or on all those that SLURM gave."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lowrank
from lowrank.errors import RankwiseError
from lowrank.files import read_json, write_json
from lowrank.jobs import node, worker
from lowrank.jobs.crew import Crew, Place, command
from lowrank.jobs.share import ALONE, Share
from lowrank.jobs.usage import WORKERS

log = logging.getLogger(__name__)

Work = Callable[[dict[str, Any], Share], Any]
"""Does a process's share of a job, by arguments that JSON can hold. What the first process returns is the result."""

LAST_LINES = 15
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
_ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port: nobody else has to find it
"""What a launcher tells its processes, for one that has none."""


def run_shared(work: Work, arguments: dict[str, Any], crew: Crew, threads: int, folder: str | Path) -> Any:
    """Do a job: right here if one process is to do it, else in worker processes.

    Args:
        work: a function of a module, which the workers import.
        arguments: of the job.
        crew: the processes.
        threads: CPU threads of all processes of a machine together.
        folder: for the job's description and messages; with several machines, one that all of them see.

    Returns:
        What `work` returned in the first process.

    Raises:
        RankwiseError: a process failed; with its message.
    """
    if crew.processes == 1:
        return work(arguments, ALONE)
    log.info("%d processes on %d machine%s", crew.processes, crew.nodes, "s" if crew.nodes > 1 else "")
    return launch(f"{work.__module__}:{work.__qualname__}", arguments, crew, threads, folder)


def launch(work: str, arguments: dict[str, Any], crew: Crew, threads: int, folder: str | Path) -> Any:
    """Do a job in worker processes, also if it is only one; their lines go to the log.

    As `run_shared`, with `work` as "module:function".
    """
    job_file = Path(folder) / "job.json"
    write_json(job_file, {"work": work, "arguments": arguments})
    peaks = worker.peak_file(job_file, "*").name
    for old in (*job_file.parent.glob("job.json.error*"), *job_file.parent.glob(peaks), worker.result_file(job_file)):
        old.unlink(missing_ok=True)
    last: deque[str] = deque(maxlen=LAST_LINES)
    starter = start_command(crew, job_file)
    if shutil.which(starter[0]) is None:
        raise RankwiseError(f"`nodes: {crew.nodes}` needs a SLURM job, but there is no `{starter[0]}` on this machine.")
    # The open end of stdin tells the workers that this process lives (see worker.py).
    with subprocess.Popen(
        starter,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment_of_workers(os.environ, max(1, threads // crew.each), crew.processes == 1),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.info("%s", line.rstrip())
            last.append(line.rstrip())
    if process.returncode:
        raise RankwiseError(_failure(job_file, process.returncode, last))
    WORKERS.extend(float(path.read_text(encoding="utf-8")) for path in job_file.parent.glob(peaks))
    return read_json(worker.result_file(job_file))


def start_command(crew: Crew, job_file: Path) -> list[str]:
    """What starts all processes: a launcher, or one on each machine of the SLURM job by `srun`."""
    if crew.nodes == 1:
        place = Place(("localhost",), 0, "127.0.0.1", node.free_port())
        return command(crew, worker.main.__module__, job_file, place)
    srun = ["srun", "--overlap", f"--nodes={crew.nodes}", f"--ntasks={crew.nodes}", "--ntasks-per-node=1"]
    srun += ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    meeting = job_file.with_name(f"meeting-{uuid.uuid4().hex}.json")
    gpus = crew.each if _sees_gpus() else 0
    arguments = [str(crew.each), str(crew.nodes), crew.launcher, str(gpus), str(meeting), str(job_file)]
    return [*srun, sys.executable, "-m", node.main.__module__, *arguments]


def environment_of_workers(given: Mapping[str, str], threads: int, alone: bool = False) -> dict[str, str]:
    """The environment of the workers: ours without what another launcher left, with this library and their threads.

    Args:
        given: ours.
        threads: of each worker.
        alone: it is a single one, which no launcher starts.
    """
    environment = {name: value for name, value in given.items() if name not in _ALONE} | (_ALONE if alone else {})
    library = str(Path(lowrank.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (library, environment.get("PYTHONPATH", ""))))
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment[worker.DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
    if not _sees_gpus():
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own search may take a driver without a device for one
    return environment


def _sees_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _failure(job_file: Path, code: int, last: deque[str]) -> str:
    """What to tell the user about failed workers: the first complaint, if there is one; others only miss their peer."""
    told = []
    for path in job_file.parent.glob("job.json.error*"):
        kind, _, message = path.read_text(encoding="utf-8").partition("\n")
        ours = kind == RankwiseError.__name__
        told.append(
            (not ours, path.stat().st_mtime_ns, message if ours else f"a worker process failed: {kind}: {message}")
        )
    if told:
        return min(told)[-1]
    return (
        f"a worker process on {socket.gethostname()} or another machine of this job ended without a message (exit code "
        f"{code}); it may have been killed for want of memory. Run again: it goes on where it stood, if it is a job "
        "that can. Last lines:\n" + "\n".join(last)
    )

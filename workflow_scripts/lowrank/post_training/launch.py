"""Start the worker processes of a post-training with torch's launcher, and wait for them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch

import lowrank
from lowrank.errors import RankwiseError
from lowrank.files import write_json
from lowrank.post_training.job import TrainingJob

log = logging.getLogger(__name__)

LAST_LINES = 15
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def process_count(on_cpu: int = 1) -> int:
    """One process per visible GPU; without a GPU, `on_cpu`."""
    return torch.cuda.device_count() if torch.cuda.is_available() else on_cpu


def launch(job: TrainingJob, processes: int, threads: int) -> None:
    """Run a job in worker processes of this machine; their lines go to the log.

    Args:
        job: what to train, and the folder of its state.
        processes: how many workers.
        threads: CPU threads of all of them together.

    Raises:
        RankwiseError: a worker failed; with its message.
    """
    folder = Path(job.folder)
    job_file = folder / "job.json"
    write_json(job_file, asdict(job))
    for old in folder.glob("job.json.error*"):
        old.unlink()
    # `--standalone` finds a free port, so jobs side by side on one machine do not meet.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "lowrank.post_training.worker", str(job_file)]
    last: deque[str] = deque(maxlen=LAST_LINES)
    # The open end of stdin tells the workers that this process lives (see worker.py).
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(processes, threads),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.info("%s", line.rstrip())
            last.append(line.rstrip())
    if process.returncode:
        raise RankwiseError(_failure(folder, process.returncode, last))


def _environment(processes: int, threads: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    library = str(Path(lowrank.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (library, environment.get("PYTHONPATH", ""))))
    environment["OMP_NUM_THREADS"] = str(max(1, threads // processes))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own search may take a driver without a device for one
    return environment


def _failure(folder: Path, code: int, last: deque[str]) -> str:
    """What to tell the user about a failed worker."""
    for path in sorted(folder.glob("job.json.error*")):
        kind, _, message = path.read_text(encoding="utf-8").partition("\n")
        return message if kind == RankwiseError.__name__ else f"a training process failed: {kind}: {message}"
    return (
        f"a training process ended without a message (exit code {code}); it may have been killed for want of "
        "memory. Run again: it goes on from its last checkpoint. Last lines:\n" + "\n".join(last)
    )

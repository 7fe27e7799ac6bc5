"""One process of a post-training: `python -m lowrank.post_training.worker job.json`, started by torch's launcher."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from lowrank.files import read_json, write_text
from lowrank.post_training.job import TrainingJob
from lowrank.post_training.train import train

log = logging.getLogger(__name__)


def main(job_file: str) -> int:
    """Run one process of the job; an error's message is left beside the job file for the launcher."""
    job = TrainingJob(**read_json(job_file))
    rank = int(os.environ["RANK"])
    _end_with_parent()
    _set_up_logging(rank)
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        train(job)
        dist.destroy_process_group()
    except Exception as error:
        write_text(error_file(job_file, rank), f"{type(error).__name__}\n{error}")
        log.exception("process %d failed", rank)
        return 1
    return 0


def error_file(job_file: str | Path, rank: int) -> Path:
    """Where process `rank` leaves the type and message of the error that ended it."""
    return Path(f"{job_file}.error{rank}")


def _end_with_parent() -> None:
    """End this process when the stage that started it is gone, however it went.

    Otherwise a killed stage would leave workers behind that write into the folder of its successor. The stage
    holds the other end of standard input and never writes: end of file means that it no longer lives.
    """

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _set_up_logging(rank: int) -> None:
    """Bare lines (the stage adds the time), from the first process only; no chatter of libraries."""
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("DeepSpeed", "torch.distributed", "transformers"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's about its own collectives, from DeepSpeed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

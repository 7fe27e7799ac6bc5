"""One process of a job that several do together: `python -m lowrank.jobs.worker job.json`, started by a launcher."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import warnings
from datetime import timedelta
from pathlib import Path

from lowrank.files import read_json, write_json, write_text
from lowrank.jobs.forkserver import WORKER, end_as, run_as_fork
from lowrank.jobs.imports import uncollected
from lowrank.jobs.share import Share
from lowrank.jobs.usage import peak_resident_mib

log = logging.getLogger(__name__)

DEVICES = "RANKWISE_VISIBLE_DEVICES"
"""The GPUs of the job, for launchers that count them from 0."""
PATIENCE = timedelta(days=2)
"""How long a process waits for the others. If one fails, its launcher ends them all at once."""


def main(job_file: str) -> int:
    """Do this process's share; an error's message is left beside the job file for who started the job."""
    job = read_json(job_file)
    rank = int(os.environ["RANK"])
    _end_with_parent()
    _set_up_logging(rank)
    if DEVICES in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[DEVICES]
    try:
        module, _, function = job["work"].partition(":")
        with uncollected():
            import torch
            import torch.distributed as dist

            work = getattr(importlib.import_module(module), function)
        _set_up_logging(rank)  # once more: torch has set levels of its own
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        result = work(job["arguments"], Share(rank, dist.get_world_size()))
        write_text(peak_file(job_file, rank), str(peak_resident_mib()))
        if rank == 0:
            write_json(result_file(job_file), result)
            _log_memory()
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()
    except Exception as error:
        write_text(error_file(job_file, rank), f"{type(error).__name__}\n{error}")
        log.exception("process %d failed", rank)
        return 1
    return 0


def error_file(job_file: str | Path, rank: int | str) -> Path:
    """Where process `rank` (or what started it on a machine) leaves the type and message of the error that ended it."""
    return Path(f"{job_file}.error{rank}")


def peak_file(job_file: str | Path, rank: int | str) -> Path:
    """Where process `rank` leaves the largest memory that it has had, in MiB."""
    return Path(f"{job_file}.peak{rank}")


def result_file(job_file: str | Path) -> Path:
    """Where the first process leaves what the work returned."""
    return Path(f"{job_file}.result")


def _end_with_parent() -> None:
    """End this process when the stage that started it is gone, however it went.

    Otherwise a killed stage would leave workers behind that write into the folder of its successor. The stage
    holds the other end of standard input and never writes: end of file means that it no longer lives.
    """

    def wait() -> None:
        while os.read(0, 1024):  # not by `sys.stdin`, whose lock this thread would still hold when Python ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _set_up_logging(rank: int) -> None:
    """Bare lines (the stage adds the time), from the first process only; no chatter of libraries."""
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in (
        "DeepSpeed",
        "torch.distributed",
        "transformers",
        "httpx",
        "filelock",
        "fsspec",
        "datasets",
        "lm_eval",
    ):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's about its own collectives, from DeepSpeed


def _log_memory() -> None:
    """What the first process took of its GPU; the stage itself sees only the host's memory."""
    import torch

    if torch.cuda.is_available():
        reserved = torch.cuda.max_memory_reserved() / 2**20
        log.info("process 0 reserved at most %.0f MiB on %s", reserved, torch.cuda.get_device_name())


if __name__ == "__main__":
    if (status := run_as_fork(WORKER)) is not None:
        end_as(status)
    code = main(sys.argv[-1])
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # all is written; threads of libraries have been seen to abort a process while Python ends

"""What every stage does around its work: logging, threads, network off, GPUs checked, one clear message on failure."""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from lowrank.errors import RankwiseError
from lowrank.files import disk_error, write_error
from lowrank.jobs.forkserver import DEVICES, FORK_OF, end_as, run_as_fork, start_fork_server
from lowrank.jobs.gpus import DEALING, own_gpus
from lowrank.jobs.imports import load_models
from lowrank.jobs.job import Job
from lowrank.jobs.lock import output_lock
from lowrank.jobs.record import write_job_record
from lowrank.jobs.usage import describe_usage, usage_since
from lowrank.model.placement import MODEL_GPUS
from lowrank.redact import SafeFormatter
from lowrank.versions import package_version

log = logging.getLogger("rankwise")

PROJECT = Path(__file__).resolve().parents[3]
"""The checkout whose code runs."""

FETCHING = "fetch_"
"""Rules of this name, and no others, may use the network; they run on the head node."""

PASSES = ("collect_statistics", "collect_gradients")
"""Rules that hold the sums of some blocks at a time."""

TIMED = ("evaluate_cost",)
"""Rules that measure speed: others on the same GPU would be measured too."""

NO_MEMORY = (
    *("OutOfMemoryError", "CUDA error: out of memory", "CUDA driver error: out of memory", "HIP error: out of memory"),
    *("STATUS_ALLOC_FAILED", "Cuda failure 2 '"),
)
"""What errors say when a GPU's memory is too small: torch's own, a driver's, those of CUDA's libraries, NCCL's."""

TAKES_LESS = {
    "post_train": "a smaller `micro_batch_size` in its `tuning` takes less; with `deepspeed: zero3` there each GPU "
    "more that the profile gives the job (`gpu`) takes a share of the weights, and `zero3-offload` keeps them in main "
    "memory",
    "distil_features": "a smaller `batch_size` in its `tuning` takes less",
}
"""Rule whose model is not spread over GPUs -> what helps, but a larger one."""

ENVIRONMENT = "RANKWISE_ENVIRONMENT"
"""The variable that hands the head node's environment to its jobs."""

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Bars of progress fill a log with hundreds of lines; stages log their own."""

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")

ON_CPU = {"DS_ACCELERATOR": "cpu"}
"""DeepSpeed, imported by transformers, would warn of a missing GPU otherwise."""
KERNELS = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
"""cuDNN's attention, which torch prefers on GPUs from Hopper on, plans anew for each shape, which takes up to half a
second; tasks, instructions and generated texts have hundreds of shapes. What takes its place needs no plans. Like the
GPU itself, a kernel changes last digits, and reruns nothing (docs/reruns.md)."""
_NOT_FETCHED = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")


def share_library(scripts: Path) -> None:
    """Let stages, which run in interpreters of their own, import the library of this checkout, wherever they start."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(scripts), *(path for path in others if path not in ("", str(scripts)))]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def remember_environment() -> None:
    """Tell all jobs what the head node runs in: they get its variables."""
    os.environ[ENVIRONMENT] = environment()


def serve_forks() -> None:
    """Let jobs on this machine start as forks of a process that has loaded torch, where that is safe."""
    start_fork_server({**QUIET, **ON_CPU, **os.environ, **dict.fromkeys(OFFLINE, "1")})


def environment() -> str:
    """What a job and the head node must have in common: Python and torch, which is not loaded for that."""
    return f"Python {platform.python_version()} ({sys.prefix}), torch {package_version('torch')}"


def require_same_environment() -> None:
    """Stop a job whose interpreter or torch are not those of the head node, before it computes something else.

    Raises:
        RankwiseError: with both environments.
    """
    expected, found = os.environ.get(ENVIRONMENT), environment()
    if expected in (None, found):
        return
    raise RankwiseError(
        f"this job runs in {found} on {socket.gethostname()}, and the head node in {expected}. Start Snakemake from an "
        "environment that all nodes see at the same path, as it is."
    )


def run_stage(job: Job, work: Callable[[Job], None]) -> None:
    """Run one stage under Snakemake.

    Log lines go to the rule's log file and to the terminal. A `RankwiseError` is printed as its message,
    without a traceback; any other exception keeps its traceback, since it is a bug. Both end with exit code 1.
    While it runs, no other job may write the same outputs. Where a fork server runs, all this is done by a fork.
    """
    if (status := run_as_fork(job.rule)) is not None:
        end_as(status)
    log_file = str(job.log[0]) if len(job.log) else None
    set_up_logging(log_file)
    set_up_environment(job)
    started = time.monotonic()
    try:
        with output_lock(job.output, job.rule, log_file or "") as taken_over:
            if log_file:
                begin_log(log_file)  # only now: it may have been the log of a job that runs
            log.info("%s: %s", job.rule, describe_job(job))
            if taken_over:
                log.warning("%s: %s", job.rule, taken_over)
            require_same_environment()
            jobs_per_gpu = int(job.resources.get("jobs_per_gpu", 0) or 1)
            with own_gpus(wanted_gpus(job), jobs_per_gpu, alone=job.rule in TIMED):
                started = time.monotonic()  # waiting for a GPU that others hold is no work
                load_models(job.rule)
                require_gpus(job)
                work(job)
            write_job_record(job, PROJECT, usage_since(started))
    except RankwiseError as error:
        log.error("%s: %s%s", job.rule, error, fetching_hint(error) or memory_hint(job, error))
        sys.exit(1)
    except Exception as error:
        if problem := disk_problem(job, error):
            log.error("%s: %s", job.rule, problem)
        elif hint := fetching_hint(error) or missing_package(error) or memory_hint(job, error):
            log.error("%s: %s: %s%s", job.rule, type(error).__name__, error, hint)
        else:
            log.exception("%s: unexpected failure; please report it with this log", job.rule)
        sys.exit(1)
    log.info("%s: %s", job.rule, describe_usage(usage_since(started)))


def set_up_environment(job: Job) -> None:
    """Set the variables that libraries read when they are imported, which stages do later."""
    os.environ.setdefault("OMP_NUM_THREADS", str(job.threads))
    _set_defaults(QUIET)
    if job.rule not in TIMED:  # which measure torch as it is
        _set_defaults(KERNELS)
    if not job.rule.startswith(FETCHING):
        os.environ.update(dict.fromkeys(OFFLINE, "1"))  # a missing file is an error here, never a download
    os.environ[MODEL_GPUS] = str(wanted_gpus(job))
    if computes_on_cpu(job) or got_no_gpu(job):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if computes_on_cpu(job) or got_no_gpu(job) or not any(map(os.path.exists, DEVICES)):
        _set_defaults(ON_CPU)


def _set_defaults(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def got_no_gpu(job: Job) -> bool:
    """Whether GPUs are dealt out and this job gets none: those that it may see all the same are of others."""
    dealt_out = job.resources.get("gpus_per_job") is not None or DEALING in os.environ
    return dealt_out and not wanted_gpus(job)


def computes_on_cpu(job: Job) -> bool:
    """Whether the profile says `device: cpu`: no GPU is used, not even one that was asked for."""
    return str(job.resources.get("device", "")) == "cpu"


def describe_job(job: Job) -> str:
    """Where a job runs, in one line."""
    gpus = asked_gpus(job)
    parts = [
        f"Python {sys.version.split()[0]} ({sys.executable})",
        f"host {socket.gethostname()}",
        *([f"a fork of process {os.environ[FORK_OF].partition(',')[0]}"] if FORK_OF in os.environ else []),
        *([f"SLURM job {os.environ['SLURM_JOB_ID']}"] if os.environ.get("SLURM_JOB_ID") else []),
        f"{job.threads} thread{'s' if job.threads != 1 else ''}",
        *([f"{gpus} GPU{'s' if gpus != 1 else ''} asked for"] if gpus else []),
    ]
    return ", ".join(parts)


def asked_gpus(job: Job) -> int:
    """How many GPUs the job was given, if its profile hands out any."""
    return int(job.resources.get("gpu", 0) or 0)


def wanted_gpus(job: Job) -> int:
    """How many GPUs the job uses if there are any: as many as it asked for; if nobody said, one if it can use one."""
    if computes_on_cpu(job):
        return 0
    left_open = job.resources.get("gpus_per_job") is None
    return asked_gpus(job) or (int(job.resources.get("uses_gpu", 0) or 0) if left_open else 0)


def require_gpus(job: Job) -> None:
    """Stop a job that was promised GPUs and sees fewer, before it computes on the CPU for a week.

    Raises:
        RankwiseError: with what is seen, and why that may be.
    """
    asked = -(-asked_gpus(job) // int(job.resources.get("nodes", 0) or 1))  # on this node
    if not asked or computes_on_cpu(job):
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= asked:
        return
    built = torch.version.cuda or torch.version.hip
    why = (
        f"torch {torch.__version__} is built for the CPU only: install the build for your GPUs"
        if built is None
        else f"torch {torch.__version__} is built for {built}, CUDA_VISIBLE_DEVICES is "
        f"'{os.environ.get('CUDA_VISIBLE_DEVICES', '')}': look at the node's driver, and at what the job was given"
    )
    raise RankwiseError(
        f"{asked} GPU{'s were' if asked > 1 else ' was'} asked for, and this job sees {found or 'none'} on "
        f"{socket.gethostname()} ({why}). To compute on CPUs, set `gpus_per_job: 0` in the profile."
    )


def fetching_hint(error: BaseException) -> str:
    """What to do if an error comes from something that was not fetched; nothing if it does not."""
    current: BaseException | None = error
    while current is not None:
        told = f"{type(current).__name__} {current}"  # `datasets` names the cause in its message only
        if any(name in told for name in _NOT_FETCHED):
            return (
                ". Something was not fetched: jobs have no network, only the fetch_* rules do. Run `snakemake data "
                "--profile profiles/local --configfile FILE` on a machine with network, then run again; if that does "
                "not help, please report it."
            )
        current = current.__cause__ or current.__context__
    return ""


def disk_problem(job: Job, error: BaseException) -> str:
    """The message if a disk was full or could not be written, wherever a library met it; nothing for other errors."""
    found = disk_error(error)
    return str(write_error(Path(found.filename or next(iter(job.output), "results")), found)) if found else ""


def memory_hint(job: Job, error: BaseException) -> str:
    """What to do if the memory of a GPU was too small, here or in a worker; nothing if that was not it."""
    told = f"{type(error).__name__} {error}"  # torch is not imported for its class
    if not any(sign in told for sign in NO_MEMORY):
        return ""
    cures = []
    if job.rule in PASSES and str(job.resources.get("layers_per_pass", "")) != "1":
        cures.append(
            f"with `set-resources: {job.rule}: {{layers_per_pass: 1}}` in the profile a pass holds the sums of one "
            "block"
        )
    if job.resources.get("spreads_model"):
        cures.append(_on_more_gpus(job))
    elif job.rule in TAKES_LESS:
        cures.append(TAKES_LESS[job.rule])
    return f". The memory of a GPU is too small: {'; '.join(cures) or 'this rule needs one with more'}."


def _on_more_gpus(job: Job) -> str:
    """The line by which a model that one process runs lies on several GPUs, or on one more."""
    gpus, alone = asked_gpus(job) or 1, str(job.resources.get("processes", "")) == "1"
    together = bool(job.resources.get("shares_work"))  # several GPUs are for a process each, if nobody says otherwise
    if gpus == 1 or alone or not together:
        gpus += 1
    return (
        f"with `set-resources: {job.rule}: {{gpu: {gpus}{', processes: 1' if together else ''}}}` in the profile its "
        f"model lies on {gpus} GPUs; that `gpus_per_job: auto` counts them is in docs/cluster.md"
    )


def missing_package(error: BaseException) -> str:
    """What to do if a package is not installed; nothing for other errors, nor for a module of this library."""
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").startswith("lowrank"):
        return ""
    return (
        f" in the environment of {sys.executable}. Start Snakemake from one that has envs/requirements.txt, "
        "and see that the nodes reach it too."
    )


def begin_log(log_file: str) -> None:
    """Drop what an earlier job has left in the log."""
    with suppress(OSError):  # as below
        os.truncate(log_file, 0)


def set_up_logging(log_file: str | None) -> None:
    """Send log lines to the terminal and to `log_file`; keep the libraries' chatter out, and secrets."""
    logging.raiseExceptions = False  # a line that does not fit on a full disk must not hide the message about it
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file:
        with suppress(OSError):  # the stage's own writing will say what is wrong with the disk
            handlers.append(logging.FileHandler(log_file, encoding="utf-8"))  # appended to, see run_stage
    for handler in handlers:
        handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    for chatty in ("httpx", "urllib3", "filelock", "fsspec", "datasets", "lm_eval", "DeepSpeed", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

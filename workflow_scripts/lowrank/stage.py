"""What every stage does around its work: logging, threads, one clear message on failure."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank.errors import RankwiseError

if TYPE_CHECKING:
    from snakemake.iocontainers import Snakemake

log = logging.getLogger("rankwise")


def share_library(scripts: Path) -> None:
    """Let stages, which run in interpreters of their own, import the library of this checkout, wherever they start."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(scripts), *(path for path in others if path not in ("", str(scripts)))]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def run_stage(job: Snakemake, work: Callable[[Snakemake], None]) -> None:
    """Run one stage under Snakemake.

    Log lines go to the rule's log file and to the terminal. A `RankwiseError` is printed as its message,
    without a traceback; any other exception keeps its traceback, since it is a bug. Both end with exit code 1.
    """
    set_up_logging(str(job.log[0]) if len(job.log) else None)
    os.environ.setdefault("OMP_NUM_THREADS", str(job.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported by transformers, would warn otherwise
    started = time.monotonic()
    try:
        work(job)
    except RankwiseError as error:
        log.error("%s: %s", job.rule, error)
        sys.exit(1)
    except Exception:
        log.exception("%s: unexpected failure; please report it with this log", job.rule)
        sys.exit(1)
    log.info("%s: finished in %.1f s", job.rule, time.monotonic() - started)


def set_up_logging(log_file: str | None) -> None:
    """Send log lines to the terminal and to `log_file`; keep the libraries' chatter out."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file:
        handlers.append(logging.FileHandler(log_file, mode="w", encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=handlers
    )
    for chatty in ("httpx", "urllib3", "filelock", "fsspec", "datasets", "lm_eval", "DeepSpeed", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

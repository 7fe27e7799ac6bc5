"""What a job took: seconds, and the largest memory of its processes."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from lowrank.jobs.log_file import FINISHED

WORKERS: list[float] = []
"""Peaks, in MiB, of workers that this process has started and that have finished. Those that are forks of the run's
server are none of its children, of which the system would tell."""


def usage_since(started: float) -> dict[str, float]:
    """Seconds since a time of `time.monotonic`, and the peaks of memory so far.

    Returns:
        `seconds`; `peak_mib` of this process; `child_peak_mib` of the largest that it started, and `gpu_peak_mib` that
        torch reserved, where there is such.
    """
    usage = {"seconds": time.monotonic() - started, "peak_mib": peak_resident_mib()}
    children = max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, *WORKERS, 0.0)
    if children > 256:  # workers, not a compiler or `uname`
        usage["child_peak_mib"] = children
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gpus = range(torch.cuda.device_count())
        usage["gpu_peak_mib"] = max(torch.cuda.max_memory_reserved(gpu) for gpu in gpus) / 2**20
    return usage


def describe_usage(usage: dict[str, float]) -> str:
    """What a job took by `usage_since`, and the torch that was used, in one line."""
    parts = [f"{FINISHED % usage['seconds']}, peak memory {usage['peak_mib']:.0f} MiB"]
    if "child_peak_mib" in usage:
        parts.append(f"{usage['child_peak_mib']:.0f} MiB in the largest process it started")
    torch: Any = sys.modules.get("torch")
    if "gpu_peak_mib" in usage:
        parts.append(f"{usage['gpu_peak_mib']:.0f} MiB reserved on {torch.cuda.get_device_name()}")
    return ", ".join([*parts, *([] if torch is None else [f"torch {torch.__version__}"])])


def peak_resident_mib() -> float:
    """Largest resident set of this process since it was started."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)

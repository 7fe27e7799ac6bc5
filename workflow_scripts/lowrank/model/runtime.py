"""What a job runs on: device, threads, seeds, versions."""

from __future__ import annotations

import logging
import platform
import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lowrank.versions import package_version

log = logging.getLogger(__name__)

SEEDS_APART = 1_000_003
"""Between the draws of a seed's blocks or epochs and those of the next seed: none draws as one of another seed does."""
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "gpytorch",
    "botorch",
    "lm_eval",
    "deepspeed",
    "peft",
    "snakemake",
    "numpy",
)


def pick_device() -> torch.device:
    """CUDA if there is a device, else the CPU; the choice is logged."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(device)}, {size:.0f} GiB"
        log.info("device: cuda (%s), torch %s", name, torch.__version__)
    else:
        log.info(
            "device: cpu (no CUDA device is visible), %d threads, torch %s", torch.get_num_threads(), torch.__version__
        )
    return device


def limit_threads(threads: int) -> None:
    """Give torch as many threads as the rule was given, so that jobs side by side do not fight for cores."""
    torch.set_num_threads(max(1, threads))


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's name (`float32`, `bfloat16`, `float16`)."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no torch dtype")
    return dtype


def seed_everything(seed: int) -> torch.Generator:
    """Seed torch's global generator and return a generator of one's own with the same seed (on the CPU)."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def describe_environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware of this job, for provenance."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "packages": {package: package_version(package) for package in RECORDED_PACKAGES},
    }


def peak_memory_mib(devices: Sequence[torch.device]) -> dict[str, float]:
    """Peak memory of this process so far: resident set on the host, and allocated memory on its CUDA devices."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if gpus := [device for device in devices if device.type == "cuda"]:
        peak["cuda"] = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 2**20
    return peak

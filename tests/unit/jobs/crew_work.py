"""What worker processes do in tests of the launchers."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import RankwiseError
from lowrank.jobs.forkserver import FORK_OF
from lowrank.jobs.share import Share

COLLECTED = ("statistics", "output_gradients")


def collect(arguments: dict[str, Any], share: Share) -> None:
    """Both passes over a calibration, one after the other: "state" gets a folder for each."""
    for name in COLLECTED:
        folder = Path(arguments["state"], name)
        folder.mkdir(parents=True, exist_ok=True)
        pass_over = importlib.import_module(f"lowrank.calibration.{name}").collect_share
        pass_over(arguments | {"state": str(folder)}, share)


def add_ranks(arguments: dict[str, Any], share: Share) -> dict[str, Any]:
    """Sums over processes, and what this one sees."""
    total = share.sum(torch.tensor([share.rank, 1, float("1e-30")], dtype=torch.float64)).tolist()
    own = torch.zeros(share.world, 2)
    own[share.rank] = torch.tensor([float(os.environ["LOCAL_RANK"]), float(os.environ["OMP_NUM_THREADS"])])
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"total": total, "own": share.sum(own).tolist(), "given": arguments, "devices": devices}


def fork_of(arguments: dict[str, Any], share: Share) -> str | None:
    """Of which server this process is a fork, if it is one."""
    return os.environ.get(FORK_OF)


def fail(arguments: dict[str, Any], share: Share) -> None:
    """The last process complains, the others wait for it."""
    if share.rank == share.world - 1:
        raise arguments_error(arguments["kind"])
    share.sum(torch.zeros(1))


def arguments_error(kind: str) -> Exception:
    return RankwiseError("model.layers.3: no.") if kind == "ours" else ValueError("what?")


def torch_log_level(arguments: dict[str, Any], share: Share) -> int:
    """From which level on a worker repeats what torch says of several processes."""
    return logging.getLogger("torch.distributed").level


def die(arguments: dict[str, Any], share: Share) -> None:
    """Without a word, as a process that is killed for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait(arguments: dict[str, Any], share: Share) -> None:
    """Say that it lives, and go on living."""
    Path(arguments["folder"], f"alive{share.rank}").write_text(str(os.getpid()))
    time.sleep(600)

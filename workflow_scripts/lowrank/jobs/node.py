"""One machine of a job on several: `python -m lowrank.jobs.node ...`, started on each by `srun`.

Which machines there are, and which of them this is, SLURM says. The first one chooses where all processes meet and
writes it to the job's folder, which all machines see: its own name, and a port that is free on it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import SystemRandom

from lowrank.errors import RankwiseError
from lowrank.files import read_json, write_json, write_text
from lowrank.jobs import worker
from lowrank.jobs.crew import Crew, Place, command

PATIENCE = 600.0
"""Seconds until the first machine must have said where all meet."""

PORTS = range(20_000, 32_768)
"""Where all may meet."""


def main(arguments: list[str]) -> int:
    """Start this machine's processes and wait for them."""
    each, nodes, launcher, gpus, meeting, job_file = arguments
    crew = Crew(int(each), int(nodes), launcher)
    take_own_devices()
    try:
        names, rank = machines(os.environ, crew.nodes)
        check_gpus(int(gpus))
        address, port = meet(Path(meeting), names, rank)
    except RankwiseError as error:
        name = f"-{os.environ.get('SLURM_NODEID', '')}"
        write_text(worker.error_file(job_file, name), f"{type(error).__name__}\n{error}")
        return 1
    place = Place(names, rank, address, port)
    return subprocess.run(command(crew, worker.main.__module__, Path(job_file), place), check=False).returncode


def machines(environment: Mapping[str, str], nodes: int) -> tuple[tuple[str, ...], int]:
    """The names of the machines of this step, and which of them this is.

    Raises:
        RankwiseError: SLURM says nothing, or another number than was asked for.
    """
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    rank = environment.get("SLURM_NODEID")
    if not listed or rank is None:
        raise RankwiseError(
            f"`nodes: {nodes}` needs a SLURM job on so many nodes, but SLURM_JOB_NODELIST and SLURM_NODEID are not set."
        )
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RankwiseError(f"`scontrol show hostnames {listed}` failed: {error}") from error
    names = tuple(shown.split())
    if len(names) != nodes or not 0 <= int(rank) < nodes:
        raise RankwiseError(
            f"`nodes: {nodes}`, but this step runs on {len(names)} ({listed}), and this is number {rank} of them. "
            "Set `nodes` for this rule, and `mpi: srun` with `tasks_per_node`, as docs/cluster.md says."
        )
    return names, int(rank)


def take_own_devices() -> None:
    """The GPUs that SLURM gives this machine, in place of those of the first one, whose environment `srun` hands on."""
    os.environ.pop(worker.DEVICES, None)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        os.environ[worker.DEVICES] = os.environ["CUDA_VISIBLE_DEVICES"]


def check_gpus(needed: int) -> None:
    """Stop if this machine sees fewer GPUs than it must: the processes of the others would wait for its own in vain.

    Args:
        needed: GPUs that each machine must see; 0 where the first one has none, and all compute on processors.

    Raises:
        RankwiseError: with the numbers.
    """
    if not needed:
        return
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < needed:
        raise RankwiseError(
            f"{socket.gethostname()} sees {seen} GPUs of this job, and {needed} are needed on each node. Add "
            f"`slurm_extra: \"'--gpus-per-node={needed}'\"` to this rule's `set-resources`, or look at the node's "
            "driver."
        )


def meet(file: Path, names: tuple[str, ...], rank: int, patience: float = PATIENCE) -> tuple[str, int]:
    """Where the processes of all machines meet: address and port of the first one.

    Raises:
        RankwiseError: it does not say so in time.
    """
    if rank == 0:
        write_json(file, {"address": _address(names[0]), "port": free_port()})
    end = time.monotonic() + patience
    while not file.is_file():
        if time.monotonic() > end:
            raise RankwiseError(f"{file}: {names[0]} has not written it in {patience:.0f} s; do all nodes see it?")
        os.scandir(file.parent).close()  # network file systems look again
        time.sleep(0.2)
    found = read_json(file)
    return str(found["address"]), int(found["port"])


def _address(name: str) -> str:
    """What other machines call this one: its name in SLURM, or its own where that means nothing to the network."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return socket.gethostname()
    return name


def free_port() -> int:
    """A port that nobody uses at this moment.

    The worker that listens there has torch to load first. So it is none of those that Linux hands out by itself, which
    somebody may be given meanwhile.

    Raises:
        OSError: none of a hundred is free.
    """
    for port in SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"none of a hundred ports from {PORTS[0]} to {PORTS[-1]} is free")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

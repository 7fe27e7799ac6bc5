"""How many processes do a job, on how many machines, and the command that starts those of one machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import RankwiseError
from lowrank.files import write_text

LAUNCHERS = ("torchrun", "deepspeed")


@dataclass(frozen=True)
class Crew:
    """The processes of a job.

    Attributes:
        each: on every machine.
        nodes: how many machines.
        launcher: what starts them: torch's launcher or DeepSpeed's.
    """

    each: int = 1
    nodes: int = 1
    launcher: str = "torchrun"

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise RankwiseError(f"`launcher: {self.launcher}` in the profile: it is one of {', '.join(LAUNCHERS)}")

    @property
    def processes(self) -> int:
        """All of them."""
        return self.each * self.nodes


def crew_of(resources: Mapping[str, Any]) -> Crew:
    """The processes of a job by what its profile says: one a GPU, or `processes`; without GPUs one, or as many.

    Args:
        resources: of the job: `gpu` (of all machines together), `nodes`, `processes` (of each machine), `launcher`; all
            may be missing.

    Raises:
        RankwiseError: a number of GPUs that the machines cannot share evenly; or several processes that would have
            several GPUs each, or more of them than GPUs.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked, nodes = int(resources.get("gpu") or 0), int(resources.get("nodes") or 1)
    launcher = str(resources.get("launcher") or LAUNCHERS[0])
    if not seen:
        return Crew(int(resources.get("processes") or 1), nodes, launcher)
    if asked % nodes:
        raise RankwiseError(f"`gpu: {asked}` on `nodes: {nodes}`: each node must get as many; change one of them.")
    each = asked // nodes or 1
    processes = int(resources.get("processes") or each) if asked else 1
    if processes not in (1, each):
        raise RankwiseError(
            f"`processes: {processes}` on {each} GPUs of a machine: it is 1, whose model lies on all of them, or {each}"
        )
    return Crew(processes, nodes, launcher)


@dataclass(frozen=True)
class Place:
    """One machine among those of a job.

    Attributes:
        names: of all machines, in order.
        rank: which of them this is.
        address: where the processes meet: the first machine.
        port: of it.
    """

    names: tuple[str, ...]
    rank: int
    address: str
    port: int

    def hostfile(self, each: int) -> str:
        """All machines and their processes, as DeepSpeed reads it."""
        return "".join(f"{name} slots={each}\n" for name in self.names)


def command(crew: Crew, module: str, job_file: Path, place: Place) -> list[str]:
    """The command that starts the processes of one machine.

    One process alone needs no launcher, which would take as long to start as the process itself.

    DeepSpeed's launcher gets its hostfile, and starts nothing elsewhere (`--no_ssh`): SLURM has started it on each
    machine, as it has torch's.
    """
    if crew.processes == 1:
        return [sys.executable, "-m", module, str(job_file)]
    if crew.launcher == "torchrun":
        meet = ["--nnodes", str(crew.nodes), "--node_rank", str(place.rank)]
        meet += ["--master_addr", place.address, "--master_port", str(place.port)]
        # By itself it finds a free port, so that jobs side by side on one machine do not meet.
        where = meet if crew.nodes > 1 else ["--standalone"]
        where += ["--log_dir", str(job_file.with_name("torchrun"))]  # else one that nobody removes, under /tmp
        starter = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node", str(crew.each), "-m"]
    else:
        hosts = job_file.with_name(f"hostfile{place.rank}")
        write_text(hosts, place.hostfile(crew.each))
        starter = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--no_ssh"]
        starter += ["--node_rank", str(place.rank), "--master_addr", place.address, "--master_port", str(place.port)]
        starter += ["--no_local_rank", "--module"]
    return [*starter, module, str(job_file)]

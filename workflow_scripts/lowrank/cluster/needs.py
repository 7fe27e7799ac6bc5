"""What a job needs, how long that takes, and what it asks its cluster for: memory, disk, arithmetic, time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30

PROGRAM = 0.41 * GIB
"""Python, torch and transformers, once they are imported."""
CUDA_HOST = 3 * GIB
"""What CUDA and its libraries take of the main memory of a process."""
CUDA_DEVICE = 0.5 * GIB
"""What they take of the GPU's."""


@dataclass(frozen=True)
class Work:
    """What a job computes and moves.

    Attributes:
        half, single, double: floating point operations in 16, 32 and 64 bits.
        disk: bytes read and written.
        seconds: spent otherwise, whatever the machine.
    """

    half: float = 0
    single: float = 0
    double: float = 0
    disk: float = 0
    seconds: float = 60


@dataclass(frozen=True)
class Speed:
    """What a machine reaches in practice: operations a second by precision, and bytes a second from disk."""

    half: float
    single: float
    double: float
    disk: float = 5e8

    def seconds(self, work: Work, units: int = 1) -> float:
        """How long a piece of work takes on so many units (GPUs or threads)."""
        operations = work.half / self.half + work.single / self.single + work.double / self.double
        return operations / units + work.disk / self.disk + work.seconds


GPU = Speed(half=1.06e14, single=1.2e13, double=1.0e12)
"""Of an A100, as the paper's times for a search tell (half); single and double are guesses from its data sheet."""
THREAD = Speed(half=5e9, single=2e10, double=1e10)
"""Of one thread of a processor."""


@dataclass(frozen=True)
class Need:
    """What one job needs.

    Attributes:
        gpu: whether it computes on a GPU where the site hands them out.
        shared: whether it can use several of them, a process each.
        device: part -> bytes where the model runs.
        host: part -> bytes in main memory, wherever the model runs.
        loading: bytes in main memory on the way to a GPU; over before the parts of `host` are there.
        disk: bytes that it leaves behind.
        scratch: bytes on disk while it runs.
        work: what it computes.
    """

    gpu: bool = False
    shared: bool = False
    device: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=lambda: {"program": PROGRAM})
    loading: float = 0
    disk: float = 0
    scratch: float = 0
    work: Work = field(default_factory=Work)

    @property
    def device_bytes(self) -> float:
        """Where the model runs: a GPU, or the main memory in its place."""
        return sum(self.device.values())

    @property
    def gpu_bytes(self) -> float:
        """On each GPU; none for a job that does not compute there."""
        return self.device_bytes + CUDA_DEVICE if self.gpu else 0

    def gpus(self, each: int) -> int:
        """How many GPUs it is given where jobs get so many each: no more than it has a use for."""
        return (each if self.shared else min(each, 1)) if self.gpu else 0

    def host_bytes(self, gpus: int) -> float:
        """In main memory of a machine that gives it so many GPUs; without one the device's share is there too."""
        program = self.host.get("program", 0)
        rest = sum(self.host.values()) - program
        if gpus:
            return program + CUDA_HOST * gpus + max(self.loading * gpus, rest)
        return program + rest + self.device_bytes

    def largest(self, gpus: int) -> tuple[str, float]:
        """The largest part and its bytes: of the GPU's memory, or of the main memory if there is none."""
        parts = self.device if gpus and self.device else {**self.host, **self.device}
        return max(parts.items(), key=lambda part: part[1])

    def seconds(self, gpus: int, threads: int) -> float:
        """Expected time."""
        return GPU.seconds(self.work, gpus) if gpus else THREAD.seconds(self.work, threads)


def plus(work: Work, more: Work | None = None, **values: float) -> Work:
    """A piece of work and another one, or more of some of its values."""
    more = more or Work(**{"seconds": 0, **values})
    return Work(*(getattr(work, name) + getattr(more, name) for name in Work.__dataclass_fields__))


# --- what a job asks its cluster for ---


def memory_request(need: Need, gpus: int, attempt: int = 1, most: int | None = None) -> int:
    """MB to ask for: a quarter and 1 GiB (Snakemake's own processes) on top, half as much again at each further try.

    Further tries ask for no more than `most`, the first one for what it needs whatever the site has.
    """
    wanted = [500 * math.ceil((1.25 * need.host_bytes(gpus) + GIB) * grown / 1e6 / 500) for grown in _growth(attempt)]
    return wanted[-1] if most is None else max(wanted[0], min(wanted[-1], most))


def runtime_request(need: Need, gpus: int, threads: int, attempt: int = 1, most: int | None = None) -> int:
    """Minutes to ask for: thrice the expected time and half an hour, once more at each further try; at most `most`.

    A shorter limit than a job needs is no loss where it goes on from its last step at the next try.
    """
    minutes = 30 + 3 * need.seconds(gpus, threads) / 60
    wanted = 10 * math.ceil(attempt * minutes / 10)
    return wanted if most is None else min(wanted, most)


def _growth(attempt: int) -> tuple[float, float]:
    """Of the first try and of this one."""
    return 1.0, 1 + 0.5 * (attempt - 1)

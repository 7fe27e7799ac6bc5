"""What a job needs, how long that takes, and what it asks its cluster for: memory, disk, arithmetic, time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowrank.model.placement import fullest

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
        parts: those in 32 bits for which a GPU makes three times as many in 16 (`gram.add_gram_in_parts`).
        disk: bytes read and written.
        seconds: spent otherwise, whatever the machine.
    """

    half: float = 0
    single: float = 0
    double: float = 0
    parts: float = 0
    disk: float = 0
    seconds: float = 60


@dataclass(frozen=True)
class Speed:
    """What a machine reaches in practice: operations a second by precision, and bytes a second from disk."""

    half: float
    single: float
    double: float
    parts: float
    disk: float = 5e8

    def seconds(self, work: Work, units: int = 1) -> float:
        """How long a piece of work takes on so many units (GPUs or threads)."""
        operations = work.half / self.half + work.single / self.single + work.double / self.double
        operations += work.parts / self.parts
        return operations / units + work.disk / self.disk + work.seconds


GPU = Speed(half=1.06e14, single=1.2e13, double=1.0e12, parts=1.06e14 / 3)
"""Of an A100, as the paper's times for a search tell (half); single and double are guesses from its data sheet."""
THREAD = Speed(half=5e9, single=2e10, double=1e10, parts=2e10)
"""Of one thread of a processor."""


@dataclass(frozen=True)
class Need:
    """What one job needs.

    Attributes:
        gpu: whether it computes on a GPU where the site hands them out.
        shared: whether it can use several of them, a process each.
        device: part -> bytes where the model runs.
        host: part -> bytes in main memory, wherever the model runs, of each process that shares the work.
        together: part -> bytes in main memory of all processes together.
        blocks: of the model, among which `split` is divided where its blocks lie on several GPUs; 0: they cannot.
        split: part of `device` -> bytes of it that lie with the blocks.
        alone: bytes on the first GPU in another part of its work, of which nothing is divided.
        evenly: `split` is divided evenly among the processes of a job instead, and each computes (ZeRO).
        divides: a number that the processes must divide, if not 0.
        remedy: what helps, but larger GPUs, where it does not fit.
        loading: bytes in main memory on the way to a GPU; over before the parts of `host` are there.
        returning: bytes of `device` that are in main memory again while the parts of `host` are there.
        disk: bytes that it leaves behind.
        scratch: bytes on disk while it runs.
        work: what it computes.
    """

    gpu: bool = False
    shared: bool = False
    device: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=lambda: {"program": PROGRAM})
    together: Mapping[str, float] = field(default_factory=dict)
    blocks: int = 0
    split: Mapping[str, float] = field(default_factory=dict)
    alone: float = 0
    evenly: bool = False
    divides: int = 0
    remedy: str = ""
    loading: float = 0
    returning: float = 0
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
        return max(self.device_bytes, self.alone) + CUDA_DEVICE if self.gpu else 0

    def gpu_bytes_of(self, gpus: int) -> float:
        """On the fullest of so many GPUs that hold one model together."""
        inside = sum(self.split.values())
        if not self.gpu or gpus == 1 or not inside:
            return self.gpu_bytes
        around = sum(self.device[part] for part in self.split) - inside
        largest = inside / gpus if self.evenly else fullest([inside / self.blocks] * self.blocks, around, gpus) - around
        return max(self.device_bytes - inside + largest, self.alone) + CUDA_DEVICE

    @property
    def spreads(self) -> bool:
        """Whether one process can have its model on several GPUs."""
        return bool(self.split) and not self.evenly

    def fewest_gpus(self, memory: float, most: int) -> int | None:
        """How many GPUs of so many bytes hold its model, or None if so many at most do not."""
        numbers = range(1, most + 1) if self.split else range(1, 2)
        fit = (gpus for gpus in numbers if self.gpu_bytes_of(gpus) <= memory)
        return next((gpus for gpus in fit if not (self.evenly and self.divides % gpus)), None)

    def gpus(self, each: int) -> int:
        """How many GPUs it is given where jobs get so many each: no more than it has a use for."""
        return (each if self.shared else min(each, 1)) if self.gpu else 0

    def host_bytes(self, gpus: int, processes: int | None = None) -> float:
        """In main memory of a machine that gives it so many GPUs; without one the device's share is there too.

        Args:
            gpus: of the machine.
            processes: that share them, or the processors, each of which loads the model; None: one a GPU. Several
                are started by the stage's own, which waits.
        """
        program, once = self.host.get("program", 0), sum(self.together.values())
        rest = sum(self.host.values()) - program
        if gpus:
            sharing = processes or gpus
            return program + CUDA_HOST * gpus + max(self.loading * sharing, rest * sharing + once + self.returning)
        of_workers = processes if processes and processes > 1 else 0
        return program * (1 + of_workers) + (rest + self.device_bytes) * (of_workers or 1) + once

    def largest(self, gpus: int) -> tuple[str, float]:
        """The largest part and its bytes: of the GPU's memory, or of the main memory if there is none."""
        parts = self.device if gpus and self.device else {**self.host, **self.together, **self.device}
        return max(parts.items(), key=lambda part: part[1])

    def largest_in_main_memory(self, gpus: int) -> tuple[str, float]:
        """The largest part of `host_bytes` and its bytes."""
        there = {} if gpus else self.device
        passing = {"weights on their way to a GPU": self.loading, "what comes back from a GPU": self.returning}
        parts = {**self.host, **self.together, **there, **(passing if gpus else {})}
        return max(parts.items(), key=lambda part: part[1])

    def seconds(self, gpus: int, threads: int) -> float:
        """Expected time on so many GPUs that compute at the same time."""
        return GPU.seconds(self.work, gpus) if gpus else THREAD.seconds(self.work, threads)


def plus(work: Work, more: Work | None = None, **values: float) -> Work:
    """A piece of work and another one, or more of some of its values."""
    more = more or Work(**{"seconds": 0, **values})
    return Work(*(getattr(work, name) + getattr(more, name) for name in Work.__dataclass_fields__))


# --- what a job asks its cluster for ---


def memory_request(
    need: Need, gpus: int, attempt: int = 1, most: int | None = None, processes: int | None = None
) -> int:
    """MB to ask for: a quarter and 1 GiB (Snakemake's own processes) on top, half as much again at each further try.

    No more than `most`, for which a job that needs more than that is refused (`dealing.require_memory`). GPUs and
    processes are those of one machine.
    """
    needed = 1.25 * need.host_bytes(gpus, processes) + GIB
    wanted = 500 * math.ceil(needed * (1 + 0.5 * (attempt - 1)) / 1e6 / 500)
    return wanted if most is None else min(wanted, most)


def runtime_request(need: Need, gpus: int, threads: int, attempt: int = 1, most: int | None = None) -> int:
    """Minutes to ask for: thrice the expected time and half an hour, once more at each further try; at most `most`.

    A shorter limit than a job needs is no loss where it goes on from its last step at the next try.
    """
    minutes = 30 + 3 * need.seconds(gpus, threads) / 60
    wanted = 10 * math.ceil(attempt * minutes / 10)
    return wanted if most is None else min(wanted, most)

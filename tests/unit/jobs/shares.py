"""Several processes in one: threads that add up through a shared list, as fast as a loop. Used by tests of shares."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from lowrank.jobs.share import Share


@dataclass(frozen=True)
class Meeting:
    """Where the threads of one test leave their parts."""

    world: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "barrier", threading.Barrier(self.world))


@dataclass(frozen=True)
class ThreadShare(Share):
    """A share whose peers are threads."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        meeting = self.meeting
        meeting.parts[self.rank] = part.clone()
        meeting.barrier.wait(60)
        assert len({(p.shape, p.dtype) for p in meeting.parts.values()}) == 1, "parts of different shapes"
        part.copy_(torch.stack([meeting.parts[rank] for rank in range(self.world)]).sum(0))
        meeting.barrier.wait(60)
        return part


def together(world: int, work: Callable[[Share], Any]) -> list[Any]:
    """Run a function in so many threads, each with its share; returns what each gave, and raises what one raised."""
    meeting, given, raised = Meeting(world), [None] * world, []
    tqdm.get_lock()  # without one of its own the first thread to end a progress bar takes it from the others

    def run(rank: int) -> None:
        try:
            torch.set_grad_enabled(True)
            given[rank] = work(ThreadShare(rank, world, meeting))
        except BaseException as error:
            raised.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in raised:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not raised
    return given

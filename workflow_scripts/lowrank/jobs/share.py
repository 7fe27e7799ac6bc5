"""A process's share of a job that several processes do together, and how their parts become one result.

All of them run the same code. Each takes its share of the batches, and sums of what they found, formed in float64,
are the same on all of them afterwards. What one process alone would give differs by the order of additions at most,
and by nothing at all where parts are only put side by side: each adds zeros for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Share:
    """One process of several.

    Attributes:
        rank: its number.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def of(self, count: int) -> range:
        """Its part of so many things in a row: neighbours, as many as the others have or one more or less."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its sum over all processes, in place; all must call it, with tensors of one shape."""
        if self.world > 1:
            import torch
            import torch.distributed as dist

            # NCCL, which GPUs use, knows no tensors of the main memory.
            on_gpu = dist.get_backend() == "nccl" and part.device.type == "cpu"
            moved = part.to(torch.device("cuda")) if on_gpu else part
            dist.all_reduce(moved)
            if on_gpu:
                part.copy_(moved)
        return part


ALONE = Share()
"""Of a job with one process."""

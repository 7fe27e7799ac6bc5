"""Basis Sharing (Wang et al., ICLR 2025): matrices of one type in neighbouring blocks share their first factor.

With W the matrices of a type in two blocks on top of each other and C = C_1 + C_2 the sum of the second moments of what
they read, the truncation of W S times S^-1 (S S' = C) gives both one basis A and each its own coefficients B_i, with
r (n + m_1 + m_2) parameters: A is stored and counted once, in the first of the blocks. The basis is best for both
inputs as a whole and for neither alone.

As in the authors' program types that read the residual stream share (q, k, v, gate, up), the others (o, down) have
pairs of their own; and there is one kept ratio for all. Ours: ranks are multiples of 8, with what rounding frees given
back; where the number of blocks is no multiple, the last ones share among fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import AtLeastTwo, Distinct, Name, Text
from lowrank.config.low_rank import StackedSettings
from lowrank.config.presets import Calibration, Reads
from lowrank.ranks.stacks import Stack, stacks_by_blocks, types_of_stream

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.replacements import Replacements
    from lowrank.ranks.budget import Budget


class Settings(StackedSettings):
    """Basis Sharing reads second moments."""

    reads: ClassVar[Reads] = ("statistics",)

    kind: Literal["basis-sharing"]
    calibration: Name
    blocks: AtLeastTwo = Field(default=2, description="neighbouring blocks that share a basis")
    shared: Distinct[Text] | None = Field(
        default=None, min_length=1, description="types that share; null: those that read the residual stream"
    )

    @property
    def blocks_together(self) -> int:
        """As `blocks` says."""
        return self.blocks

    def stacks(self, budget: Budget) -> list[Stack]:
        """By type and group of blocks."""
        shared = types_of_stream(budget.dimensions.family) if self.shared is None else self.shared
        return stacks_by_blocks(budget, self.uncompressed, shared, self.blocks)

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Unknown types, and more blocks than there are."""
        from lowrank.errors import RankwiseError

        if self.blocks > budget.dimensions.layers:
            yield "blocks", f"{self.blocks} blocks cannot share where there are {budget.dimensions.layers}; take fewer"
        try:
            budget.types(self.shared or ())
        except RankwiseError as error:
            yield "shared", str(error)
            return
        if dense := [name for name in self.shared or () if name in self.uncompressed]:
            yield "shared", f"{', '.join(dense)} stay dense (`uncompressed`), so they share nothing; leave them out"


def compress(task: CompressionTask) -> Replacements:
    """Decompose the matrices of a type block group by block group, at the rank that one kept ratio buys.

    Raises:
        RankwiseError: a layer's inputs are all zero, or a decomposition fails; the layer is named.
    """
    from lowrank.compression.stacks import shared_pairs
    from lowrank.model.runtime import pick_device

    return shared_pairs(task, task.settings.ranks(task.budget, task.ratio), pick_device())

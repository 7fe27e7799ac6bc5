"""SkipCat (AAAI 2026): one first factor for matrices that read the same input, and an identity block in it.

- `cat`: q, k and v (gate and up) stand on top of each other, W, and one whitened decomposition of W gives them one
  A (r x n) and each its own B_i: r (n + sum m_i) parameters in place of r (k n + sum m_i).
- `skip`: A = [A_1 A_2] after a permutation of the inputs, with A_1 invertible; B A x = (B A_1) (x_1 + A_1^-1 A_2 x_2).
  The r^2 weights of A_1 are gone: r (m + n - r). A_1 is chosen by a strong rank-revealing QR decomposition, without
  which the entries of A_1^-1 A_2 leave the range of half precision (`compression.stacks`).

One kept ratio for all, counted in this form, so that ranks are larger than those of plain pairs. There was no program
of the authors to read. Ours beyond the paper: the permutation is stored and counted (n indices a factor), and ranks are
multiples of 8, with what rounding frees given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name
from lowrank.config.low_rank import StackedSettings
from lowrank.config.presets import Calibration, Reads
from lowrank.ranks.stacks import Stack, each_alone, stacks_by_input

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.replacements import Replacements
    from lowrank.ranks.budget import Budget


class Settings(StackedSettings):
    """SkipCat reads second moments."""

    reads: ClassVar[Reads] = ("statistics",)

    kind: Literal["skipcat"]
    calibration: Name
    cat: bool = Field(default=True, description="one first factor for q, k and v, and one for gate and up")
    skip: bool = Field(default=True, description="an identity block in every first factor")

    @property
    def identity_columns(self) -> bool:
        """With `skip`."""
        return self.skip

    @property
    def has_order(self) -> bool:
        """An identity block leaves the dimensions in no order."""
        return not self.skip

    def stacks(self, budget: Budget) -> list[Stack]:
        """By what they read, with `cat`."""
        return (stacks_by_input if self.cat else each_alone)(budget, self.uncompressed)

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Without both it is another method."""
        if not (self.cat or self.skip):
            yield "cat", "with `cat` and `skip` both false this is SVD-LLM; take `kind: svd-llm`, or one of them"

    @property
    def takes_experts(self) -> bool:
        """Gate and up of an expert read the same tokens."""
        return True


def compress(task: CompressionTask) -> Replacements:
    """Decompose every stack at the rank that one kept ratio buys.

    Raises:
        RankwiseError: a layer's inputs are all zero, a decomposition fails, or a factor has not its full rank; named.
    """
    from lowrank.compression.stacks import shared_pairs
    from lowrank.model.runtime import pick_device

    settings = task.settings
    return shared_pairs(task, settings.ranks(task.budget, task.ratio), pick_device(), settings.skip)

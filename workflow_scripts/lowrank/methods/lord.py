"""LoRD as the paper compares with it: principal bases with bias, and an allocation made by hand.

v stays dense; q and k are cut more than the rest, by just what pays for v (Section 4.1 of the paper; with
as many key/value as query heads that is 30 % on q and k for a budget of 20 %, and 45 % for 30 %; with fewer, less).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lowrank.config.base import Name
from lowrank.config.low_rank import RoundedSettings
from lowrank.config.presets import Calibration
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, Ranks, lord_kept
from lowrank.ranks.by_type import lord_ranks
from lowrank.ranks.rounding import Rounding

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(RoundedSettings):
    """LoRD reads the bases of one covariance."""

    kind: Literal["lord"]
    calibration: Name
    covariance: Name
    rounding: Rounding = Field(
        default="give-back",
        description="to multiples of 8; give-back: down, and what that frees is given back as far as the ratio allows; "
        "down: the published ranks, 8 floor(ceil(rank) / 8), whatever they add up to: mostly less than the ratio "
        "leaves, but 80.002 % of SmolLM2-135M at 20 %, where q and k keep 0.75, as its queries are grouped (0.70 is "
        "for v as large as q), a rank of 335.1 becomes 336, and biases come on top",
    )

    def kept_ratios(self, budget: Budget, ratio: int) -> dict[str, float]:
        """v dense, and q and k pay for it."""
        return lord_kept(budget, ratio)

    def ranks(self, budget: Budget, ratio: int) -> Ranks:
        """LoRD's."""
        return lord_ranks(budget, ratio, self.rounding)

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """q and k may be too small to pay for v."""
        try:
            self.kept_ratios(budget, ratio)
        except RankwiseError as error:
            yield "", str(error)

    @property
    def takes_experts(self) -> bool:
        """By the bases of each."""
        return True


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Slice the bases at LoRD's ranks."""
    from lowrank.search.allocation import sliced_factors

    return sliced_factors(task.required_bases(), task.model, task.budget, task.settings.ranks(task.budget, task.ratio))

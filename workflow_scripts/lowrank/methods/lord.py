"""LoRD as the paper compares with it: principal bases with bias, and an allocation made by hand.

v stays dense; q and k are cut more than the rest, by just what pays for v (Section 4.1 of the paper; with
as many key/value as query heads that is 30 % on q and k for a budget of 20 %, and 45 % for 30 %).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from lowrank.config.base import Name
from lowrank.config.low_rank import RoundedSettings
from lowrank.config.presets import Calibration
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, lord_kept

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(RoundedSettings):
    """LoRD reads the bases of one covariance."""

    kind: Literal["lord"]
    calibration: Name
    covariance: Name

    def kept_ratios(self, budget: Budget, ratio: int) -> dict[str, float]:
        """v dense, and q and k pay for it."""
        return lord_kept(budget, ratio)

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """q and k may be too small to pay for v."""
        try:
            self.kept_ratios(budget, ratio)
        except RankwiseError as error:
            yield "", str(error)


def compress(task: CompressionTask) -> dict[str, LowRankFactors]:
    """Slice the bases at LoRD's ranks."""
    from lowrank.search.allocation import lord_ranks, sliced_factors

    ranks = lord_ranks(task.budget, task.ratio, task.settings.rounding)
    return sliced_factors(task.required_bases(), task.budget, ranks)

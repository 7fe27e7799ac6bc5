"""Bolaco: principal bases of pooled covariances, with ranks found by Bayesian optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lowrank.config.base import Name
from lowrank.config.low_rank import LowRankSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(LowRankSettings):
    """Bolaco reads bases, and the allocation that its search found on its validation windows.

    With a `transfer` the search begins with the kept ratios found for another model; a search of one evaluation then
    takes them as they are.
    """

    kind: Literal["bolaco"]
    calibration: Name
    covariance: Name
    validation: Name
    search: Name
    groups: Annotated[int, Field(ge=1)] = Field(default=1, description="groups of layers: 5x1 has 1, 5x4 has 4")
    uncompressed: tuple[str, ...] = Field(default=("v",), description="types that stay dense")

    @property
    def takes_experts(self) -> bool:
        """By the bases of each; experts of a block share the rank that a type gets."""
        return True


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Slice the bases at the ranks of the allocation."""
    from lowrank.errors import RankwiseError
    from lowrank.search.allocation import sliced_factors

    if task.allocation is None:
        raise RankwiseError("bolaco: no allocation was given; its preset needs `search` and `validation`")
    return sliced_factors(task.required_bases(), task.model, task.budget, task.allocation)

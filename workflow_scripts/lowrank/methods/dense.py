"""The model as it is, so that it stands in every table under the same protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lowrank.config.presets import MethodSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(MethodSettings):
    """The dense model has no settings."""

    makes_pairs: ClassVar[bool] = False

    kind: Literal["dense"]

    @property
    def takes_experts(self) -> bool:
        """Nothing is done to them."""
        return True


def compress(task: CompressionTask) -> dict[str, LowRankFactors]:
    """Nothing becomes low rank."""
    return {}

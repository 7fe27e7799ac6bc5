"""What the presets of all methods that make low-rank pairs may name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from lowrank.config.presets import Covariance, MethodSettings

if TYPE_CHECKING:
    from lowrank.ranks.budget import Budget


class LowRankSettings(MethodSettings):
    """A method whose `compress` returns pairs; what it chooses here is done to them by `compression.compress_model`.

    Attributes:
        identity_block: store every pair with an identity block in its second factor, which frees r^2 weights less r
            indices. The method's budget counts so, hence its ranks are larger at the same ratio.
    """

    identity_block: bool = Field(
        default=False, description="store pairs with an identity block: the same map, and more rank a parameter"
    )

    def budget_of_pairs(self, budget: Budget, covariance: Covariance | None) -> Budget:
        """A model's budget with the form of this preset's pairs, as `compression.compress_model` has it of the bases.

        Args:
            budget: of the model.
            covariance: of its bases; without any, a dense layer's own bias stays and none is added.
        """
        adds_bias = covariance is not None and covariance.centred
        return replace(budget, identity_block=self.identity_block, adds_bias=adds_bias)

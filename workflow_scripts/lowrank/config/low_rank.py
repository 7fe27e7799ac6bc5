"""What the presets of all methods that make low-rank pairs may name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from lowrank.config.presets import Covariance, MethodSettings
from lowrank.ranks.budget import Budget, Ranks, uniform_kept
from lowrank.ranks.by_type import uniform_ranks
from lowrank.ranks.rounding import Rounding


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


class RoundedSettings(LowRankSettings):
    """A method whose kept ratios need no search and no data; what is left to choose is how they become ranks."""

    beside_ratio: ClassVar[str] = "rounding"

    rounding: Rounding = Field(
        default="give-back",
        description="to multiples of 8; give-back: down, and what that frees is given back as far as the ratio allows; "
        "down: 8 floor(ceil(rank) / 8), at least 8, as the paper's authors have it, whatever the ranks add up to",
    )

    @property
    def rounds_down(self) -> bool:
        """Whether ranks are those that the authors' rule makes of `kept_ratios`, whatever they add up to."""
        return self.authors_rule({name: getattr(self, name) for name in type(self).model_fields})

    @abstractmethod
    def kept_ratios(self, budget: Budget, ratio: int) -> dict[str, float]:
        """Type of matrix -> the ratio that it keeps before rounding.

        Raises:
            RankwiseError: the ratio is out of reach.
        """

    @abstractmethod
    def ranks(self, budget: Budget, ratio: int) -> Ranks:
        """The rank of every matrix.

        Raises:
            RankwiseError: the ratio is out of reach.
        """

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """Those of the pairs and of what stays dense."""
        return budget.parameters(self.ranks(budget, ratio))

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """The authors' ranks are those of plain pairs."""
        reason = "the published ranks (`rounding: down`) are those of plain pairs"
        return super().unread(given) | ({"identity_block": reason} if cls.authors_rule(given) else {})

    @classmethod
    def authors_rule(cls, given: Mapping[str, Any]) -> bool:
        """Whether the keys of a preset ask for the authors' ranks, see `rounds_down`."""
        return given.get("rounding") == "down"


class UniformSettings(RoundedSettings):
    """A method with one kept ratio for all matrices that it compresses, or (ASVD) one that may have it."""

    uncompressed: tuple[str, ...] = Field(default=(), description="types that stay dense")

    def kept_ratios(self, budget: Budget, ratio: int) -> dict[str, float]:
        """One for all types but those that stay dense."""
        return uniform_kept(budget, ratio, self.uncompressed)

    def ranks(self, budget: Budget, ratio: int) -> Ranks:
        """Those that one kept ratio buys."""
        return uniform_ranks(budget, ratio, self.uncompressed, self.rounding)

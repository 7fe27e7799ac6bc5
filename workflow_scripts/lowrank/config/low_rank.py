"""What the presets of methods that make low-rank pairs may name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from lowrank.config.presets import Calibration, Covariance, MethodSettings
from lowrank.ranks.budget import Budget, Ranks, uniform_kept
from lowrank.ranks.by_type import uniform_ranks
from lowrank.ranks.rounding import Rounding
from lowrank.ranks.stacks import Stack, StackedBudget, stacked_budget, uniform_stacks


class LowRankSettings(MethodSettings):
    """A method whose `compress` returns pairs; what it chooses here is done to them by `compression.compress_model`.

    Attributes:
        identity_block: store every pair with an identity block in its second factor, which frees r^2 weights less r
            indices. The method's budget counts so, hence its ranks are larger at the same ratio.
        counts_windows: a key that says how many of the calibration's windows are read; so many must be there.
    """

    counts_windows: ClassVar[str] = ""

    identity_block: bool = Field(
        default=False, description="store pairs with an identity block: the same map, and more rank a parameter"
    )

    @property
    def has_order(self) -> bool:
        """An identity block leaves the dimensions in no order."""
        return not self.identity_block

    def budget_of_pairs(self, budget: Budget, covariance: Covariance | None) -> Budget:
        """A model's budget with the form of this preset's pairs, as `compression.compress_model` has it of the bases.

        Args:
            budget: of the model.
            covariance: of its bases; without any, a dense layer's own bias stays and none is added.
        """
        adds_bias = covariance is not None and covariance.centred
        return replace(budget, identity_block=self.identity_block, adds_bias=adds_bias)

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """A calibration with fewer windows than are asked for."""
        asked = getattr(self, self.counts_windows) if self.counts_windows else None
        if calibration and asked is not None and asked > calibration.windows:
            yield (
                self.counts_windows,
                f"{asked} windows are more than the calibration '{self.calibration}' has ({calibration.windows}); "
                "calibrate on more, or take fewer",
            )


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


class StackedSettings(MethodSettings):
    """A method whose matrices share first factors, at one kept ratio for all.

    Attributes:
        blocks_together: how many blocks a stack may be of.
    """

    uncompressed: tuple[str, ...] = Field(default=(), description="types that stay dense")

    @property
    def blocks_together(self) -> int:
        """One, unless a method says more."""
        return 1

    @property
    def identity_columns(self) -> bool:
        """Whether first factors hold an identity block."""
        return False

    @abstractmethod
    def stacks(self, budget: Budget) -> list[Stack]:
        """Which matrices share a factor.

        Raises:
            RankwiseError: an unknown type.
        """

    def stacked_budget(self, budget: Budget) -> StackedBudget:
        """What ranks of them cost."""
        return stacked_budget(budget, self.stacks(budget), self.identity_columns, self.blocks_together)

    def ranks(self, budget: Budget, ratio: int) -> list[tuple[Stack, int]]:
        """The stacks that do not stay dense, and the ranks that one kept ratio buys.

        Raises:
            RankwiseError: the ratio is out of reach.
        """
        return uniform_stacks(self.stacked_budget(budget), self.stacks(budget), ratio, self.uncompressed)

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """Those of the pairs, first factors counted once, and of what stays dense."""
        ranks: Ranks = {stack.module.name: rank for stack, rank in self.ranks(budget, ratio)}
        return self.stacked_budget(budget).parameters(ranks)

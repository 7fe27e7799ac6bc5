"""What methods without a search share: one kept ratio for all layers."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.by_type import uniform_ranks
from lowrank.ranks.rounding import Rounding


def uniform_layers(
    budget: Budget, ratio: int, uncompressed: Sequence[str], rounding: Rounding = "give-back"
) -> list[tuple[LinearModule, int]]:
    """The layers to compress, block by block, and their ranks (`uniform_ranks`); none if nothing is to be removed.

    Raises:
        RankwiseError: the ratio is out of reach, or a type is unknown.
    """
    ranks: Ranks = uniform_ranks(budget, ratio, uncompressed, rounding) if ratio else {}
    return layers_with_ranks(budget, ranks)


def layers_with_ranks(budget: Budget, ranks: Ranks) -> list[tuple[LinearModule, int]]:
    """The layers that an allocation does not leave dense, block by block."""
    found = [(module, ranks.get(module.name)) for module in budget.modules]
    return [(module, rank) for module, rank in found if rank is not None]

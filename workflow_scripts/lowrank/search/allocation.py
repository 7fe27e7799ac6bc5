"""Allocations that need no search, and how an allocation becomes factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank.bases.principal import Bases
from lowrank.errors import RankwiseError
from lowrank.model.factors import LowRankFactors
from lowrank.ranks.budget import Budget, Ranks, authors_ranks, lord_kept, uniform_kept
from lowrank.ranks.rounding import Rounding
from lowrank.search.kept_ratios import SearchSpace

_NO_LOWER_BOUND = 0.0


def uniform_ranks(budget: Budget, ratio: int, uncompressed: Sequence[str], rounding: Rounding = "give-back") -> Ranks:
    """The same kept ratio for every compressed matrix, as ranks.

    Args:
        budget: of the model, with the form of the pairs.
        ratio: percent removed.
        uncompressed: types that stay dense.
        rounding: `give-back` meets the budget; `down` is the rule of the paper's authors, which does not look at it.
    """
    if rounding == "down":
        return authors_ranks(budget, uniform_kept(budget, ratio, uncompressed))
    space = SearchSpace(budget, ratio, groups=1, uncompressed=uncompressed, lower=_NO_LOWER_BOUND)
    return space.ranks(space.uniform())


def lord_ranks(budget: Budget, ratio: int, rounding: Rounding) -> Ranks:
    """LoRD's ranks.

    Args:
        budget: of the model.
        ratio: percent removed.
        rounding: `give-back` gives back what rounding frees, as for the methods it is compared with. `down` rounds as
            the paper's authors do, whatever the ranks add up to: mostly less than asked for, but of SmolLM2-135M at
            20 %, where q and k keep 0.75, since its queries are grouped (0.70 is for v as large as q), it keeps
            80.002 %, as the ceiling lifts gate's and up's 335.1 to 336 and biases come on top.
    """
    kept = lord_kept(budget, ratio)
    if rounding == "down":
        return authors_ranks(budget, kept)
    space = SearchSpace(budget, ratio, groups=1, uncompressed=("v",), lower=_NO_LOWER_BOUND)
    return space.ranks(lord_point(space))


def lord_point(space: SearchSpace) -> np.ndarray:
    """LoRD's kept ratios as a point of a search space, which meets its budget but for the biases that are added.

    Raises:
        RankwiseError: LoRD keeps other types dense than the space does, or cannot remove that much.
    """
    if extra := [name for name in space.uncompressed if name != "v"]:
        raise RankwiseError(f"LoRD keeps v alone dense, and here {', '.join(extra)} stays dense as well")
    kept = lord_kept(space.budget, space.ratio)
    by_variable = {module.type.tied: kept[module.type.name] for module in space.budget.modules}
    return np.array([by_variable[name.split("/")[0]] for name in space.names])


def sliced_factors(bases: Bases, budget: Budget, ranks: Ranks) -> dict[str, LowRankFactors]:
    """The factors of every layer that an allocation does not leave dense."""
    factors: dict[str, LowRankFactors] = {}
    for module in budget.modules:
        rank = ranks.get(module.name)
        if rank is not None:
            factors[module.name] = bases.of(module.layer, module.type.name).factors(rank)
    return factors

"""Ranks of methods without a search: a kept ratio for each type of matrix, from shapes alone.

The config check, which must know before anything runs what a row will keep, and the methods themselves read this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowrank.errors import RankwiseError
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget, Ranks, authors_ranks, lord_kept, uniform_kept
from lowrank.ranks.reach import why_out_of_reach
from lowrank.ranks.rounding import Rounder, Rounding, Unit


def uniform_ranks(budget: Budget, ratio: int, uncompressed: Sequence[str], rounding: Rounding = "give-back") -> Ranks:
    """The same kept ratio for every compressed matrix, as ranks.

    Args:
        budget: of the model, with the form of the pairs.
        ratio: percent removed.
        uncompressed: types that stay dense.
        rounding: `give-back` meets the budget; `down` is the rule of the paper's authors, which does not look at it.

    Raises:
        RankwiseError: the ratio is out of reach, or a type is unknown.
    """
    if rounding == "down":
        return authors_ranks(budget, uniform_kept(budget, ratio, uncompressed))
    free = _free(budget, ratio, uncompressed)
    modules = [module for members in free.values() for module in members]
    size, biases = sum(module.parameters for module in modules), sum(budget.cost(module, 0) for module in modules)
    kept = (budget.allowed(ratio) - (budget.dense_parameters - size) - biases) / size
    return _given_back(budget, ratio, free, {name: kept for name, _ in free})


def lord_ranks(budget: Budget, ratio: int, rounding: Rounding) -> Ranks:
    """LoRD's ranks.

    Args:
        budget: of the model.
        ratio: percent removed.
        rounding: `give-back` gives back what rounding frees, as for the methods it is compared with. `down` rounds as
            the paper's authors do, whatever the ranks add up to: mostly less than asked for, but of SmolLM2-135M at
            20 %, where q and k keep 0.75, since its queries are grouped (0.70 is for v as large as q), it keeps
            80.002 %, as the ceiling lifts gate's and up's 335.1 to 336 and biases come on top.

    Raises:
        RankwiseError: the ratio is out of reach.
    """
    kept = lord_kept(budget, ratio)
    if rounding == "down":
        return authors_ranks(budget, kept)
    return _given_back(budget, ratio, _free(budget, ratio, ["v"]), kept)


def _free(budget: Budget, ratio: int, uncompressed: Sequence[str]) -> dict[tuple[str, int], list[LinearModule]]:
    """Type and m -> its matrices, of the types that are compressed; only stacks of one type may differ in m.

    Raises:
        RankwiseError: the ratio is out of reach, or a type is unknown.
    """
    modules = budget.free(uncompressed)
    if why := why_out_of_reach(budget, ratio, uncompressed, 0.0):
        raise RankwiseError(why)
    free: dict[tuple[str, int], list[LinearModule]] = {}
    for module in modules:
        free.setdefault((module.type.name, module.out_features), []).append(module)
    return free


def _given_back(
    budget: Budget, ratio: int, free: Mapping[tuple[str, int], Sequence[LinearModule]], kept: Mapping[str, float]
) -> Ranks:
    """The ranks of kept ratios by type, with what their rounding frees given back."""
    units = [Unit(index, tuple(members)) for index, members in enumerate(free.values())]
    rounder = Rounder(budget, units, "give-back")
    ratios = [kept[name] for name, _ in free]
    size = sum(rounder.cost(index, None) for index in range(len(units)))
    allowed = math.floor(budget.allowed(ratio)) - (budget.dense_parameters - size)
    wanted = sum(share * rounder.cost(index, None) + rounder.cost(index, 0) for index, share in enumerate(ratios))
    ranks: Ranks = {module.name: None for module in budget.modules}
    for unit, rank in zip(units, rounder.choose(ratios, allowed, round(wanted)), strict=True):
        ranks |= {module.name: rank for module in unit.modules}
    return ranks

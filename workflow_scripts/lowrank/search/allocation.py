"""LoRD's allocation as a start of searches, and how an allocation becomes factors."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from lowrank.bases.principal import Bases
from lowrank.errors import RankwiseError
from lowrank.model.factors import LowRankFactors
from lowrank.model.replacements import Deferred
from lowrank.ranks.budget import Budget, Ranks, lord_kept
from lowrank.search.kept_ratios import SearchSpace


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


def sliced_factors(bases: Bases, model: PreTrainedModel, budget: Budget, ranks: Ranks) -> Deferred[LowRankFactors]:
    """The factors of every layer that an allocation does not leave dense, sliced when they are asked for.

    Args:
        bases: of the model.
        model: in which a layer is dense as long as its factors may be asked for.
        budget: of the model.
        ranks: of the allocation.
    """
    modules = {module.name: module for module in budget.modules if ranks.get(module.name) is not None}

    def sliced(name: str) -> LowRankFactors:
        rank = ranks[name]
        assert rank is not None
        weight = model.get_submodule(name).weight
        return bases.of(modules[name].layer, modules[name].type.key, weight).factors(rank)

    return Deferred(modules, sliced)

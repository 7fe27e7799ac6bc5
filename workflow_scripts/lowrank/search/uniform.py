"""What methods without a search share: one kept ratio for all layers, and the first calibration windows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget, Ranks
from lowrank.search.allocation import uniform_ranks

log = logging.getLogger(__name__)


def uniform_layers(budget: Budget, ratio: int, uncompressed: Sequence[str]) -> list[tuple[LinearModule, int]]:
    """The layers to compress, block by block, and their ranks; none if nothing is to be removed.

    Raises:
        RankwiseError: the ratio is out of reach, or a type is unknown.
    """
    ranks: Ranks = uniform_ranks(budget, ratio, uncompressed) if ratio else {}
    return layers_with_ranks(budget, ranks)


def layers_with_ranks(budget: Budget, ranks: Ranks) -> list[tuple[LinearModule, int]]:
    """The layers that an allocation does not leave dense, block by block."""
    found = [(module, ranks.get(module.name)) for module in budget.modules]
    return [(module, rank) for module, rank in found if rank is not None]


def first_windows(tokens: torch.Tensor, count: int | None, key: str) -> torch.Tensor:
    """The first calibration windows, all if there are fewer.

    Args:
        tokens: windows x length token ids.
        count: how many at most, or None for all.
        key: the setting that says so, for the log.
    """
    if count is not None and count > len(tokens):
        log.info("`%s: %d`: the calibration has %d windows; all are used", key, count, len(tokens))
    return tokens[:count]

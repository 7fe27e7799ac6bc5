"""Ranks by first-order changes of the loss: directions leave one by one, over all matrices of a model.

A matrix offers the last of the directions that it still has. Its change of the loss may have either sign, since near a
minimum the first order is small and the sign is what the calibration text says. Two ways to choose among the offers:

- balanced, the zero sum of ZS-SVD: while the sum of the changes so far is not above zero, the smallest change that is
  not negative is taken, else the negative one of smallest size; if there is none of that sign, one of the other;
- else the smallest in size, whatever its sign (IO-SVD).

It stops when what stays meets the budget. A direction that leaves a matrix above its break-even rank frees nothing; a
matrix that ends there is dense again, and its directions are not missed. The ranks are then rounded as all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from lowrank.errors import RankwiseError
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from lowrank.ranks.reach import smallest_choice
from lowrank.ranks.rounding import pair_or_dense, rounded_ranks

MEANING = "first order, on the calibration text"
"""What a predicted change of the loss is."""
Changes = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class GreedyAllocation:
    """Ranks, and the sum of the changes of the directions that they leave out.

    Attributes:
        ranks: module -> rank, None for dense.
        change: predicted change of the mean loss per token, in nats; of either sign.
    """

    ranks: Ranks
    change: float


def greedy_ranks(
    budget: Budget, ratio: int, changes: Changes, uncompressed: Sequence[str] = (), balanced: bool = True
) -> GreedyAllocation:
    """Choose the ranks of a model.

    Args:
        budget: of the model, with the form of the pairs; without biases that these add.
        ratio: percent of the linear layers' parameters to remove; 0 leaves all of them dense.
        changes: module -> predicted change of the loss on leaving out each of its min(m, n) directions, in the order
            in which ranks grow.
        uncompressed: types that stay dense.
        balanced: by the zero sum; else by size.

    Raises:
        RankwiseError: the smallest ranks exceed the budget, or a type is unknown.
    """
    free = budget.free(uncompressed)
    ranks: Ranks = {module.name: None for module in budget.modules}
    if not ratio:
        return GreedyAllocation(ranks, 0.0)
    fixed = budget.dense_parameters - sum(module.parameters for module in free)
    allowed = int(budget.allowed(ratio)) - fixed
    least = {module.name: smallest_choice(budget, module) for module in free}
    if (stays := sum(budget.cost(module, least[module.name]) for module in free)) > allowed:
        raise RankwiseError(
            f"removing {ratio} % is impossible: with {', '.join(uncompressed) or 'nothing'} dense and ranks of at "
            f"least {ALIGNMENT}, {100 * (stays + fixed) / budget.dense_parameters:.1f} % stays. Compress more types, "
            f"or remove less.{budget.left_dense_why}"
        )
    wanted = _wanted_ranks(budget, free, changes, least, allowed, balanced)
    ranks |= rounded_ranks(budget, ratio, wanted)
    left_out = [changes[name][rank:].sum() for name, rank in ranks.items() if rank is not None]
    return GreedyAllocation(ranks, float(sum(left_out)))


def _wanted_ranks(
    budget: Budget,
    modules: Sequence[LinearModule],
    changes: Changes,
    least: Mapping[str, int | None],
    allowed: int,
    balanced: bool,
) -> dict[str, int]:
    """The ranks, not rounded, at which directions no longer have to leave."""
    by_name = {module.name: module for module in modules}
    ranks = {name: len(changes[name]) for name in by_name}
    stays = sum(module.parameters for module in modules)
    offers, total = _Offers(balanced), 0.0

    def offer(name: str) -> None:
        smallest = least[name]
        if smallest is not None and ranks[name] > smallest:
            offers.add(float(changes[name][ranks[name] - 1]), name)

    for name in by_name:
        offer(name)
    while stays > allowed:
        change, name = offers.take(total <= 0)
        total += change
        module, rank = by_name[name], ranks[name]
        stays -= pair_or_dense(budget, module, rank) - pair_or_dense(budget, module, rank - 1)
        ranks[name] = rank - 1
        offer(name)
    return ranks


class _Offers:
    """The changes that may be taken next, of both signs apart; equal ones in the order in which they came."""

    def __init__(self, balanced: bool) -> None:
        self._balanced = balanced
        self._heaps: dict[bool, list[tuple[float, int, float, str]]] = {True: [], False: []}
        self._count = 0

    def add(self, change: float, name: str) -> None:
        raising = change >= 0 or not self._balanced  # by size alone, one heap holds all
        heappush(self._heaps[raising], (abs(change), self._count, change, name))
        self._count += 1

    def take(self, raising: bool) -> tuple[float, str]:
        """The smallest change that raises the loss or, if that is not wanted or not there, that lowers it."""
        heap = self._heaps[raising] or self._heaps[not raising]
        _, _, change, name = heappop(heap)
        return change, name

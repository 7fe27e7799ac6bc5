"""From kept ratios to ranks: multiples of 8 that never exceed the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

from lowrank.errors import RankwiseError
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from lowrank.ranks.reach import largest_rank_worth_it, smallest_choice

Rounding = Literal["give-back", "down"]
DENSE = 1 - 1e-9
"""A kept ratio from here on means dense; optimisers meet a bound of 1 only to the last digits."""

Choice = int | None
"""The rank of a unit, or None for dense."""


@dataclass(frozen=True)
class Unit:
    """The matrices of one type in one group of layers; they have one shape and get one rank.

    Attributes:
        variable: index of the search variable.
        modules: the matrices.
        upper: largest kept ratio.
    """

    variable: int
    modules: tuple[LinearModule, ...]
    upper: float = 1.0


class Rounder:
    """Rounds the kept ratios of some units to ranks.

    A ratio of 1 or more means dense, and so does a rank that is not worth it. Two ways:

    - `down`: 8 floor(ceil(rank of the ratio) / 8), at least 8, as the paper's authors compute it. The ceiling, the
      least rank of 8 and a layer left dense can cost more than was asked for, so ranks shrink if the budget is
      exceeded.
    - `give-back`: 8 floor(rank of the ratio / 8); what this frees goes back in steps of 8, always to the unit that is
      cut most of those whose next step fits and stays within their upper bound, until there is none. So of two units
      of one shape and one ratio the first may get a step that fits only once.
    """

    def __init__(self, budget: Budget, units: Sequence[Unit], how: Rounding) -> None:
        self.budget, self.units, self.how = budget, units, how
        self.largest = [largest_rank_worth_it(budget, unit.modules[0]) for unit in units]
        self.smallest = [smallest_choice(budget, unit.modules[0]) for unit in units]

    def choose(self, ratios: Sequence[float], allowed: int, wanted: float) -> list[Choice]:
        """A rank for each unit.

        Args:
            ratios: kept ratio of each unit.
            allowed: parameters that the units may hold together.
            wanted: what they would hold if ranks were no whole numbers; nothing is given back above it.

        Raises:
            RankwiseError: even the smallest ranks exceed the budget.
        """
        down = self._down if self.how == "down" else self._below
        choices = [down(index, ratio) for index, ratio in enumerate(ratios)]
        self._shrink(choices, ratios, allowed)
        if self.how == "give-back":
            self._give_back(choices, ratios, min(allowed, wanted))
        return choices

    def cost(self, index: int, choice: Choice) -> int:
        """Parameters of a unit."""
        modules = self.units[index].modules
        return len(modules) * self.budget.cost(modules[0], choice)

    def _rank(self, index: int, ratio: float) -> float:
        """The rank, not rounded, at which a matrix of a unit keeps a ratio of its parameters."""
        return self.budget.rank_of_share(self.units[index].modules[0], ratio)

    def _down(self, index: int, ratio: float) -> Choice:
        rank = ALIGNMENT * (math.ceil(self._rank(index, ratio) - 1e-9) // ALIGNMENT)
        rank = max(ALIGNMENT, rank)
        return None if ratio >= DENSE or rank > self.largest[index] else rank

    def _below(self, index: int, ratio: float) -> Choice:
        rank = ALIGNMENT * (int(self._rank(index, ratio) + 1e-9) // ALIGNMENT)
        if ratio >= DENSE or rank > self.largest[index]:
            return None
        return rank if rank else self.smallest[index]

    def _shrink(self, choices: list[Choice], ratios: Sequence[float], allowed: int) -> None:
        """Take steps of 8, first from units that got more than they asked for, and from the largest ranks."""
        while sum(self.cost(index, choice) for index, choice in enumerate(choices)) > allowed:
            above = [index for index, choice in enumerate(choices) if choice != self.smallest[index]]
            if not above:
                raise RankwiseError(
                    f"no allocation fits the budget with ranks in steps of {ALIGNMENT}: even the smallest exceed it. "
                    "Compress more types, or remove less."
                )

            def excess(index: int) -> tuple[bool, float]:
                choice = choices[index]
                rank = self._rank(index, 1.0) if choice is None else choice
                return rank > self._rank(index, ratios[index]) + 1e-6, rank

            most = max(above, key=excess)
            choices[most] = self._lowered(most, choices[most])

    def _lowered(self, index: int, choice: Choice) -> Choice:
        aligned = self.largest[index] // ALIGNMENT * ALIGNMENT if choice is None else choice - ALIGNMENT
        return aligned or self.smallest[index]

    def _give_back(self, choices: list[Choice], ratios: Sequence[float], allowed: float) -> None:
        """Raise whichever unit is cut most, until no unit's next step fits.

        A unit whose next step does not fit is done with: what is left only shrinks, and its step stays what it is.
        """

        def cut(index: int) -> float:
            choice = choices[index]
            exact = self._rank(index, ratios[index]) - (self._rank(index, 1.0) if choice is None else choice)
            return round(exact, 9)  # equal cuts are told apart by their place, not by rounding errors

        left = allowed - sum(self.cost(index, choice) for index, choice in enumerate(choices))
        units = [(-cut(index), index) for index in range(len(choices))]
        heapify(units)
        while units:
            _, index = heappop(units)
            raised = self._raised(index, choices[index])
            extra = self.cost(index, raised) - self.cost(index, choices[index])
            if 0 < extra <= left:
                choices[index] = raised
                left -= extra
                heappush(units, (-cut(index), index))

    def _raised(self, index: int, choice: Choice) -> Choice:
        """A step of 8 up, or dense where a pair of that rank is not worth it; unchanged beyond the upper bound."""
        unit = self.units[index]
        if choice is None:
            return None
        raised = choice + ALIGNMENT
        if raised > self.largest[index]:
            return None if unit.upper >= 1 else choice
        return raised if raised <= self._rank(index, unit.upper) + 1e-9 else choice


def pair_or_dense(budget: Budget, module: LinearModule, rank: int) -> int:
    """Parameters of a matrix at a rank, or dense where that is no more."""
    return min(budget.cost(module, rank), module.parameters)


def rounded_ranks(budget: Budget, ratio: int, wanted: Mapping[str, int]) -> Ranks:
    """Ranks that differ from matrix to matrix, rounded by `give-back`, each matrix by itself.

    Args:
        budget: of the model; matrices that `wanted` does not name stay dense.
        ratio: percent of the linear layers' parameters to remove.
        wanted: module -> a rank that need be no multiple of 8; above the break-even rank the matrix is dense.

    Raises:
        RankwiseError: even the smallest ranks exceed the budget.
    """
    free = [module for module in budget.modules if module.name in wanted]
    allowed = int(budget.allowed(ratio)) - budget.dense_parameters + sum(module.parameters for module in free)
    shares = [pair_or_dense(budget, module, wanted[module.name]) / module.parameters for module in free]
    rounder = Rounder(budget, [Unit(index, (module,)) for index, module in enumerate(free)], "give-back")
    chosen = rounder.choose(shares, allowed, allowed)
    return {module.name: choice for module, choice in zip(free, chosen, strict=True)}

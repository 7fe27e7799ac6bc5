"""The variables of the rank search: one kept ratio per type of matrix and group of layers, under a budget.

Types that are tied (q and k) share a ratio; each matrix applies it to its own break-even rank. The budget is
one linear equation in the variables, so points are sampled and optimised on its face and never rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lowrank.budget import ALIGNMENT, Budget, Ranks, break_even_rank, largest_rank
from lowrank.errors import RankwiseError
from lowrank.families import LinearModule

_UPPER = 1.0
_BURN_IN, _THINNING = 500, 20


def layer_groups(layers: int, groups: int) -> list[list[int]]:
    """Split 0..layers-1 into consecutive groups whose sizes differ by one at most, the larger ones first."""
    if not 1 <= groups <= layers:
        raise RankwiseError(f"`groups: {groups}`: a model of {layers} layers can have 1 to {layers} groups")
    return [part.tolist() for part in np.array_split(np.arange(layers), groups)]


@dataclass(frozen=True)
class Unit:
    """The matrices of one type in one group of layers; they get one rank.

    Attributes:
        variable: index of the search variable.
        modules: the matrices.
    """

    variable: int
    modules: tuple[LinearModule, ...]


class SearchSpace:
    """Kept ratios in [lower, 1] per (tied type, group), with the budget met exactly before rounding.

    Attributes:
        names: variable names, `type/group`.
        weights: d, share of all linear parameters that each variable governs.
        total: the share that the variables may keep together: weights . x = total.
    """

    def __init__(self, budget: Budget, ratio: int, groups: int, uncompressed: Sequence[str], lower: float) -> None:
        """Build the space.

        Raises:
            RankwiseError: the budget cannot be met with these bounds, or a type is unknown.
        """
        self.budget, self.ratio, self.lower = budget, ratio, lower
        self.groups = layer_groups(budget.dimensions.layers, groups)
        budget.types(uncompressed)
        group_of = {layer: index for index, layers in enumerate(self.groups) for layer in layers}
        self.names: list[str] = []
        units: dict[tuple[str, int], list[LinearModule]] = {}
        for module in budget.modules:
            if module.type.name not in uncompressed:
                units.setdefault((module.type.name, group_of[module.layer]), []).append(module)
        self.units: list[Unit] = []
        for (_, group), modules in units.items():
            name = f"{modules[0].type.tied}/{group}"
            if name not in self.names:
                self.names.append(name)
            self.units.append(Unit(self.names.index(name), tuple(modules)))
        self.weights, self.total = self._budget_equation()
        self._check_feasible()

    def _budget_equation(self) -> tuple[np.ndarray, float]:
        dense = self.budget.dense_parameters
        weights = np.zeros(len(self.names))
        added = 0
        for unit in self.units:
            for module in unit.modules:
                weights[unit.variable] += module.parameters / dense
                added += self.budget.cost(module, 0)  # the biases that the low-rank form adds
        fixed = dense - sum(module.parameters for unit in self.units for module in unit.modules)
        return weights, (self.budget.allowed(self.ratio) - fixed - added) / dense

    def _check_feasible(self) -> None:
        least, most = self.lower * self.weights.sum(), _UPPER * self.weights.sum()
        if not least < self.total < most:
            raise RankwiseError(
                f"removing {self.ratio} % is impossible here: the compressible matrices can keep "
                f"{100 * least:.1f} to {100 * most:.1f} % of all linear parameters, and the budget leaves them "
                f"{100 * self.total:.1f} %. Lower `lower`, compress more types, or remove less."
            )

    def uniform(self) -> np.ndarray:
        """The point where every variable keeps the same share."""
        return np.full(len(self.names), self.total / self.weights.sum())

    def sample(self, count: int, seed: int) -> np.ndarray:
        """count x d points, uniform on the face of the polytope where the budget is spent (hit and run)."""
        from botorch.utils.sampling import get_polytope_samples

        d = len(self.names)
        if d == 1:
            return np.repeat(self.uniform()[None], count, axis=0)
        samples = get_polytope_samples(
            n=count,
            bounds=self.bounds(),
            equality_constraints=[self.constraint()],
            seed=seed,
            n_burnin=_BURN_IN,
            n_thinning=_THINNING,
        )
        points: np.ndarray = np.clip(samples.numpy(), self.lower, _UPPER)
        return points

    def bounds(self) -> torch.Tensor:
        """2 x d, lower and upper bounds."""
        return torch.tensor([[self.lower], [_UPPER]], dtype=torch.double).repeat(1, len(self.names))

    def constraint(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The budget as BoTorch's (indices, coefficients, right-hand side)."""
        return torch.arange(len(self.names)), torch.tensor(self.weights, dtype=torch.double), self.total

    def ranks(self, x: np.ndarray) -> Ranks:
        """The ranks of a point: rounded down to multiples of 8, then the budget that this freed is given back.

        It goes, one step of 8 each, to the units that rounding cut most, as long as it fits; so the budget is
        never exceeded, and hardly missed. A unit whose ratio reaches 1, or whose rank would not be worth it,
        stays dense if the budget allows.
        """
        choice: list[int | None] = [self._rounded_down(unit, x) for unit in self.units]
        allowed = self.budget.allowed(self.ratio)
        self._shrink_to(allowed, choice)
        spent = self._spent(choice)
        order = sorted(range(len(self.units)), key=lambda index: -self._cut(self.units[index], x, choice[index] or 0))
        for index in order:
            raised = self._raised(self.units[index], choice[index])
            extra = self._cost(self.units[index], raised) - self._cost(self.units[index], choice[index])
            if spent + extra <= allowed:
                choice[index] = raised
                spent += extra
        ranks: Ranks = {module.name: None for module in self.budget.modules}
        for unit, rank in zip(self.units, choice, strict=True):
            ranks |= {module.name: rank for module in unit.modules}
        return ranks

    def _shrink_to(self, allowed: float, choice: list[int | None]) -> None:
        """Take steps of 8 from the largest ranks while the budget is exceeded (ranks are never below 8)."""
        while self._spent(choice) > allowed:
            largest = max(range(len(choice)), key=lambda index: choice[index] or 0)
            rank = choice[largest] or 0
            if rank <= ALIGNMENT:
                raise RankwiseError(
                    f"removing {self.ratio} % is impossible with ranks in steps of {ALIGNMENT}: even the smallest "
                    "exceed the budget. Compress more types, or remove less."
                )
            choice[largest] = rank - ALIGNMENT

    def _rounded_down(self, unit: Unit, x: np.ndarray) -> int:
        module = unit.modules[0]
        rank = int(x[unit.variable] * break_even_rank(module.out_features, module.in_features) + 1e-9)
        largest = largest_rank(module.out_features, module.in_features)
        return max(1, min(max(ALIGNMENT, rank // ALIGNMENT * ALIGNMENT), largest))

    def _cut(self, unit: Unit, x: np.ndarray, rank: int) -> float:
        module = unit.modules[0]
        return float(x[unit.variable]) * break_even_rank(module.out_features, module.in_features) - rank

    def _raised(self, unit: Unit, rank: int | None) -> int | None:
        module = unit.modules[0]
        raised = (rank or 0) + ALIGNMENT
        return raised if raised <= largest_rank(module.out_features, module.in_features) else None

    def _cost(self, unit: Unit, rank: int | None) -> int:
        return sum(self.budget.cost(module, rank) for module in unit.modules)

    def _spent(self, choice: Sequence[int | None]) -> int:
        named = sum(self._cost(unit, rank) for unit, rank in zip(self.units, choice, strict=True))
        free = {module.name for unit in self.units for module in unit.modules}
        return named + sum(module.parameters for module in self.budget.modules if module.name not in free)

    def by_type(self, x: np.ndarray) -> dict[str, list[float]]:
        """Tied type -> kept ratio in each group."""
        table: dict[str, list[float]] = {}
        for name, value in zip(self.names, x, strict=True):
            table.setdefault(name.split("/")[0], []).append(float(value))
        return table

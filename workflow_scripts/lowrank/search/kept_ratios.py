"""The variables of the rank search: one kept ratio per type of matrix and group of layers, under a budget.

Types that are tied (q and k) share a ratio; each matrix applies it to its own break-even rank. The budget is one
linear equation in the variables, so points are sampled and optimised on its face and never rejected. With a `band`
the kept share may also fall short of the budget; such points fill a slice of the box, and are sampled by rejection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lowrank.config.presets import Search
from lowrank.errors import RankwiseError
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.reach import limits_of, why_out_of_reach
from lowrank.ranks.rounding import DENSE, Rounder, Rounding, Unit
from lowrank.search.space import Space

_BURN_IN, _THINNING = 500, 20
_DRAWS, _DRAWS_AT_ONCE = 2_000_000, 50_000
_HALVINGS = 60
_DENSE_WHEN_SCALED = 1e6


class SearchSpace(Space):
    """Kept ratios within bounds per (tied type, group), with the budget met exactly before rounding.

    Attributes:
        weights: d, share of all linear parameters that each variable governs.
        total: the share that the variables may keep together: weights . x = total, or with a band
            total - band <= weights . x <= total.
    """

    def __init__(
        self,
        budget: Budget,
        ratio: int,
        groups: int,
        uncompressed: Sequence[str],
        lower: float,
        upper: float = 1.0,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        band: float | None = None,
        rounding: Rounding = "give-back",
    ) -> None:
        """Build the space.

        Args:
            budget, ratio, groups, uncompressed: as of `Space`.
            lower, upper: smallest and largest kept ratio of a matrix; 1 means dense.
            bounds: tied type -> bounds of its own.
            band: by how much the kept share may fall short of the budget.
            rounding: see `Rounder`.

        Raises:
            RankwiseError: the budget cannot be met with these bounds, or a type is unknown.
        """
        super().__init__(budget, ratio, groups, uncompressed)
        self.band = band
        if why := why_out_of_reach(budget, ratio, uncompressed, lower, upper, bounds, band):
            raise RankwiseError(why)
        limits = limits_of(self.free, lower, upper, bounds or {})
        if unknown := [name for name in bounds or {} if name not in limits]:
            raise RankwiseError(
                f"`bounds`: no matrices of type {', '.join(unknown)} are searched here; there are {', '.join(limits)}"
            )
        self.units = self._units(limits)
        self.lower, self.upper = (
            np.array([limits[name.split("/")[0]][side] for name in self.names], dtype=float) for side in (0, 1)
        )
        self._rounder = Rounder(budget, self.units, rounding)
        self.weights, self.total = self._budget_equation()

    @classmethod
    def of(cls, budget: Budget, ratio: int, groups: int, uncompressed: Sequence[str], search: Search) -> SearchSpace:
        """The space that a search preset describes."""
        return cls(
            budget,
            ratio,
            groups,
            uncompressed,
            search.lower,
            search.upper,
            search.bounds,
            search.band,
            search.rounding,
        )

    def _units(self, limits: Mapping[str, tuple[float, float]]) -> list[Unit]:
        by_type: dict[tuple[str, int], list[LinearModule]] = {}
        for variable, name in enumerate(self.names):
            for module in self.matrices[name]:
                by_type.setdefault((module.type.name, variable), []).append(module)
        tied = {module.type.name: module.type.tied for module in self.free}
        return [Unit(index, tuple(modules), limits[tied[name]][1]) for (name, index), modules in by_type.items()]

    def _budget_equation(self) -> tuple[np.ndarray, float]:
        dense = self.budget.dense_parameters
        weights = np.zeros(len(self.names))
        added = 0  # the biases that the low-rank form adds
        for index, unit in enumerate(self.units):
            weights[unit.variable] += self._rounder.cost(index, None) / dense
            added += self._rounder.cost(index, 0)
        self._fixed = dense - sum(self._rounder.cost(index, None) for index in range(len(self.units)))
        return weights, (self.budget.allowed(self.ratio) - self._fixed - added) / dense

    def share(self, x: np.ndarray) -> np.ndarray:
        """What points keep, weights . x, as `total` counts it; ... x d -> ..."""
        kept: np.ndarray = x @ self.weights
        return kept

    @property
    def least(self) -> float:
        """The smallest share that points may keep: `total` without a band."""
        return max(self.total - (self.band or 0.0), float(self.share(self.lower)))

    @property
    def most(self) -> float:
        """The largest share that points may keep; below `total` only if the band lets the bounds say so."""
        return min(self.total, float(self.share(self.upper)))

    @property
    def only_point(self) -> np.ndarray | None:
        """The uniform one, where the budget leaves one variable no choice."""
        return self.uniform() if len(self.names) == 1 and self.band is None else None

    def uniform(self) -> np.ndarray:
        """The point where every variable keeps the same share, as far as the bounds allow."""
        return self.scaled(np.ones(len(self.names)), self.most)

    def onto_budget(self, x: np.ndarray) -> np.ndarray:
        """The point within the bounds that meets the budget by one factor on the given ratios, with clipping.

        A ratio of 1 means dense and stays so if the others can pay for it. With a band, a point that lies in it is
        only clipped.

        Args:
            x: ... x d positive ratios.
        """
        dense = x >= DENSE
        kept_dense = self.scaled(np.where(dense, _DENSE_WHEN_SCALED, x), self.most)
        affordable = np.all(~dense | (kept_dense >= self.upper), axis=-1, keepdims=True)
        met = np.where(affordable, kept_dense, self.scaled(x, self.most))
        if self.band is None:
            return met
        inside = np.clip(x, self.lower, self.upper)
        share = self.share(inside)[..., None]
        return np.where((share >= self.least) & (share <= self.most), inside, met)

    def scaled(self, x: np.ndarray, share: float | np.ndarray) -> np.ndarray:
        """clip(s x) with the one factor s at which it keeps a share.

        The share that clip(s x) keeps grows with s, so s is found by bisection; the ratios that are not clipped then
        take up what is missing to the last digit.

        Args:
            x: ... x d positive ratios.
            share: one for all, or one for each point, within what the bounds allow.
        """
        target = np.broadcast_to(np.asarray(share, dtype=float), x.shape[:-1])
        low = np.log(self.lower.clip(1e-9) / x).min(axis=-1)
        high = np.log(self.upper / x).max(axis=-1)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            short = self.share(self._clipped(x, middle)) < target
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        point = self._clipped(x, high)
        free = (point > self.lower) & (point < self.upper)
        unclipped = self.share(np.where(free, point, 0.0))
        clipped = self.share(np.where(free, 0.0, point))
        factor = np.divide(target - clipped, unclipped, out=np.ones_like(target), where=unclipped > 0)
        exact: np.ndarray = np.clip(np.where(free, point * factor[..., None], point), self.lower, self.upper)
        return exact

    def _clipped(self, x: np.ndarray, log_factor: np.ndarray) -> np.ndarray:
        point: np.ndarray = np.clip(x * np.exp(log_factor)[..., None], self.lower, self.upper)
        return point

    def sample(self, count: int, seed: int) -> np.ndarray:
        """count x d random points, uniform on what the budget allows.

        Without a band that is the face of the polytope where the budget is spent (hit and run); with one, the slice
        of the box between two such faces (rejection).

        Raises:
            RankwiseError: next to no point of the box lies in the band.
        """
        if self.band is not None:
            return self._rejection_sample(count, np.random.default_rng(seed))
        from botorch.utils.sampling import get_polytope_samples

        if len(self.names) == 1:
            return np.repeat(self.uniform()[None], count, axis=0)
        samples = get_polytope_samples(
            n=count,
            bounds=self.bounds(),
            seed=seed,
            n_burnin=_BURN_IN,
            n_thinning=_THINNING,
            **self.constraints(),
        )
        points: np.ndarray = np.clip(samples.numpy(), self.lower, self.upper)
        return points

    def _rejection_sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        found: list[np.ndarray] = []
        for _ in range(_DRAWS // _DRAWS_AT_ONCE):
            points = self.box(_DRAWS_AT_ONCE, generator)
            share = self.share(points)
            found.extend(points[(share >= self.least) & (share <= self.most)][: count - len(found)])
            if len(found) == count:
                return np.array(found)
        raise RankwiseError(
            f"`band: {self.band:g}`: of {_DRAWS:,} random allocations within the bounds, {len(found)} keep a share in "
            f"the band below the budget of {100 - self.ratio} %, and {count} are needed; widen the band, move `lower` "
            "and `upper` towards the budget, or leave `band` out, which searches on the budget itself"
        )

    def scatter(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d points all over the space, not uniform but cheap: points of the box, each scaled into the budget.

        Many have some ratio at a bound, as good allocations do, where uniform points have none.
        """
        points = self.box(count, generator)
        share = generator.uniform(self.least, self.most, count) if self.band is not None else self.most
        return self.scaled(points, share)

    def around(self, x: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d points near one: steps of several sizes in a few random ratios, paid for by all."""
        return self.onto_budget(np.clip(x + self.steps(count, generator), self.lower.clip(1e-9), self.upper))

    def constraints(self) -> dict[str, Any]:
        """The budget as BoTorch takes it: (indices, coefficients, right-hand side) of an equality or two inequalities.

        An inequality says that the left-hand side is at least the right-hand side.
        """
        indices, weights = torch.arange(len(self.names)), torch.tensor(self.weights, dtype=torch.double)
        if self.band is None:
            return {"equality_constraints": [(indices, weights, self.total)]}
        return {"inequality_constraints": [(indices, weights, self.least), (indices, -weights, -self.most)]}

    def ranks(self, x: np.ndarray) -> Ranks:
        """The ranks of a point; the budget is never exceeded, see `Rounder`."""
        allowed = math.floor(self.budget.allowed(self.ratio)) - self._fixed
        dense = self.budget.dense_parameters
        wanted = round(allowed - (self.total - float(self.share(x))) * dense)
        choices = self._rounder.choose([float(x[unit.variable]) for unit in self.units], allowed, wanted)
        ranks: Ranks = {module.name: None for module in self.budget.modules}
        for unit, rank in zip(self.units, choices, strict=True):
            ranks |= {module.name: rank for module in unit.modules}
        return ranks

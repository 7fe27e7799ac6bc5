"""The search of Bolaco over predicted losses: one factor on the prediction per type of matrix and group of layers.

The prediction of `predicted_loss` takes errors to be small and independent. Where it is wrong for a whole type of
matrices, one factor on the losses of that type corrects it, and a search over a few factors can find them. All factors
at 1 are the prediction itself, where the search begins. The variables are logarithms to the base 2.

The budget holds at every point, since the allocation meets it for any losses: the space is a box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lowrank.bases.principal import Bases
from lowrank.config.presets import Search
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.predicted_loss import allocate
from lowrank.search.space import Space


def predicted_losses(bases: Bases, budget: Budget) -> dict[str, npt.NDArray[np.float64]]:
    """Layer -> what leaving out each direction of its basis is predicted to cost, nats per token.

    Layers of experts that are left dense have no basis, and are not named.

    Raises:
        RankwiseError: a basis holds no predictions; the layer is named.
    """
    losses = {}
    for module in budget.free(()):
        predicted = bases.losses(module.layer, module.type.key)
        if predicted is None:
            raise RankwiseError(
                f"{module.name}: its basis says nothing of the loss. The method's preset of `covariance` must name "
                "`gradients: weigh` or `gradients: predict`."
            )
        losses[module.name] = predicted.double().numpy()
    return losses


class LossScaleSpace(Space):
    """log2 factors on the predicted losses, one per (tied type, group)."""

    def __init__(
        self,
        budget: Budget,
        ratio: int,
        groups: int,
        uncompressed: Sequence[str],
        search: Search,
        losses: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        """Build the space.

        Args:
            budget, ratio, groups, uncompressed: as of `Space`.
            search: whose `largest_scale` bounds the factors.
            losses: layer -> predicted loss of leaving out each direction.
        """
        super().__init__(budget, ratio, groups, uncompressed)
        self.upper = np.full(len(self.names), np.log2(search.largest_scale))
        self.lower = -self.upper
        self._losses = losses

    def predicted(self) -> np.ndarray:
        """The point where all factors are 1."""
        return np.zeros(len(self.names))

    def ranks(self, x: np.ndarray) -> Ranks:
        """The best allocation by the scaled predictions."""
        scaled = dict(self._losses)
        for name, exponent in zip(self.names, x, strict=True):
            scaled |= {module.name: self._losses[module.name] * 2.0**exponent for module in self.matrices[name]}
        return allocate(self.budget, self.ratio, scaled, self.uncompressed).ranks

    def onto_budget(self, x: np.ndarray) -> np.ndarray:
        """Points within the bounds; the budget is met anyway."""
        clipped: np.ndarray = np.clip(x, self.lower, self.upper)
        return clipped

    def sample(self, count: int, seed: int) -> np.ndarray:
        """count x d random points of the box."""
        return self.box(count, np.random.default_rng(seed))

    def scatter(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The same, from a generator."""
        return self.box(count, generator)

    def around(self, x: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d points near one: steps of several sizes in a few factors."""
        return self.onto_budget(x + self.steps(count, generator))

    def constraints(self) -> dict[str, Any]:
        """None but the bounds."""
        return {}

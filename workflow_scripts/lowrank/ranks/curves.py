"""What matrices may become, alone or together: parameters and predicted losses of each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowrank.model.families import LinearModule
from lowrank.ranks.budget import ALIGNMENT, Budget


@dataclass(frozen=True)
class Curve:
    """What a matrix or a group of them may become, from the smallest to dense.

    Attributes:
        parameters: of each choice, in increasing order.
        losses: predicted rise of the mean loss per token, in nats, decreasing; 0 for dense.
    """

    parameters: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]

    @classmethod
    def of_all(cls, curves: Sequence[Curve]) -> Curve:
        """That of matrices which take their choices by one index, all of one length."""
        return Curve(np.sum([c.parameters for c in curves], axis=0), np.sum([c.losses for c in curves], axis=0))

    def at(self, indices: npt.NDArray[np.int64]) -> Curve:
        """Some of the choices."""
        return Curve(self.parameters[indices], self.losses[indices])


@dataclass(frozen=True)
class Choices(Curve):
    """What one matrix may become.

    Attributes:
        ranks: rank, or None for dense.
    """

    ranks: tuple[int | None, ...]


@dataclass(frozen=True)
class Group(Curve):
    """What some matrices may become together.

    Attributes:
        modules: their names; they have no choices of their own.
    """

    modules: tuple[str, ...]


def choices_of(budget: Budget, module: LinearModule, losses: npt.NDArray[np.float64]) -> Choices:
    """The ranks that save parameters, and dense."""
    left_out = np.concatenate([np.cumsum(losses[::-1])[::-1], [0.0]])  # by rank: 0, 1, ..., k
    steps = range(ALIGNMENT, len(losses) + 1, ALIGNMENT)
    ranks = [rank for rank in steps if budget.cost(module, rank) < module.parameters]
    parameters = [budget.cost(module, rank) for rank in ranks]
    return Choices(
        np.array([*parameters, module.parameters], dtype=np.float64),
        np.array([*left_out[ranks], 0.0]) if ranks else np.zeros(1),
        (*ranks, None),
    )

"""What a search needs to know of its variables, whatever they mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lowrank.errors import RankwiseError
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget, Ranks

FEW = 4
"""About how many variables change between a point and one near it."""


def layer_groups(layers: int, groups: int) -> list[list[int]]:
    """Split 0..layers-1 into consecutive groups whose sizes differ by one at most, the larger ones first."""
    if not 1 <= groups <= layers:
        raise RankwiseError(f"`groups: {groups}`: a model of {layers} layers can have 1 to {layers} groups")
    return [part.tolist() for part in np.array_split(np.arange(layers), groups)]


def matrices_by_variable(modules: Sequence[LinearModule], groups: Sequence[list[int]]) -> dict[str, list[LinearModule]]:
    """Variable, `tied type/group of layers` -> the matrices that it governs."""
    group_of = {layer: index for index, layers in enumerate(groups) for layer in layers}
    governed: dict[str, list[LinearModule]] = {}
    for module in modules:
        governed.setdefault(f"{module.type.tied}/{group_of[module.layer]}", []).append(module)
    return governed


class Space(ABC):
    """Variables within bounds, each of which governs matrices; every point of it is an allocation of ranks.

    Attributes:
        budget: of the model.
        ratio: percent of the linear layers' parameters to remove.
        groups: of consecutive layers.
        matrices: variable -> the matrices that it governs.
        names: variable names, `type/group`.
        lower, upper: d, bounds.
        uncompressed: types that stay dense.
        free: the matrices of all others.
    """

    lower: np.ndarray
    upper: np.ndarray

    def __init__(self, budget: Budget, ratio: int, groups: int, uncompressed: Sequence[str]) -> None:
        """Set up the variables, but for their bounds.

        Args:
            budget: of the model.
            ratio: percent of the linear layers' parameters to remove.
            groups: of consecutive layers.
            uncompressed: types that stay dense.

        Raises:
            RankwiseError: a type is unknown, or there are more groups than layers.
        """
        self.budget, self.ratio = budget, ratio
        self.uncompressed = tuple(budget.types(uncompressed))
        self.groups = layer_groups(budget.dimensions.layers, groups)
        self.free = budget.free(uncompressed)
        self.matrices: Mapping[str, Sequence[LinearModule]] = matrices_by_variable(self.free, self.groups)
        self.names = list(self.matrices)

    @abstractmethod
    def ranks(self, x: np.ndarray) -> Ranks:
        """The ranks of a point; the budget is never exceeded."""

    @abstractmethod
    def onto_budget(self, x: np.ndarray) -> np.ndarray:
        """The nearest points of the space, in the sense that suits it; ... x d."""

    @abstractmethod
    def sample(self, count: int, seed: int) -> np.ndarray:
        """count x d random points, uniform on the space."""

    @abstractmethod
    def scatter(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d points all over the space; they need not be uniform."""

    @abstractmethod
    def around(self, x: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d points near one."""

    @abstractmethod
    def constraints(self) -> dict[str, Any]:
        """What BoTorch is told besides the bounds."""

    @property
    def only_point(self) -> np.ndarray | None:
        """The point, where there is but one."""
        return None

    def bounds(self) -> torch.Tensor:
        """2 x d, lower and upper bounds."""
        return torch.tensor(np.stack([self.lower, self.upper]), dtype=torch.double)

    def by_type(self, x: np.ndarray) -> dict[str, list[float]]:
        """Tied type -> the variable of each group."""
        table: dict[str, list[float]] = {}
        for name, value in zip(self.names, x, strict=True):
            table.setdefault(name.split("/")[0], []).append(float(value))
        return table

    def box(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d points within the bounds."""
        return generator.uniform(self.lower, self.upper, (count, len(self.names)))

    def steps(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """count x d steps of several sizes in a few random variables each."""
        d = len(self.names)
        changed = generator.random((count, d)) < min(1.0, FEW / d)
        changed[np.arange(count), generator.integers(d, size=count)] = True
        size = np.exp(generator.uniform(np.log(0.02), np.log(0.5), (count, 1)))
        moved: np.ndarray = changed * size * generator.standard_normal((count, d)) * (self.upper - self.lower)
        return moved

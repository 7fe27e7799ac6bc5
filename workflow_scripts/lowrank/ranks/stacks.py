"""Matrices that share their first factor: how they are stacked, and what a rank of a stack costs.

Matrices W_1, ..., W_k of n columns that get the pairs B_i A with one A are one matrix of n columns and m = sum m_i
rows with the pair B A, B being the B_i on top of each other. So its budget is that of a stacked matrix: r (m + n), or
with an identity block in A, r (m + n - r) and the permutation of its n inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lowrank.model.families import FAMILIES, LinearModule
from lowrank.ranks.budget import Budget
from lowrank.ranks.by_type import uniform_ranks


@dataclass(frozen=True)
class StackedBudget(Budget):
    """A budget whose modules are stacks.

    Attributes:
        identity_columns: whether the first factor holds an r x r identity, which takes n indices and no weights.
    """

    identity_columns: bool = False

    def cost(self, module: LinearModule, rank: int | None) -> int:
        """Parameters of a stack at a rank."""
        if rank is None or not self.identity_columns:
            return super().cost(module, rank)
        return rank * (module.out_features + module.in_features - rank) + module.in_features

    def rank_of_share(self, module: LinearModule, kept: float) -> float:
        """The rank, not rounded, at which a pair holds that share; its indices are on top, as a bias is elsewhere."""
        if not self.identity_columns:
            return super().rank_of_share(module, kept)
        half = (module.out_features + module.in_features) / 2  # r (m + n) - r^2 = kept m n
        return half - math.sqrt(half**2 - kept * module.parameters)


@dataclass(frozen=True)
class Stack:
    """Matrices with one first factor.

    Attributes:
        members: of equal n, in the order of the forward pass; the first one stores the factor.
        group: index of the blocks that they are of, among groups of equally many.
    """

    members: tuple[LinearModule, ...]
    group: int

    @property
    def module(self) -> LinearModule:
        """All of them as one matrix, named as the first one."""
        m = sum(member.out_features for member in self.members)
        return replace(self.members[0], layer=self.group, out_features=m)


def stacks_by_input(budget: Budget, uncompressed: Iterable[str]) -> list[Stack]:
    """Matrices that read the same input, as q, k and v, on top of each other; the others by themselves.

    Raises:
        RankwiseError: an unknown type.
    """
    return _stacked(budget, uncompressed, 1, lambda module: (module.layer, module.type.site))


def stacks_by_blocks(budget: Budget, uncompressed: Iterable[str], shared: Iterable[str], blocks: int) -> list[Stack]:
    """Matrices of one type in so many neighbouring blocks on top of each other, of `shared` types; others alone.

    The last stack of a type is of fewer blocks where their number is no multiple.

    Raises:
        RankwiseError: an unknown type.
    """
    together = set(budget.types(shared))

    def key(module: LinearModule) -> Any:
        return (module.layer // blocks if module.type.name in together else module.name), module.type.name

    return _stacked(budget, uncompressed, blocks, key)


def each_alone(budget: Budget, uncompressed: Iterable[str]) -> list[Stack]:
    """Every matrix as a stack of its own.

    Raises:
        RankwiseError: an unknown type.
    """
    return _stacked(budget, uncompressed, 1, lambda module: module.name)


def _stacked(
    budget: Budget, uncompressed: Iterable[str], blocks: int, key: Callable[[LinearModule], Any]
) -> list[Stack]:
    together: dict[Any, list[LinearModule]] = {}
    for module in budget.free(uncompressed):
        together.setdefault(key(module), []).append(module)
    return [Stack(tuple(members), members[0].layer // blocks) for members in together.values()]


def stacked_budget(budget: Budget, stacks: Iterable[Stack], identity_columns: bool, blocks: int = 1) -> StackedBudget:
    """The budget of a model whose matrices stand as stacks; those in none stay dense.

    Args:
        budget: of the model.
        stacks: of its matrices, at most one each.
        identity_columns: whether first factors hold an identity block.
        blocks: how many blocks a stack may be of: so many count as one, which stands for all.
    """
    stacks = list(stacks)
    members = {member.name for stack in stacks for member in stack.members}
    dense = [replace(m, layer=m.layer // blocks) for m in budget.modules if m.name not in members]
    modules = (*(stack.module for stack in stacks), *dense)
    return StackedBudget(
        budget.dimensions,
        modules,
        adds_bias=False,
        left_dense=budget.left_dense,
        identity_columns=identity_columns,
    )


def uniform_stacks(
    budget: StackedBudget, stacks: Iterable[Stack], ratio: int, uncompressed: tuple[str, ...]
) -> list[tuple[Stack, int]]:
    """The stacks that one kept ratio for all leaves compressed, and their ranks.

    Raises:
        RankwiseError: the ratio is out of reach.
    """
    ranks = uniform_ranks(budget, ratio, uncompressed) if ratio else {}
    chosen = [(stack, ranks.get(stack.module.name)) for stack in stacks]
    return [(stack, rank) for stack, rank in chosen if rank is not None]


def types_of_stream(family: str) -> tuple[str, ...]:
    """The types that read the residual stream, as wide as it is; the others read what attention or the MLP puts out."""
    return tuple(linear.name for linear in FAMILIES[family].types if linear.input == "hidden")

"""Ranks by first-order changes: against lists that are searched anew for every direction, and what the sum obeys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.zero_sum import greedy_ranks
from tests import tiny

BUDGETS = {
    (kind, identity): replace(Budget.of(ModelShape(**tiny.shape(kind))), adds_bias=False, identity_block=identity)
    for kind in ("llama", "llama-gqa", "opt")
    for identity in (False, True)
}
CASES = {
    "key": st.sampled_from(list(BUDGETS)),
    "ratio": st.integers(1, 70),
    "seed": st.integers(0, 999),
    "balanced": st.booleans(),
}


def some_changes(budget: Budget, seed: int) -> dict[str, np.ndarray]:
    """Changes of both signs, of sizes that fall with the rank in some matrices more than in others."""
    draw = np.random.default_rng(seed)
    changes = {}
    for module in budget.modules:
        count = min(module.out_features, module.in_features)
        sizes = np.exp(-draw.uniform(0, 6) * np.arange(count) / count)
        changes[module.name] = draw.uniform(0.1, 3) * sizes * draw.standard_normal(count)
    return changes


def held(m: int, n: int, rank: int, identity: bool) -> int:
    """Numbers in a matrix of a rank, or in the dense one if those are fewer."""
    return min(m * n, rank * (m + n) - (rank * rank - rank if identity else 0))


def slow_walk(
    budget: Budget, ratio: int, changes: dict[str, np.ndarray], dense: tuple[str, ...], balanced: bool
) -> dict[str, int]:
    """The ranks before rounding; every step looks through all matrices."""
    shapes = {
        module.name: (module.out_features, module.in_features)
        for module in budget.modules
        if module.type.name not in dense
    }
    identity = budget.identity_block
    total = sum(module.out_features * module.in_features for module in budget.modules)
    rest = total - sum(m * n for m, n in shapes.values())
    ranks = {name: min(shape) for name, shape in shapes.items()}
    arrived = dict.fromkeys(ranks, 0)
    clock, change_so_far = 0, 0.0
    for name in ranks:
        arrived[name] = (clock := clock + 1)
    while rest + sum(held(*shapes[name], rank, identity) for name, rank in ranks.items()) > total * (100 - ratio) / 100:
        offers = [
            (abs(changes[name][rank - 1]), arrived[name], changes[name][rank - 1], name)
            for name, rank in ranks.items()
            if rank > 8 and held(*shapes[name], 8, identity) < shapes[name][0] * shapes[name][1]
        ]
        if balanced:
            rising = [offer for offer in offers if offer[2] >= 0]
            falling = [offer for offer in offers if offer[2] < 0]
            offers = (rising or falling) if change_so_far <= 0 else (falling or rising)
        _, _, change, name = min(offers)
        ranks[name] -= 1
        arrived[name] = (clock := clock + 1)
        change_so_far += change
    return ranks


def slow_rounding(budget: Budget, ratio: int, wanted: dict[str, int]) -> Ranks:
    """Down to multiples of 8 or up to dense; then steps of 8 to whichever is cut most of those whose step fits."""
    shapes = {module.name: (module.out_features, module.in_features) for module in budget.modules}
    identity, everything = budget.identity_block, sum(m * n for m, n in shapes.values())

    def size(name: str, rank: int | None) -> int:
        m, n = shapes[name]
        return m * n if rank is None else held(m, n, rank, identity)

    def up(name: str, rank: int) -> int | None:
        m, n = shapes[name]
        return rank + 8 if rank + 8 <= min(m, n) and held(m, n, rank + 8, identity) < m * n else None

    ranks: Ranks = dict.fromkeys(shapes)
    for name, rank in wanted.items():
        if size(name, rank) < size(name, None):
            ranks[name] = rank // 8 * 8
    while True:
        left = everything * (100 - ratio) / 100 - sum(size(name, rank) for name, rank in ranks.items())
        fitting = [
            (rank - wanted[name], place, name)
            for place, (name, rank) in enumerate(ranks.items())
            if rank is not None and size(name, up(name, rank)) - size(name, rank) <= left
        ]
        if not fitting:
            return ranks
        name = min(fitting)[2]
        ranks[name] = up(name, ranks[name] or 0)


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_ranks_are_those_of_a_slow_walk(key: tuple[str, bool], ratio: int, seed: int, balanced: bool) -> None:
    budget = BUDGETS[key]
    changes = some_changes(budget, seed)
    dense = ("k",) if seed % 3 == 0 else ()
    found = greedy_ranks(budget, ratio, changes, dense, balanced)
    wanted = slow_walk(budget, ratio, changes, dense, balanced)
    assert found.ranks == slow_rounding(budget, ratio, wanted)
    assert budget.parameters(found.ranks) <= budget.allowed(ratio)
    left_out = sum(changes[name][rank:].sum() for name, rank in found.ranks.items() if rank is not None)
    assert found.change == pytest.approx(left_out, abs=1e-9)
    assert all(rank is None or rank % 8 == 0 for rank in found.ranks.values())


@settings(max_examples=20, deadline=None)
@given(**CASES, scale=st.floats(1e-9, 1e9))
def test_the_scale_of_the_loss_does_not_matter(
    key: tuple[str, bool], ratio: int, seed: int, balanced: bool, scale: float
) -> None:
    changes = some_changes(BUDGETS[key], seed)
    scaled = {name: scale * change for name, change in changes.items()}
    one, other = (greedy_ranks(BUDGETS[key], ratio, each, (), balanced) for each in (changes, scaled))
    assert one.ranks == other.ranks
    assert other.change == pytest.approx(scale * one.change, rel=1e-9, abs=1e-12 * scale)


def test_what_never_lowers_the_loss_leaves_from_the_smallest_change_on() -> None:
    """Of changes that all rise, the zero sum takes the smallest, as the size alone does."""
    budget = BUDGETS["llama", False]
    changes = {name: np.abs(change) for name, change in some_changes(budget, 3).items()}
    assert greedy_ranks(budget, 30, changes).ranks == greedy_ranks(budget, 30, changes, balanced=False).ranks
    signed = [some_changes(budget, seed) for seed in range(10)]
    differ = [
        greedy_ranks(budget, 30, one).ranks != greedy_ranks(budget, 30, one, balanced=False).ranks for one in signed
    ]
    assert any(differ), "of both signs, they choose alike everywhere"


def test_matrices_that_are_dear_are_dense_again() -> None:
    budget = BUDGETS["llama", False]
    changes = {
        module.name: np.full(min(module.out_features, module.in_features), 1e-9 if module.type.name == "up" else 1.0)
        for module in budget.modules
    }
    ranks = greedy_ranks(budget, 5, changes, balanced=False).ranks
    assert {module.type.name for module in budget.modules if ranks[module.name] is not None} == {"up"}


def test_what_is_out_of_reach_is_refused() -> None:
    budget = BUDGETS["llama", False]
    changes = some_changes(budget, 0)
    with pytest.raises(RankwiseError, match=r"removing 90 % is impossible: with gate, up, down dense and ranks of at"):
        greedy_ranks(budget, 90, changes, ("gate", "up", "down"))
    with pytest.raises(RankwiseError, match="no linear layers of type fc1"):
        greedy_ranks(budget, 20, changes, ("fc1",))
    assert not any(greedy_ranks(budget, 0, changes).ranks.values())

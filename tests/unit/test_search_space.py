"""The search space: the budget is never exceeded, hardly missed, and points are where they should be."""

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.budget import Budget
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.search_space import SearchSpace, layer_groups

SMOLLM = ModelShape(**tiny.SMOLLM)


@given(layers=st.integers(1, 100), groups=st.integers(1, 100))
def test_groups_are_consecutive_balanced_and_complete(layers: int, groups: int) -> None:
    if groups > layers:
        with pytest.raises(RankwiseError, match="can have 1 to"):
            layer_groups(layers, groups)
        return
    parts = layer_groups(layers, groups)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=60, deadline=None)
@given(ratio=st.integers(5, 60), groups=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_rounded_ranks_never_exceed_the_budget_and_hardly_miss_it(ratio: int, groups: int, seed: int) -> None:
    budget = Budget.of(SMOLLM)
    space = SearchSpace(budget, ratio, groups, ("v",), lower=0.1)
    draw = np.random.default_rng(seed).dirichlet(np.ones(len(space.names)))
    point = np.clip(space.lower + draw * (space.total - space.lower * space.weights.sum()) / space.weights, 0, 1)
    ranks = space.ranks(point)
    assert budget.kept(ranks) <= 1 - ratio / 100 + 1e-12
    for module in budget.modules:
        rank = ranks.get(module.name)
        assert rank is None or rank % 8 == 0
        assert module.type.name != "v" or rank is None
    if np.all(point < 1):
        step = max(8 * (m.out_features + m.in_features) for m in budget.modules) * 30 / groups
        assert budget.allowed(ratio) - budget.parameters(ranks) <= step + 1


def test_samples_lie_on_the_budget_and_depend_on_the_seed_alone() -> None:
    space = SearchSpace(Budget.of(SMOLLM), 20, 4, ("v",), lower=0.2)
    points = space.sample(16, seed=3)
    assert points.shape == (16, 20)
    assert np.allclose(points @ space.weights, space.total, atol=1e-9)
    assert points.min() >= 0.2
    assert points.max() <= 1.0
    assert np.array_equal(points, space.sample(16, seed=3))
    assert not np.array_equal(points, space.sample(16, seed=4))


def test_tied_types_share_a_variable_and_dense_types_have_none() -> None:
    space = SearchSpace(Budget.of(SMOLLM), 20, 2, ("v",), lower=0.2)
    assert space.names == [f"{name}/{group}" for name in ("qk", "o", "gate", "up", "down") for group in (0, 1)] or set(
        space.names
    ) == {f"{name}/{group}" for name in ("qk", "o", "gate", "up", "down") for group in (0, 1)}
    assert set(space.by_type(space.uniform())) == {"qk", "o", "gate", "up", "down"}


def test_a_budget_out_of_reach_is_refused_with_the_reason() -> None:
    with pytest.raises(RankwiseError, match="removing 85 % is impossible here"):
        SearchSpace(Budget.of(SMOLLM), 85, 1, ("v",), lower=0.2)
    with pytest.raises(RankwiseError, match="no linear layers of type w; it has q, k, v, o"):
        SearchSpace(Budget.of(SMOLLM), 20, 1, ("w",), lower=0.2)


def test_opt_has_six_types() -> None:
    space = SearchSpace(Budget.of(ModelShape(**tiny.shape("opt"))), 20, 1, ("v",), lower=0.1)
    assert set(space.names) == {"qk/0", "o/0", "fc1/0", "fc2/0"}

"""The search space: bounds, budget and band hold, and points are where they should be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.presets import Search
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.space import layer_groups
from tests import tiny

SMOLLM = ModelShape(**tiny.SMOLLM)


def smollm(ratio: int = 20, groups: int = 4, **options: object) -> SearchSpace:
    return SearchSpace(Budget.of(SMOLLM), ratio, groups, ("v",), **{"lower": 0.2, **options})


@given(layers=st.integers(1, 100), groups=st.integers(1, 100))
def test_groups_are_consecutive_balanced_and_complete(layers: int, groups: int) -> None:
    if groups > layers:
        with pytest.raises(RankwiseError, match="can have 1 to"):
            layer_groups(layers, groups)
        return
    parts = layer_groups(layers, groups)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_samples_lie_on_the_budget_and_depend_on_the_seed_alone() -> None:
    space = smollm()
    points = space.sample(16, seed=3)
    assert points.shape == (16, 20)
    assert np.allclose(points @ space.weights, space.total, atol=1e-9)
    assert points.min() >= 0.2
    assert points.max() <= 1.0
    assert np.array_equal(points, space.sample(16, seed=3))
    assert not np.array_equal(points, space.sample(16, seed=4))


def test_tied_types_share_a_variable_and_dense_types_have_none() -> None:
    space = smollm(groups=2)
    assert set(space.names) == {f"{name}/{group}" for name in ("qk", "o", "gate", "up", "down") for group in (0, 1)}
    assert set(space.by_type(space.uniform())) == {"qk", "o", "gate", "up", "down"}


def test_a_budget_out_of_reach_is_refused_with_the_reason() -> None:
    with pytest.raises(RankwiseError, match="removing 85 % is out of reach: with v dense and at least 20 %"):
        smollm(85, 1)
    with pytest.raises(RankwiseError, match=r"removing only 20 % .* at most 70 % .* raise `upper`, set a `band`"):
        smollm(20, 1, upper=0.7)
    assert smollm(20, 1, upper=0.7, band=0.2).most < smollm(20, 1, upper=0.7, band=0.2).total
    with pytest.raises(RankwiseError, match="no linear layers of type w; it has q, k, v, o"):
        SearchSpace(Budget.of(SMOLLM), 20, 1, ("w",), lower=0.2)


def test_opt_has_six_types() -> None:
    space = SearchSpace(Budget.of(ModelShape(**tiny.shape("opt"))), 20, 1, ("v",), lower=0.1)
    assert set(space.names) == {"qk/0", "o/0", "fc1/0", "fc2/0"}


def test_a_type_may_have_bounds_of_its_own() -> None:
    space = smollm(groups=2, upper=0.9, bounds={"qk": (0.1, 0.4), "down": (0.85, 1.0)})
    limits = dict(zip(space.names, zip(space.lower, space.upper, strict=True), strict=True))
    assert limits["qk/0"] == limits["qk/1"] == (0.1, 0.4)
    assert limits["down/1"] == (0.85, 1.0)
    assert limits["gate/0"] == (0.2, 0.9)
    generator = np.random.default_rng(0)
    for points in (space.sample(50, 0), space.scatter(50, generator), space.around(space.uniform(), 50, generator)):
        assert np.all(points >= space.lower)
        assert np.all(points <= space.upper)
        assert np.allclose(points @ space.weights, space.total, atol=1e-9)
    with pytest.raises(RankwiseError, match="`bounds`: no matrices of type v, fc1 are searched here; there are qk, o"):
        smollm(bounds={"v": (0.1, 0.9), "fc1": (0.1, 0.9)})


def test_a_preset_s_bounds_band_and_rounding_reach_the_space() -> None:
    search = Search(lower=0.3, upper=0.95, bounds={"qk": (0.1, 1.0)}, band=0.1, rounding="down")
    space = SearchSpace.of(Budget.of(SMOLLM), 20, 2, ("v",), search)
    for name, lower, upper in zip(space.names, space.lower, space.upper, strict=True):
        assert (lower, upper) == ((0.1, 1.0) if name.startswith("qk") else (0.3, 0.95))
    assert space.band == 0.1
    plain = SearchSpace.of(Budget.of(SMOLLM), 20, 2, ("v",), Search())
    assert plain.band is None
    down = SearchSpace.of(Budget.of(SMOLLM), 20, 2, ("v",), Search(rounding="down"))
    x = plain.sample(1, 0)[0]
    assert plain.budget.kept(plain.ranks(x)) > down.budget.kept(down.ranks(x))


positive = st.lists(st.floats(1e-3, 3.0), min_size=10, max_size=10)


@settings(max_examples=80, deadline=None)
@given(ratios=positive, ratio=st.integers(5, 60), upper=st.floats(0.96, 1.0), low=st.floats(0.05, 0.3))
def test_onto_budget_is_one_factor_with_clipping(ratios: list[float], ratio: int, upper: float, low: float) -> None:
    space = smollm(ratio, 2, lower=low, upper=upper, bounds={"qk": (0.02, 0.9)})
    x = np.array(ratios)
    point = space.onto_budget(x)
    assert point @ space.weights == pytest.approx(space.total, abs=1e-10)
    assert np.all((point >= space.lower) & (point <= space.upper))
    free = (point > space.lower + 1e-9) & (point < space.upper - 1e-9)
    if free.any():
        factor = np.median(point[free] / x[free])
        assert np.allclose(point[free], factor * x[free], rtol=1e-6)
        low, high = point <= space.lower, point >= space.upper
        assert np.all(x[low] * factor <= space.lower[low] * (1 + 1e-6))
        assert np.all((x[high] * factor >= space.upper[high] * (1 - 1e-6)) | (x[high] >= 1))
    assert np.allclose(space.onto_budget(np.stack([x, x[::-1]]))[0], point, atol=1e-12)


def test_dense_stays_dense_on_the_budget_if_the_others_can_pay() -> None:
    space = smollm(groups=1)
    x = np.array([0.9 if name != "down/0" else 1.0 for name in space.names])
    assert space.by_type(space.onto_budget(x))["down"] == [1.0]
    rich = np.array([0.9 if name == "qk/0" else 1.0 for name in space.names])
    point = space.onto_budget(rich)
    assert np.allclose(point / rich, point[0] / rich[0])
    assert point @ space.weights == pytest.approx(space.total)


def test_a_band_is_sampled_by_rejection_and_left_alone_inside() -> None:
    space = smollm(30, 4, band=0.1)
    points = space.sample(40, 1)
    kept = points @ space.weights
    assert kept.min() >= space.total - 0.1
    assert kept.max() <= space.total
    assert kept.min() < space.total - 0.05 < kept.max() - 0.02, "the band is filled, not only its edge"
    assert np.array_equal(space.onto_budget(points), points)
    assert np.array_equal(points, space.sample(40, 1))
    assert not np.array_equal(points, space.sample(40, 2))
    assert space.onto_budget(points * 2) @ space.weights == pytest.approx(np.full(40, space.total))
    near = space.around(points[0], 30, np.random.default_rng(0)) @ space.weights
    assert np.all((near >= space.total - 0.1 - 1e-9) & (near <= space.total + 1e-9))


def test_a_band_that_random_points_hardly_hit_is_an_error_with_a_cure() -> None:
    with pytest.raises(RankwiseError, match=r"`band: 0\.0001`: of 2,000,000 random .* widen the band"):
        smollm(5, 4, band=0.0001).sample(50, 0)


def test_with_a_band_what_a_point_does_not_ask_for_is_not_given_back() -> None:
    space = smollm(30, 4, band=0.1)
    x = space.scaled(np.ones(20), space.total - 0.08)
    kept = space.budget.kept(space.ranks(x))
    asked = 0.7 - 0.08
    assert asked - 0.02 < kept <= asked + 1e-9


def test_with_one_variable_there_is_one_point() -> None:
    only_down = ("q", "k", "v", "o", "gate", "up")
    space = SearchSpace(Budget.of(SMOLLM), 5, 1, only_down, lower=0.2)
    assert space.names == ["down/0"]
    assert np.array_equal(space.sample(3, 0), np.repeat(space.uniform()[None], 3, axis=0))
    wide = SearchSpace(Budget.of(SMOLLM), 5, 1, only_down, lower=0.2, band=0.1)
    assert len(set(wide.sample(3, 0)[:, 0])) == 3

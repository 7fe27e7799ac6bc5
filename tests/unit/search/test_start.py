"""The first points of a search: which, in which order, on the budget, and far from each other."""

import logging

import numpy as np
import pytest

from lowrank.config.presets import Search
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, lord_kept
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.start import Start, initial_points, spread_points
from tests import tiny

SMOLLM = ModelShape(**tiny.SMOLLM)
START_AT = {"qk": 0.5, "o": 0.5, "gate": 0.8, "up": 0.8, "down": 0.8}


def smollm(uncompressed: tuple[str, ...] = ("v",), **options: object) -> SearchSpace:
    return SearchSpace(Budget.of(SMOLLM), 20, 2, uncompressed, **{"lower": 0.1, **options})


def origins(starts: list[Start]) -> list[str]:
    return [start.origin for start in starts]


def test_the_order_is_transfer_then_start_then_start_at_then_spread() -> None:
    space = smollm()
    search = Search(initial=6, start=["lord", "uniform"], start_at=START_AT)
    starts = initial_points(space, search, 0, np.full(10, 0.7))
    assert origins(starts) == ["transfer", "lord", "uniform", "given", "spread", "spread"]
    for start in starts:
        assert start.x @ space.weights == pytest.approx(space.total)
        assert np.all((start.x >= space.lower) & (start.x <= space.upper))


def test_points_that_are_given_are_all_evaluated_and_nothing_is_spread_beyond_initial() -> None:
    starts = initial_points(smollm(), Search(initial=2), 0, np.full(10, 0.7))
    assert origins(starts) == ["transfer", "uniform", "lord"]
    assert origins(initial_points(smollm(), Search(initial=1, start=[]), 0, np.full(10, 0.7))) == ["transfer"]
    assert origins(initial_points(smollm(), Search(initial=3, start=[]), 0)) == ["spread"] * 3


def test_given_ratios_keep_their_proportions() -> None:
    space = smollm()
    point = initial_points(space, Search(initial=1, start=[], start_at=START_AT), 0)[0].x
    ratios = space.by_type(point)
    assert ratios["qk"] == ratios["o"]
    assert ratios["gate"] == ratios["up"] == ratios["down"]
    assert ratios["qk"][0] / ratios["gate"][0] == pytest.approx(0.5 / 0.8)
    with pytest.raises(RankwiseError, match="`start_at` must name every type that is searched, qk, o, gate, up, down"):
        initial_points(space, Search(initial=1, start=[], start_at={"qk": 0.5, "o": 0.5}), 0)


def test_lord_starts_where_lord_is() -> None:
    space = smollm()
    point = space.by_type(initial_points(space, Search(initial=1, start=["lord"]), 0)[0].x)
    kept = lord_kept(space.budget, 20)
    assert point["qk"] == pytest.approx([kept["q"]] * 2, rel=0.01)
    assert point["down"] == pytest.approx([0.8] * 2, rel=0.01)
    with_v = smollm(())
    assert with_v.by_type(initial_points(with_v, Search(initial=1, start=["lord"]), 0)[0].x)["v"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ratio", "uncompressed", "why"),
    [(20, ("v", "o"), "LoRD keeps v alone dense, and here o stays dense"), (85, ("v",), "LoRD cannot remove 85 %")],
)
def test_where_there_is_no_lord_the_search_says_so_and_starts_without(
    ratio: int, uncompressed: tuple[str, ...], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    space = SearchSpace(Budget.of(SMOLLM), ratio, 1, uncompressed, 0.01)
    with caplog.at_level(logging.INFO):
        starts = initial_points(space, Search(initial=3), 0)
    assert origins(starts) == ["uniform", "spread", "spread"]
    assert f"does not start at `lord`: {why}" in caplog.text


def test_points_outside_the_bounds_are_moved_to_them() -> None:
    space = smollm(bounds={"qk": (0.1, 0.4)})
    starts = initial_points(space, Search(initial=3, start_at=START_AT), 0)
    for start in starts:
        assert space.by_type(start.x)["qk"] == [0.4, 0.4]
        assert start.x @ space.weights == pytest.approx(space.total)


def test_spread_points_are_far_from_each_other_and_from_the_given_ones() -> None:
    space = smollm()
    given = [space.uniform()]
    points = spread_points(space, given, 4, seed=1)
    pool = space.sample(256, 1)
    chosen = list(given)
    for point in points:  # against the definition: of the pool, the one whose nearest chosen point is farthest
        unit = (pool[:, None] - np.array(chosen)[None]) / (space.upper - space.lower)
        nearest = np.sqrt((unit**2).sum(-1)).min(1)
        assert np.array_equal(point, pool[np.argmax(nearest)])
        chosen.append(point)
    assert not np.array_equal(points[0], spread_points(space, given, 1, seed=2)[0])
    assert np.array_equal(spread_points(space, [], 1, seed=1)[0], pool[0])
    assert spread_points(space, given, 0, seed=1) == []

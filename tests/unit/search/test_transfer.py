"""Ratios carried from one model to another, by type and relative depth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.transfer import same_depth, transferred_point
from tests import tiny

SMOLLM = ModelShape(**tiny.SMOLLM)
TYPES = ("qk", "o", "gate", "up", "down")


def target(groups: int = 1, layers: int = 30, uncompressed: tuple[str, ...] = ("v",)) -> SearchSpace:
    shape = SMOLLM.model_copy(update={"layers": layers})
    return SearchSpace(Budget.of(shape), 20, groups, uncompressed, 0.1)


def source(groups: list[list[int]], **variables: list[float]) -> dict[str, object]:
    filled = {name: variables.get(name, [0.5] * len(groups)) for name in TYPES}
    return {"subject": {"model": "other"}, "groups": groups, "variables": filled, "ranks": {"x": 8}}


def test_the_same_depth_and_groups_give_the_same_ratios() -> None:
    space = target(groups=3)
    there = source([[0, 9], [10, 19], [20, 29]], qk=[0.3, 0.4, 0.5], down=[0.9, 0.8, 0.7])
    found = space.by_type(transferred_point(space, there, SMOLLM))
    assert found["qk"] == pytest.approx([0.3, 0.4, 0.5])
    assert found["down"] == pytest.approx([0.9, 0.8, 0.7])


def test_a_group_takes_the_mean_of_the_layers_at_its_depth() -> None:
    there = source([[0, 3], [4, 7]], qk=[0.2, 0.8])
    shape = SMOLLM.model_copy(update={"layers": 8})
    assert transferred_point(target(1), there, shape)[0] == pytest.approx(0.5)
    three = target(3, layers=6)  # its middle group holds layers 2 and 3, either side of the source's boundary
    assert three.by_type(transferred_point(three, there, shape))["qk"] == pytest.approx([0.2, 0.5, 0.8])


@given(layers=st.integers(1, 100), source_layers=st.integers(1, 100))
def test_depths_keep_their_order_from_the_first_layers_to_the_last(layers: int, source_layers: int) -> None:
    mapped = [same_depth(layer, layers, source_layers) for layer in range(layers)]
    assert mapped == sorted(mapped)
    assert 0 <= mapped[0] <= mapped[-1] < source_layers
    for layer, there in enumerate(mapped):  # the middle of the one lies in the other
        assert there / source_layers <= (layer + 0.5) / layers < (there + 1) / source_layers
    if layers == source_layers:
        assert mapped == list(range(layers))
    if layers >= source_layers:
        assert set(mapped) == set(range(source_layers))


def test_a_type_that_the_source_leaves_dense_is_asked_to_stay_dense() -> None:
    space = target(uncompressed=())
    there = source([[0, 29]])
    assert space.by_type(transferred_point(space, there, SMOLLM))["v"] == [1.0]


def test_a_type_that_the_source_lacks_is_an_error_that_names_both_families() -> None:
    opt = ModelShape(**tiny.shape("opt"))
    there = source([[0, 1]]) | {"variables": {"qk": [0.5], "o": [0.5], "fc1": [0.5], "fc2": [0.5]}}
    with pytest.raises(RankwiseError, match=r"'other' of family 'opt', which has no layers of type 'gate' .*'llama'"):
        transferred_point(target(), there, opt)


def test_the_point_is_scaled_onto_the_budget_of_the_other_model() -> None:
    space = target(groups=2)
    ratios = transferred_point(space, source([[0, 14], [15, 29]], qk=[0.25, 0.3]), SMOLLM)
    assert ratios @ space.weights < space.total - 0.1
    point = space.onto_budget(ratios)
    assert point @ space.weights == pytest.approx(space.total)
    assert np.allclose(point / ratios, point[0] / ratios[0])

"""Combinations of choices against all there are."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.ranks.curves import Curve
from lowrank.ranks.groups import combined, worth_having


def curve(seed: int, size: int) -> Curve:
    draw = np.random.default_rng(seed)
    return Curve(np.cumsum(draw.integers(1, 9, size)).astype(float), np.sort(draw.exponential(size=size))[::-1])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), power=st.floats(-4, 2))
def test_for_every_multiplier_the_best_combination_is_there(seed: int, sizes: list[int], power: float) -> None:
    curves = [curve(seed + index, size) for index, size in enumerate(sizes)]
    found, indices = combined(curves)
    for parameters, loss, picks in zip(found.parameters, found.losses, indices, strict=True):
        assert parameters == sum(each.parameters[pick] for each, pick in zip(curves, picks, strict=True))
        assert np.isclose(loss, sum(each.losses[pick] for each, pick in zip(curves, picks, strict=True)))
    assert (np.diff(found.parameters) > 0).all()
    assert found.losses[-1] == sum(each.losses[-1] for each in curves)
    every = [
        sum(each.losses[i] + 10**power * each.parameters[i] for each, i in zip(curves, picks, strict=True))
        for picks in product(*(range(size) for size in sizes))
    ]
    assert np.isclose(min(found.losses + 10**power * found.parameters), min(every))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9999), size=st.integers(1, 30))
def test_what_is_worth_having_is_what_nothing_beats(seed: int, size: int) -> None:
    draw = np.random.default_rng(seed)
    one = Curve(draw.integers(0, 12, size).astype(float), draw.integers(0, 12, size).astype(float))
    worth = worth_having(one).tolist()
    for index in range(size):
        beaten = any(
            one.parameters[i] <= one.parameters[index] and one.losses[i] <= one.losses[index]
            and (one.parameters[i], one.losses[i]) != (one.parameters[index], one.losses[index])
            for i in range(size)
        )  # fmt: skip
        twin = any((one.parameters[i], one.losses[i]) == (one.parameters[index], one.losses[index]) for i in worth)
        assert twin == (not beaten)
    assert (np.diff(one.parameters[worth]) > 0).all()
    assert (np.diff(one.losses[worth]) < 0).all()

"""Ranks from kept ratios by type: those that the search's space gives for the same point."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.by_type import lord_ranks, uniform_ranks
from lowrank.search.allocation import lord_point
from lowrank.search.kept_ratios import SearchSpace
from tests.config.test_fit import leaves_room, shapes


def of_space(budget: Budget, ratio: int, uncompressed: list[str], lord: bool) -> Ranks | None:
    try:
        space = SearchSpace(budget, ratio, 1, uncompressed, lower=0.0)
        return space.ranks(lord_point(space) if lord else space.uniform())
    except RankwiseError:
        return None


@settings(max_examples=300, deadline=None)
@given(
    shapes(),
    st.integers(1, 90),
    st.lists(st.sampled_from("qkvo"), unique=True),
    st.booleans(),
    st.booleans(),
)
def test_uniform_ranks_are_those_of_the_uniform_point(
    shape: ModelShape, ratio: int, uncompressed: list[str], adds_bias: bool, block: bool
) -> None:
    budget = replace(Budget.of(shape), adds_bias=adds_bias, identity_block=block)
    try:
        ranks: Ranks | None = uniform_ranks(budget, ratio, uncompressed)
    except RankwiseError:
        ranks = None
    assert ranks == of_space(budget, ratio, uncompressed, lord=False)
    assert (ranks is not None) == leaves_room(budget, ratio, uncompressed, 0.0)


@settings(max_examples=300, deadline=None)
@given(shapes(), st.integers(1, 60), st.booleans())
def test_lords_ranks_are_those_of_its_point(shape: ModelShape, ratio: int, block: bool) -> None:
    budget = replace(Budget.of(shape), identity_block=block)
    try:
        ranks: Ranks | None = lord_ranks(budget, ratio, "give-back")
    except RankwiseError:
        ranks = None
    assert ranks == of_space(budget, ratio, ["v"], lord=True)

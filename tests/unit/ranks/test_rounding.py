"""Ranks of kept ratios: the budget is never exceeded, whatever the model, the point and the way of rounding."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget, rank_for
from lowrank.ranks.by_type import uniform_ranks
from lowrank.ranks.reach import largest_rank_worth_it, smallest_choice
from lowrank.ranks.rounding import Rounder, Unit
from lowrank.search.kept_ratios import SearchSpace
from tests import tiny
from tests.unit.ranks.test_budget import LLAMA_7B

SMOLLM = ModelShape(**tiny.SMOLLM)
SHAPES = [SMOLLM, LLAMA_7B, *(ModelShape(**tiny.shape(kind)) for kind in tiny.ALL_SHAPES)]


def point_of(space: SearchSpace, seed: int) -> np.ndarray:
    """A point on the budget with some ratios at their bounds."""
    return space.scatter(1, np.random.default_rng(seed))[0]


@settings(max_examples=250, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    ratio=st.integers(5, 55),
    groups=st.integers(1, 4),
    rounding=st.sampled_from(["give-back", "down"]),
    uncompressed=st.sampled_from([("v",), (), ("v", "o")]),
    band=st.sampled_from([None, 0.05]),
    seed=st.integers(0, 10_000),
)
def test_the_budget_is_never_exceeded_and_ranks_are_worth_it(
    shape: ModelShape, ratio: int, groups: int, rounding: str, uncompressed: tuple[str, ...], band: float, seed: int
) -> None:
    budget = Budget.of(shape)
    try:
        space = SearchSpace(budget, ratio, min(groups, shape.layers), uncompressed, 0.1, band=band, rounding=rounding)
    except RankwiseError:
        return
    ranks = space.ranks(point_of(space, seed))
    assert budget.parameters(ranks) <= (100 - ratio) * budget.dense_parameters / 100 + 1e-6
    for module in budget.modules:
        rank = ranks[module.name]
        if module.type.name in uncompressed:
            assert rank is None
        if rank is not None:
            assert rank % 8 == 0 or rank == smallest_choice(budget, module)
            assert budget.cost(module, rank) < module.parameters


@settings(max_examples=60, deadline=None)
@given(ratio=st.integers(5, 60), groups=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_giving_back_hardly_misses_the_budget(ratio: int, groups: int, seed: int) -> None:
    budget = Budget.of(SMOLLM)
    space = SearchSpace(budget, ratio, groups, ("v",), lower=0.1)
    point = space.scaled(np.random.default_rng(seed).uniform(0.5, 1, len(space.names)), space.total)
    assume(np.all((point > 0.1) & (point < 1)))
    ranks = space.ranks(point)
    step = max(8 * (m.out_features + m.in_features) for m in budget.modules) * 30 / groups
    assert budget.allowed(ratio) - budget.parameters(ranks) <= step + 1


def levels(space: SearchSpace, unit: Unit) -> list[int]:
    """Parameters of a unit at every rank that it may get, ascending: from the cheapest up to its bound, or dense."""
    budget, module = space.budget, unit.modules[0]
    bound = budget.rank_of_share(module, unit.upper)
    ranks = [rank for rank in range(8, module.out_features, 8) if budget.cost(module, rank) < module.parameters]
    ranks = ranks or [rank for rank in range(1, 8) if budget.cost(module, rank) < module.parameters][-1:]
    within = [rank for rank in ranks if rank <= bound + 1e-9 or rank == ranks[0]]
    costs = [budget.cost(module, rank) for rank in within]
    return [len(unit.modules) * cost for cost in costs + [module.parameters] * (unit.upper >= 1 or not costs)]


def reachable(above: list[list[int]], left: float) -> set[tuple[int, ...]]:
    """All ways to raise units by 0, 1, 2 ... levels that cost no more than `left`: every combination is tried.

    Args:
        above: of each unit, what its present level and every level above it cost.
        left: what may be spent.
    """
    if not above:
        return {()}
    (first, *others) = above
    return {
        (steps, *rest)
        for steps, cost in enumerate(first)
        if cost - first[0] <= left
        for rest in reachable(others, left - (cost - first[0]))
    }


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES[2:]),
    ratio=st.integers(5, 60),
    groups=st.integers(1, 2),
    upper=st.sampled_from([0.8, 1.0]),
    block=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_combination_of_steps_is_left_to_give_back(
    shape: ModelShape, ratio: int, groups: int, upper: float, block: bool, seed: int
) -> None:
    """An exhaustive reference: of all allocations with no rank lower and some rank higher, none meets the budget."""
    budget = replace(Budget.of(shape), identity_block=block)
    try:
        space = SearchSpace(budget, ratio, groups, ("v",), 0.1, upper)
    except RankwiseError:
        return
    ranks = space.ranks(point_of(space, seed))
    costs = [sum(budget.cost(module, ranks[module.name]) for module in unit.modules) for unit in space.units]
    known = [levels(space, unit) for unit in space.units]
    above = [tried[tried.index(cost) :] for tried, cost in zip(known, costs, strict=True)]
    left = math.floor(budget.allowed(ratio) + 1e-6) - budget.parameters(ranks)
    assert reachable(above, left) == {(0,) * len(above)}


@settings(max_examples=100, deadline=None)
@given(shape=st.sampled_from(SHAPES), ratio=st.integers(5, 60), groups=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_what_is_cut_most_gets_the_next_step(shape: ModelShape, ratio: int, groups: int, seed: int) -> None:
    """Against a slow loop that looks at all units before each step."""
    budget = Budget.of(shape)
    try:
        space = SearchSpace(budget, ratio, min(groups, shape.layers), ("v",), 0.1)
    except RankwiseError:
        return
    point = point_of(space, seed)
    rounder = Rounder(budget, space.units, "give-back")
    ratios = [float(point[unit.variable]) for unit in space.units]
    allowed = math.floor(budget.allowed(ratio) + 1e-6) - space._fixed
    choices = [rounder._below(index, kept) for index, kept in enumerate(ratios)]
    rounder._shrink(choices, ratios, allowed)

    def spent(changed: list[int | None]) -> int:
        return sum(rounder.cost(index, choice) for index, choice in enumerate(changed))

    while True:
        steps = []
        for index, unit in enumerate(space.units):
            raised = [*choices]
            raised[index] = rounder._raised(index, choices[index])
            if raised != choices and spent(raised) <= allowed:
                steps.append((budget.rank_of_share(unit.modules[0], ratios[index]) - choices[index], -index, raised))
        if not steps:
            break
        choices = max(steps, key=lambda step: step[:2])[2]
    assert rounder.choose(ratios, allowed, allowed) == choices


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from([LLAMA_7B, SMOLLM]), ratio=st.integers(15, 60), seed=st.integers(0, 10_000))
def test_down_is_the_rounding_of_the_paper_s_authors(shape: ModelShape, ratio: int, seed: int) -> None:
    budget = Budget.of(shape)
    space = SearchSpace(budget, ratio, 4, ("v",), 0.2, rounding="down")
    point = point_of(space, seed)
    ranks = space.ranks(point)
    ratios = dict(zip(space.names, point, strict=True))
    expected = {}
    for unit in space.units:
        for module in unit.modules:
            expected[module.name] = rank_for(
                ratios[space.names[unit.variable]], module.out_features, module.in_features
            )
    if budget.parameters(expected) <= budget.allowed(ratio):  # the ceiling may cost a little more than was asked for
        assert {name: rank for name, rank in ranks.items() if name in expected} == expected
    else:
        assert sum(ranks[name] != rank for name, rank in expected.items()) <= 2 * 8 * len(budget.modules) / 28


@pytest.mark.parametrize("rounding", ["give-back", "down"])
@pytest.mark.parametrize("kind", tiny.SHAPES)
def test_a_ratio_of_one_means_dense(kind: str, rounding: str) -> None:
    shape = ModelShape(**tiny.shape(kind))
    space = SearchSpace(Budget.of(shape), 20, 2, ("v",), 0.1, rounding=rounding)
    x = np.full(len(space.names), 0.3)
    x[space.names.index("o/1")] = 1.0
    ranks = space.ranks(x)
    dense = {module.name for module in space.budget.modules if ranks[module.name] is None and module.type.name != "v"}
    assert dense == {m.name for m in space.budget.modules if m.type.name == "o" and m.layer == 1}


def test_what_is_given_back_stays_below_the_upper_bound() -> None:
    free = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), 0.2)
    capped = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), 0.2, bounds={"up": (0.2, 0.85)})
    # Of break-even ranks of 288 (q, o), 144 (k) and 418.9: nothing is cut from 80, 80 and 40, most from up's 356.1
    wanted = {"qk/0": 80 / 288, "o/0": 80 / 288, "gate/0": 124 / 418.9, "up/0": 0.85, "down/0": 124 / 418.9}
    x = np.array([wanted[name] for name in free.names])
    up = next(module.name for module in free.budget.modules if module.type.name == "up")
    assert free.ranks(x)[up] == 360
    assert capped.ranks(x)[up] == 352


def test_a_step_that_fits_once_goes_to_the_first_of_equal_shapes() -> None:
    """What docs/paper.md says of q and o, which one ratio cuts equally: another step for o would exceed the budget."""
    budget = replace(Budget.of(SMOLLM), adds_bias=False)
    ranks = uniform_ranks(budget, 20, ())
    kept = {module.type.name: rank for module in budget.modules if (rank := ranks[module.name])}
    assert (kept["q"], kept["o"]) == (232, 224)
    left = budget.allowed(20) - budget.parameters(ranks)
    assert 0 <= left < SMOLLM.layers * 8 * (576 + 576)
    page = (Path(__file__).parents[3] / "docs/paper.md").read_text(encoding="utf-8")
    assert f"at 20 % has rank {kept['q']} for q and {kept['o']} for o" in page


def test_ratios_that_differ_by_rounding_errors_are_equal_cuts() -> None:
    """Of two equal matrices the first gets the step that fits once, whichever ratio has the larger last digits."""
    budget = replace(Budget.of(SMOLLM), adds_bias=False)
    q, o = (next(module for module in budget.modules if module.type.name == name) for name in ("q", "o"))
    rounder = Rounder(budget, [Unit(0, (q,)), Unit(1, (o,))], "give-back")
    allowed = budget.cost(q, 104) + budget.cost(o, 96)
    for nudge in (-1e-13, 0.0, 1e-13):
        assert rounder.choose([0.35, 0.35 + nudge], allowed, allowed) == [104, 96]


def test_down_gives_nothing_back() -> None:
    x = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), 0.2).uniform()
    down, back = (SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), 0.2, rounding=how) for how in ("down", "give-back"))
    assert down.budget.parameters(down.ranks(x)) < back.budget.parameters(back.ranks(x))


def test_ranks_shrink_where_the_least_rank_costs_more_than_was_asked_for() -> None:
    """In a tiny model rank 8 is a quarter of break-even; the largest ranks pay for it, as little as they must."""
    budget = Budget.of(ModelShape(**tiny.shape("llama")))
    space = SearchSpace(budget, 60, 1, ("v",), 0.01, rounding="down")
    x = space.onto_budget(np.array([1.0 if name == "gate/0" else 0.01 for name in space.names]))
    wanted = {
        module.name: rank_for(x[unit.variable], module.out_features, module.in_features)
        for unit in space.units
        for module in unit.modules
    }
    assert budget.parameters(wanted) > budget.allowed(60)
    ranks = space.ranks(x)
    assert budget.parameters(ranks) <= budget.allowed(60)
    changed = {module.type.name for module in budget.modules if ranks[module.name] != wanted.get(module.name)}
    assert changed == {"gate"}


def test_what_got_more_than_it_asked_for_shrinks_first_and_then_the_largest_rank() -> None:
    budget = replace(Budget.of(SMOLLM), adds_bias=False)
    q, gate = (next(module for module in budget.modules if module.type.name == name) for name in ("q", "gate"))
    rounder = Rounder(budget, [Unit(0, (q,)), Unit(1, (gate,))], "down")
    allowed = budget.cost(q, 88) + budget.cost(gate, 120)
    break_even = 576 * 1536 / 2112
    for asked, fits, less in ((90, [88, 120], [88, 112]), (87.5, [88, 120], [80, 120])):
        ratios = [asked / 288, 125 / break_even]
        assert rounder.choose(ratios, allowed, allowed) == fits
        assert rounder.choose(ratios, allowed - 1, allowed) == less


def test_a_matrix_too_narrow_for_rank_8_gets_what_it_can() -> None:
    shape = ModelShape(**{**tiny.shape("llama-gqa"), "head_dim": 5, "heads": 2, "kv_heads": 1})
    budget = Budget.of(shape)
    key = next(module for module in budget.modules if module.type.name == "k")  # 5 x 64, breaks even at 4.6
    assert largest_rank_worth_it(budget, key) == 4
    space = SearchSpace(budget, 40, 1, ("v",), 0.1)
    assert space.ranks(space.uniform())[key.name] in (4, None)
    down = SearchSpace(budget, 40, 1, ("v",), 0.1, rounding="down")
    assert down.ranks(down.uniform())[key.name] is None


def test_even_the_smallest_ranks_can_be_too_much() -> None:
    """The config check knows it before, so only a point that asks for ranks by itself meets it."""
    shape = ModelShape(**tiny.shape("llama"))
    with pytest.raises(RankwiseError, match="even ranks of 8 exceed the budget"):
        SearchSpace(Budget.of(shape), 82, 1, (), 0.001)

"""What a search preset says of single types, against the models that it is used with."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.fit import why_out_of_reach
from lowrank.config.presets import Search
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from lowrank.search.kept_ratios import SearchSpace
from tests.config.test_fit import leaves_room, shapes
from tests.config.wrong import BASE, Change, changed, errors_of

BO = ("search", "bo-10")
FREE = "qk, o, gate, up, down"
WHERE = "`methods.bolaco-5x1` searches in model 'smollm2-135m'"
START_AT = {"qk": 0.5, "o": 0.5, "gate": 0.8, "up": 0.8, "down": 0.8}
OPT = {**BASE["models"]["smollm2-135m"]["shape"], "family": "opt"}

WRONG: list[tuple[Change, str]] = [
    (
        ((*BO, "bounds"), {"kq": [0.1, 1.0]}),
        f"search.bo-10.bounds.kq: is no type of matrices that {WHERE} (there are: {FREE})",
    ),
    (
        ((*BO, "bounds"), {"v": [0.1, 1.0]}),  # it stays dense
        f"search.bo-10.bounds.v: is no type of matrices that {WHERE} (there are: {FREE})",
    ),
    (
        ((*BO, "start_at"), {**START_AT, "fc1": 0.5}),
        f"search.bo-10.start_at.fc1: is no type of matrices that {WHERE} (there are: {FREE})",
    ),
    (
        ((*BO, "start_at"), {"qk": 0.5, "o": 0.5}),
        f"search.bo-10.start_at: has no ratio for gate, up, down, that {WHERE}",
    ),
    (((*BO, "bounds"), {"qk": [0.9, 0.5]}), "search.bo-10.bounds.qk: 0.9 is not below the upper bound 0.5"),
    (
        ((*BO, "bounds"), {"qk": [0.1, 1.5]}),
        "search.bo-10.bounds.qk[1]: must be a number above 0 and of at most 1, not",
    ),
    (((*BO, "bounds"), {"qk": 0.5}), "search.bo-10.bounds.qk: must be a list, not 0.5"),
    (((*BO, "upper"), 0.2), "search.bo-10.lower: 0.2 is not below the upper bound 0.2"),
    (((*BO, "start_at"), {"qk": 0}), "search.bo-10.start_at.qk: must be a number above 0 and of at most 1, not 0"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_a_wrong_search_gives_one_message(change: Change, says: str) -> None:
    found = errors_of(changed(change))
    assert len(found) == 1
    assert found[0].startswith(says), found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ((*BO, "upper"), 0.75),
            "removing only 20 % is out of reach: with v dense and at most 75 % of every other matrix, no more than "
            "75.9 % can stay; raise `upper`, set a `band`, or remove more",
        ),
        (
            ((*BO, "bounds"), {"gate": [0.9, 1.0], "up": [0.95, 1.0], "down": [0.9, 1.0]}),
            "removing 30 % is out of reach: with v dense and at least 20 % of every other matrix (or what `bounds` "
            "says), 76.4 % stays; lower `lower` or `bounds`, compress more types, or remove less",
        ),
    ],
)
def test_bounds_that_the_budget_cannot_meet_are_told_with_the_cure(change: Change, says: str) -> None:
    found = errors_of(changed(change))
    assert len(found) == 1
    assert says in found[0]


def test_the_search_that_a_transfer_begins_with_is_checked_too() -> None:
    """It runs for the other model, although no row names that."""
    other = {**BASE["models"]["smollm2-135m"], "max_length": 128}
    preset = {**BASE["methods"]["bolaco-5x1"], "transfer": {"model": "short", "method": "bolaco-5x1"}}
    row = {"model": "smollm2-135m", "method": "moved", "ratio": 20}
    rows = [*BASE["tables"]["table_8"]["rows"], row]
    changes: list[Change] = [(("models", "short"), other), (("methods", "moved"), preset)]
    found = errors_of(changed(*changes, (("tables", "table_8", "rows"), rows)))
    assert found == [
        f"{place}.length: 256 tokens, more than the `max_length` of model 'short' (128)"
        for place in ("calibration.c4-32", "validation.wikipedia-top6")
    ]


def test_a_transfer_needs_a_model_with_the_same_types() -> None:
    model = BASE["models"]["smollm2-135m"]
    preset = BASE["methods"]["bolaco-5x1"]
    row = {"model": "smollm2-135m", "method": "moved", "ratio": 20}
    changes: list[Change] = [
        (("models", "opt"), {**model, "shape": OPT}),
        (("methods", "moved"), {**preset, "transfer": {"model": "opt", "method": "bolaco-5x1"}}),
        (("tables", "table_8", "rows", 0), row),
    ]
    assert errors_of(changed(*changes)) == [
        "methods.moved.transfer.model: 'opt' (family 'opt') has no layers of type gate, up, down, as 'smollm2-135m' "
        "(family 'llama') has; choose a model with the same types of layers"
    ]
    changes[0] = (("models", "opt"), {**model, "shape": {**OPT, "family": "mistral"}})
    assert errors_of(changed(*changes)) == []


def test_a_preset_goes_to_its_stage_and_comes_back() -> None:
    search = Search.model_validate({"bounds": {"qk": [0.1, 1.0]}, "start_at": {"qk": 1.0}, "initial": 3})
    assert search.bounds == {"qk": (0.1, 1.0)}
    assert search.plain()["bounds"] == {"qk": [0.1, 1.0]}
    assert Search.model_validate(search.plain()) == search


@settings(max_examples=150, deadline=None)
@given(
    shapes(),
    st.integers(1, 90),
    st.lists(st.sampled_from("qkvo"), unique=True),
    st.floats(0.001, 0.5),
    st.floats(0.55, 1.0),
    st.sampled_from([None, 0.05, 0.3]),
    st.sampled_from([{}, {"qk": (0.1, 0.9)}]),
    st.sampled_from(["give-back", "down"]),
)
def test_the_check_refuses_what_the_search_space_refuses(
    shape: ModelShape,
    ratio: int,
    uncompressed: list[str],
    lower: float,
    upper: float,
    band: float | None,
    bounds: dict[str, tuple[float, float]],
    rounding: str,
) -> None:
    if {"q", "k"} <= set(uncompressed):
        bounds = {}
    search = Search(lower=lower, upper=upper, band=band, bounds=bounds, rounding=rounding)
    budget = Budget.of(shape)
    try:
        space = SearchSpace.of(budget, ratio, 1, uncompressed, search)
        possible = budget.parameters(space.ranks(space.uniform())) <= budget.allowed(ratio) + 1e-3
        assert space.least - 1e-9 <= space.uniform() @ space.weights <= space.most + 1e-9
    except RankwiseError:
        possible = False
    by_hand = leaves_room(budget, ratio, uncompressed, lower, upper, band or 0.0, bounds)
    assert (why_out_of_reach(budget, ratio, uncompressed, lower, search) is None) == possible == by_hand

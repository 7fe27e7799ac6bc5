"""The config check's arithmetic of what a budget allows, against the search space that the stages build."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.fit import why_out_of_reach
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from lowrank.search.kept_ratios import SearchSpace
from tests.config.wrong import ROW, SHAPE, changed, errors_of


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 16, 64]))
    return ModelShape(
        family=draw(st.sampled_from(["llama", "qwen2", "opt"])),
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 200)),
        intermediate=draw(st.integers(1, 400)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=100,
        tied_embeddings=False,
    )


@settings(max_examples=300, deadline=None)
@given(
    shapes(),
    st.integers(1, 90),
    st.lists(st.sampled_from("qkvo"), unique=True),
    st.floats(0.001, 0.99),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_the_check_refuses_what_the_search_space_refuses(
    shape: ModelShape, ratio: int, uncompressed: list[str], lower: float, groups: int, adds_bias: bool, block: bool
) -> None:
    budget = replace(Budget.of(shape), adds_bias=adds_bias, identity_block=block)
    try:
        space = SearchSpace(budget, ratio, min(groups, shape.layers), uncompressed, lower)
        space.ranks(space.uniform())
        possible = True
    except RankwiseError:
        possible = False
    why = why_out_of_reach(budget, ratio, uncompressed, lower)
    assert (why is None) == possible


@pytest.mark.parametrize(("hidden", "ratio", "says"), [(64, 85, "at least 20 %"), (16, 60, "even ranks of 8")])
def test_it_says_what_limits(hidden: int, ratio: int, says: str) -> None:
    shape = ModelShape(
        family="qwen2",
        layers=2,
        hidden=hidden,
        intermediate=hidden,
        heads=1,
        kv_heads=1,
        head_dim=hidden,
        vocabulary=9,
        tied_embeddings=True,
    )
    assert says in str(why_out_of_reach(Budget.of(shape), ratio, ["v"], 0.2))


def test_lord_cannot_remove_more_than_q_and_k_pay_for() -> None:
    errors = errors_of(changed(((*ROW[:-1], 2, "ratio"), 85)))
    assert any(line.startswith("tables.table_1.rows[2].ratio: LoRD cannot remove 85 %") for line in errors), errors


def test_methods_that_are_not_defined_for_experts_are_refused_with_method_and_family() -> None:
    mixture = [
        ((*SHAPE, key), value) for key, value in (("family", "mixtral"), ("experts", 8), ("experts_per_token", 2))
    ]
    assert errors_of(changed(*mixture)) == []
    errors = errors_of(changed(*mixture, (("methods", "lord"), {"kind": "flap", "calibration": "c4-32"})))
    assert (
        "methods.lord.kind: 'flap' is not defined for the experts of family 'mixtral'; docs/families.md says which "
        "methods are, and by which of their settings (model 'smollm2-135m')"
    ) in errors

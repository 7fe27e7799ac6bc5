"""The config check's arithmetic of what a budget allows, by hand and against the search space that stages build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowrank.config.fit import why_out_of_reach
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from lowrank.search.kept_ratios import SearchSpace
from tests import tiny
from tests.config.wrong import ROW, SHAPE, changed, errors_of

BIASED: dict[str, tuple[str, ...]] = {"llama": (), "qwen2": ("q", "k", "v"), "opt": ("q", "k", "v", "o", "fc1", "fc2")}


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


def leaves_room(
    budget: Budget,
    ratio: int,
    uncompressed: Sequence[str],
    lower: float,
    upper: float = 1.0,
    band: float = 0.0,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> bool:
    """Whether a budget lies within what one block's bounds keep, and pays for its smallest ranks, by hand."""
    dense, least, most, smallest = 0, 0.0, 0.0, 0
    for module in (module for module in budget.modules if module.layer == 0):
        m, n, name = module.out_features, module.in_features, module.type.name
        dense += m * n
        if name in uncompressed:
            least, most, smallest = least + m * n, most + m * n, smallest + m * n
            continue
        bias = m if budget.adds_bias and name not in BIASED[budget.dimensions.family] else 0
        low, high = (bounds or {}).get("qk" if name in "qk" else name, (lower, upper))
        least, most = least + bias + low * m * n, most + bias + high * m * n
        pairs = [r * (m + n) - budget.identity_block * r * (r - 1) + bias for r in range(1, min(8, m, n) + 1)]
        smallest += max((pair for pair in pairs if pair < m * n), default=m * n)
    allowed, close = (1 - ratio / 100) * dense, 1e-9 * dense
    return least < allowed - close and most > allowed - band * dense + close and smallest <= allowed


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
@example(ModelShape(**tiny.SMOLLM), 20, [], 0.795, 1, False, False)
@example(ModelShape(**tiny.SMOLLM), 20, [], 0.805, 1, False, False)
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
    assert (why is None) == possible == leaves_room(budget, ratio, uncompressed, lower)


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

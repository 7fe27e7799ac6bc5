"""Widths of blocks: their parameters by hand, and the budget against a slow walk over shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.compression.widths import PARTS, Steps, Widths
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from tests import tiny

SMOLLM, LLAMA_2_7B = ModelShape(**tiny.SMOLLM), ModelShape(**tiny.LLAMA_2_7B)
OPT = SMOLLM.model_copy(update={"family": "opt", "heads": 9, "kv_heads": 9})
SHAPES = [SMOLLM, LLAMA_2_7B, OPT]
SMALL = [
    ModelShape(**tiny.shape(kind)).model_copy(update={"layers": 4, "intermediate": neurons})
    for kind, neurons in (("llama-gqa", 172), ("opt", 160))
]


def by_hand(shape: ModelShape, widths: Widths) -> int:
    matrices = 2 if shape.family == "opt" else 3
    attention = shape.hidden * (shape.heads + shape.kv_heads) * (widths.qk + widths.vo)
    indices = shape.kv_heads * widths.qk // 2 if widths.qk < shape.head_dim and shape.family != "opt" else 0
    return matrices * shape.hidden * widths.mlp + attention + indices


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
@pytest.mark.parametrize("widths", [(1000, 40, 64), (800, 64, 24), (8, 2, 1)])
def test_parameters_follow_from_shapes(shape: ModelShape, widths: tuple[int, int, int]) -> None:
    budget = Budget.of(shape)
    assert Widths(*widths).parameters(budget) == by_hand(shape, Widths(*widths))
    assert shape.layers * Widths.dense(shape).parameters(budget) == budget.dense_parameters


def test_half_of_every_part_of_llama_2_7b() -> None:
    """By hand: 5504 neurons of 3 x 4096 weights, 32 heads of 64 dimensions in four matrices, 32 x 32 indices."""
    steps = Steps(Budget.of(LLAMA_2_7B), PARTS, 8)
    assert steps.nearest(0.5) == Widths(5504, 64, 64)
    assert steps.nearest(0.5).parameters(steps.budget) == 5504 * 3 * 4096 + 4 * 32 * 64 * 4096 + 32 * 32


def test_rotary_dimensions_go_in_pairs() -> None:
    odd = Steps(Budget.of(SMOLLM), PARTS, 3)
    assert (odd.step("qk"), odd.step("vo"), odd.step("mlp")) == (6, 3, 3)
    assert Steps(Budget.of(OPT), PARTS, 3).step("qk") == 3
    assert all(odd.nearest(lost / 100).qk % 2 == 0 for lost in range(100))


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(SMALL),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, unique=True),
    multiple=st.sampled_from([1, 3, 8]),
    ratio=st.integers(1, 80),
    most=st.sampled_from([0.5, 0.8, 0.95]),
    weights=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_the_smallest_scale_that_meets_the_budget(
    shape: ModelShape, parts: list[str], multiple: int, ratio: int, most: float, weights: list[float]
) -> None:
    steps = Steps(Budget.of(shape), tuple(parts), multiple)
    dense, allowed = Widths.dense(shape), steps.budget.allowed(ratio)

    def at(scale: float) -> list[Widths]:
        found = []
        for weight in weights:
            lost, kept = min(most, scale * weight), {}
            for part in PARTS:
                full, step = getattr(dense, part), steps.step(part)
                choices = [*range(step, full, step), full]
                target = (1 - lost) * full
                below = [width for width in choices if width <= target + 1e-6] or choices[:1]
                nearest = min(choices, key=lambda width: (abs(width - target), -width))
                kept[part] = full if part not in parts else below[-1] if part == "mlp" else nearest
            found.append(Widths(**kept))
        return found

    def size(blocks: list[Widths]) -> int:
        return sum(by_hand(shape, widths) for widths in blocks)

    if size(at(200.0)) > allowed:
        with pytest.raises(RankwiseError, match=f"removing {ratio} % is out of reach: blocks that lose"):
            steps.blocks(weights, most, ratio)
        return
    blocks = steps.blocks(weights, most, ratio)
    assert size(blocks) <= allowed
    low, high = 0.0, 200.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (low, middle) if size(at(middle)) <= allowed else (middle, high)
    assert size(at(low)) > allowed or low == 0
    # The last bisection of a jump may end on either side of it, by the last digits of a target.
    for part in ("qk", "vo"):
        sides = [{getattr(widths, part) for widths in ends} for ends in zip(at(low), at(high), strict=True)]
        assert all(getattr(widths, part) in side for widths, side in zip(blocks, sides, strict=True))
    if "mlp" not in parts:
        return
    assert all(widths.mlp >= end.mlp for widths, end in zip(blocks, at(high), strict=True))
    full = [widths.mlp == shape.intermediate for widths in blocks]
    matrices = 2 if shape.family == "opt" else 3
    assert all(full) or allowed - size(blocks) < steps.step("mlp") * matrices * shape.hidden

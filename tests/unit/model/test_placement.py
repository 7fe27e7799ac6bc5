"""Where blocks lie: compared with trying all ways to divide them."""

from __future__ import annotations

from itertools import combinations_with_replacement

from hypothesis import given
from hypothesis import strategies as st

from lowrank.model.placement import fullest, placed_blocks

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=7)


def loads(blocks: list[int], around: int, places: list[int], devices: int) -> list[int]:
    held = [around] + [0] * (devices - 1)
    for size, device in zip(blocks, places, strict=True):
        held[device] += size
    return held


@given(blocks=SIZES, around=st.integers(0, 200), devices=st.integers(1, 4))
def test_no_other_way_leaves_more_room_on_the_fullest_device(blocks: list[int], around: int, devices: int) -> None:
    places = placed_blocks(blocks, around, devices)
    assert places == sorted(places)
    ways = combinations_with_replacement(range(devices), len(blocks))  # all that never fall
    best = min(max(loads(blocks, around, list(way), devices)) for way in ways)
    assert max(loads(blocks, around, places, devices)) == best == fullest(blocks, around, devices)


def test_sums_that_differ_by_rounding_are_the_same_size() -> None:
    assert placed_blocks([0.1] * 6, 0.3, 3) == [1, 1, 1, 2, 2, 2]
    assert placed_blocks([0.2, 0.2, 0.1], 0, 2) == [0, 1, 1]
    assert fullest([0.1] * 80, 0, 8) == sum([0.1] * 10)


def test_embeddings_that_fill_a_device_leave_it_no_block() -> None:
    assert placed_blocks([1, 1, 1, 1], 10, 3) == [1, 1, 1, 1]
    assert fullest([1, 1, 1, 1], 10, 3) == 10

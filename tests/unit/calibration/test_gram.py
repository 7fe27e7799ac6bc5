"""Sums of x'x against numpy in float64, for widths about those of the panels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.calibration.gram import PANEL, add_gram, packed, packed_size, symmetric, unpacked
from lowrank.cluster.sizes import _packed
from lowrank.errors import RankwiseError


@given(
    width=st.sampled_from([1, 7, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3]),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_batches_add_up_to_the_whole_product(width: int, rows: list[int], seed: int) -> None:
    data = np.random.default_rng(seed).normal(size=(sum(rows), width))
    total = torch.zeros(width, width, dtype=torch.float64)
    for part in torch.tensor(data).split(rows):
        add_gram(total, part)
    found = symmetric(total)
    assert torch.equal(found, found.T)
    np.testing.assert_allclose(found.numpy(), data.T @ data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 7, PANEL, PANEL + 1, 3 * PANEL - 1, 1024])
def test_a_packed_matrix_comes_back_to_the_last_bit(width: int) -> None:
    whole = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    whole += whole.T.clone()
    stored = packed(whole)
    assert stored.numel() == packed_size(width) == _packed(width) <= width * max(width, (width + PANEL) / 2)
    assert torch.equal(unpacked(stored), whole)
    assert unpacked(whole) is whole, "files of earlier versions keep opening"


def test_other_numbers_are_no_packed_matrix() -> None:
    with pytest.raises(RankwiseError, match="7 numbers are no packed symmetric matrix"):
        unpacked(torch.zeros(7))


@pytest.mark.parametrize("width", [PANEL, 2 * PANEL + 3])
def test_sums_are_kept_in_float64(width: int) -> None:
    """What is far below the last digit of a float32 sum still counts."""
    rows = torch.ones(1, width)
    total = torch.full((width, width), 2.0**30, dtype=torch.float64)
    add_gram(total, rows)
    assert bool((symmetric(total) == 2.0**30 + 1).all())


@pytest.mark.parametrize("place", [(0, 0), (0, PANEL + 2)])
def test_what_is_not_finite_stays_so(place: tuple[int, int]) -> None:
    """So damage is seen where the sum is used."""
    rows = torch.ones(2, PANEL + 5)
    rows[place] = torch.nan
    total = torch.zeros(PANEL + 5, PANEL + 5, dtype=torch.float64)
    add_gram(total, rows)
    assert not bool(symmetric(total).isfinite().all())
    assert not bool(total.isfinite().all())

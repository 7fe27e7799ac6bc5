"""The block of columns: the same map, small entries, whatever the factors; and factors without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.compression.stacks import with_identity_columns
from lowrank.errors import RankwiseError
from lowrank.model.factors import LowRankFactors


def draw(shape: tuple[int, int], spread: float, seed: int) -> torch.Tensor:
    """Random numbers whose columns and rows are of sizes that differ by powers of ten."""
    random = np.random.default_rng(seed)
    sizes = [10 ** random.uniform(-spread, spread, size=count) for count in shape]
    return torch.from_numpy(sizes[0][:, None] * random.standard_normal(shape) * sizes[1])


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 12), more=st.integers(0, 20), m=st.integers(1, 15), spread=st.floats(0, 3),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_the_map_stays_and_no_entry_is_large(rank: int, more: int, m: int, spread: float, seed: int) -> None:
    n = rank + more
    down, up = draw((rank, n), spread, seed), draw((m + rank, rank), spread, seed + 1)
    found = with_identity_columns(LowRankFactors(down, up), "here")
    assert found.order.sort().values.tolist() == list(range(n))
    assert found.rest.shape == (rank, more)
    assert not found.rest.numel() or float(found.rest.abs().max()) <= 2 * (1 + 1e-6)
    first = torch.cat([torch.eye(rank, dtype=torch.float64), found.rest], dim=1)[:, found.order.argsort()]
    product = up @ down
    assert torch.allclose(found.up @ first, product, atol=1e-7 * float(product.abs().max()))


def test_elimination_alone_would_leave_large_entries() -> None:
    """The matrix of Kahan's kind on which pivoting picks badly: exchanges are what bounds the entries."""
    rank = 16
    lower = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    down = torch.cat([lower, torch.ones(1, rank, dtype=torch.float64)]).T.contiguous()
    eliminated = torch.linalg.solve(down[:, :rank], down[:, rank:])
    assert float(eliminated.abs().max()) > 1e4
    found = with_identity_columns(LowRankFactors(down, torch.eye(rank, dtype=torch.float64)), "here")
    assert float(found.rest.abs().max()) <= 2
    first = torch.cat([torch.eye(rank, dtype=torch.float64), found.rest], dim=1)[:, found.order.argsort()]
    assert torch.allclose(found.up @ first, down, atol=1e-9)


def test_a_factor_without_full_rank_is_named() -> None:
    down = torch.ones(2, 5, dtype=torch.float64)
    with pytest.raises(RankwiseError, match="layer 7: its factor of rank 2 has not full rank"):
        with_identity_columns(LowRankFactors(down, torch.eye(2, dtype=torch.float64)), "layer 7")

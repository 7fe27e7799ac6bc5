"""Sums of x'x over batches of rows x: half of a symmetric matrix is enough.

Batches are multiplied panel by panel, each with the columns from its own on, which leaves out most of what lies below
the diagonal: for 1536 features three fifths of the time (`tests/benchmarks/gram.py`). Files hold the same panels.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from lowrank.errors import RankwiseError

PANEL = 256
"""Columns of a panel: wide enough for fast products, narrow enough to leave out much."""


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X'X to the upper triangle; below it stays what `symmetric` ignores.

    Args:
        total: n x n, float64; changed.
        rows: X, t x n; products are formed in its own dtype.
    """
    for start in range(0, rows.shape[1], PANEL):
        total[start : start + PANEL, start:] += rows[:, start : start + PANEL].T @ rows[:, start:]


def symmetric(total: torch.Tensor) -> torch.Tensor:
    """The whole matrix, n x n, of which the upper triangle is given."""
    whole = total.triu()
    whole += total.triu(1).T
    return whole


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix, n x n, as files hold it: its panels of rows, each from its own columns on, in a row."""
    starts = range(0, len(matrix), PANEL)
    return torch.cat([matrix[start : start + PANEL, start:].flatten() for start in starts])


def unpacked(stored: torch.Tensor) -> torch.Tensor:
    """The whole matrix, n x n, of what `packed` gave; one that is whole, as earlier versions stored it, as it is.

    Raises:
        RankwiseError: so many numbers are no packed matrix.
    """
    if stored.dim() == 2:
        return stored
    width = bisect_left(range(len(stored) + 1), len(stored), key=packed_size)
    if packed_size(width) != len(stored):
        raise RankwiseError(f"{len(stored)} numbers are no packed symmetric matrix: another program made the file")
    whole, read = stored.new_empty(width, width), 0
    for start in range(0, width, PANEL):
        rows, columns = min(PANEL, width - start), width - start
        panel = stored[read : read + rows * columns].view(rows, columns)
        whole[start : start + rows, start:] = panel
        whole[start + rows :, start : start + rows] = panel[:, rows:].T
        read += rows * columns
    return whole


def packed_size(width: int) -> int:
    """Numbers of a packed matrix, width x width."""
    return sum(min(PANEL, width - start) * (width - start) for start in range(0, width, PANEL))

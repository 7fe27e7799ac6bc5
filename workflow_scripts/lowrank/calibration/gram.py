"""Sums of x'x over batches of rows x: half of a symmetric matrix is enough.

Batches are multiplied panel by panel, each with the columns from its own on, which leaves out most of what lies below
the diagonal: for 1536 features three fifths of the time (`tests/benchmarks/gram.py`).
"""

from __future__ import annotations

import torch

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

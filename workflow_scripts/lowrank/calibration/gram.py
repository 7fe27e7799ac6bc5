"""Sums of x'x over batches of rows x: half of a symmetric matrix is enough.

Batches are multiplied panel by panel, each with the columns from its own on, which leaves out most of what lies below
the diagonal: for 1536 features three fifths of the time (`tests/benchmarks/gram.py`). Files hold the same panels.

GPUs multiply 16-bit numbers several times as fast as those of 32 bits. There a number of 32 bits is split into two
of 16, x = hi + lo up to 2^-17 |x|: their products are exact in float32, in which they are summed.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from lowrank.errors import RankwiseError

PANEL = 256
"""Columns of a panel: wide enough for fast products, narrow enough to leave out much."""
WIDE_PANEL = 2048
"""The same on a GPU, which smaller products would not fill."""


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X'X to the upper triangle; below it stays what `symmetric` ignores.

    Args:
        total: n x n, float64; changed.
        rows: X, t x n; products are formed in its own dtype.
    """
    for start in range(0, rows.shape[1], PANEL):
        total[start : start + PANEL, start:] += rows[:, start : start + PANEL].T @ rows[:, start:]


SLAB = 1024
"""Rows whose products are summed in float32: few enough for rounding that piles up, as that of tensor cores does."""


def add_gram_in_parts(total: torch.Tensor, rows: torch.Tensor) -> None:
    """As `add_gram`, by products of bfloat16 parts: hi'hi + hi'lo + lo'hi.

    What is left out, lo'lo and what two parts do not hold, is at most 2^-15 of sqrt((X'X)_ii (X'X)_jj), and some 2^-18
    of it unless numbers are all alike.

    Args:
        total: n x n, float64; changed.
        rows: X, t x n, float32.
    """
    for slab in torch.split(rows, SLAB):
        hi = slab.bfloat16()
        lo = (slab - hi).bfloat16()
        _add_product(total, torch.cat([hi, hi, lo]), torch.cat([hi, lo, hi]))


def add_gram_of_halves(total: torch.Tensor, rows: torch.Tensor) -> None:
    """As `add_gram`, of numbers of 16 bits, whose products are exact in float32.

    Args:
        total: n x n, float64; changed.
        rows: X, t x n, bfloat16 or float16.
    """
    for slab in torch.split(rows, SLAB):
        _add_product(total, slab, slab)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add A'B, which is symmetric, to the upper triangle."""
    for start in range(0, left.shape[1], WIDE_PANEL):
        panel = left[:, start : start + WIDE_PANEL]
        total[start : start + WIDE_PANEL, start:] += product_in_float32(panel, right[:, start:])


def product_in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A'B of 16-bit numbers, m x n in float32: products are exact, sums rounded to float32.

    Args:
        left: A, t x m.
        right: B, t x n.
    """
    if left.is_cuda:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.float().T @ right.float()  # no faster, and the same numbers: elsewhere results would be of 16 bits


def prefers_parts(like: torch.Tensor) -> bool:
    """Whether products of 16 bits are for such numbers: of a 16-bit model, on a GPU that has bfloat16."""
    on_gpu = like.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return on_gpu and like.dtype.itemsize == 2


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

"""Truncated singular value decompositions that weigh the rows or the columns of a matrix.

Both solve min ||D (W - W')|| or min ||(W - W') S|| over matrices W' of rank r, by Eckart and Young from the
decomposition of D W or W S. Weights are never divided by where a product with W itself gives the same:

- rows: D W = P E V' gives W' = D^-1 P_r E_r V_r' = W V_r V_r';
- columns: W S = U E Q' gives W' = U_r E_r Q_r' S^-1 = U_r U_r' W.

The singular values are shared evenly by both factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.bases.principal import left_singular_vectors
from lowrank.errors import RankwiseError
from lowrank.model.factors import LowRankFactors

NEGLIGIBLE = 1e-6
"""Smallest weight of a row, as a share of the largest: rows that do not matter get what the others leave over."""


@dataclass(frozen=True)
class OrderedFactors:
    """Factors of a matrix whose prefixes are those of every rank: W' = up[:, :r] down[:r].

    Attributes:
        up: m x k.
        down: k x n.
    """

    up: torch.Tensor
    down: torch.Tensor

    def factors(self, rank: int, bias: torch.Tensor | None) -> LowRankFactors:
        """The low-rank pair of a rank, on the CPU; the dense layer's own bias stays as it is.

        Raises:
            RankwiseError: the matrix has no such rank.
        """
        if not 1 <= rank <= len(self.down):
            raise RankwiseError(f"rank {rank} is not within 1 to {len(self.down)}, what the decomposition holds")
        down, up = self.down[:rank], self.up[:, :rank]
        return LowRankFactors(down.to("cpu", copy=True), up.to("cpu", copy=True), bias)


def weigh_columns(weight: torch.Tensor, scale: torch.Tensor, where: str) -> OrderedFactors:
    """The best approximation of W diag(s), for every rank.

    Args:
        weight: W, m x n.
        scale: s, n, positive.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: a weight or scale is not finite, or the decomposition fails; the layer is named.
    """
    w, s = weight.double(), scale.to(weight.device).double()
    u = singular_directions(w * s, where)
    return balanced(u, u.T @ w, weight.dtype)


def weigh_rows(weight: torch.Tensor, importance: torch.Tensor, where: str) -> OrderedFactors:
    """The best approximation of diag(d) W, for every rank.

    Rows of weight zero (and of next to nothing) count as `NEGLIGIBLE` times the largest weight: they do not disturb
    the others, and get the directions that those leave over.

    Args:
        weight: W, m x n.
        importance: d, m, not negative.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: all weights are zero, one is not finite, or the decomposition fails; the layer is named.
    """
    w, d = weight.double(), importance.to(weight.device).double()
    _check_finite(d, where)
    if not float(d.max()) > 0:
        raise RankwiseError(f"{where}: no row matters (all weights are zero), so no approximation of it is the best")
    d = d.clamp(min=NEGLIGIBLE * float(d.max()))
    v = singular_directions((d[:, None] * w).T, where)
    return balanced(w @ v, v.T, weight.dtype)


def weigh_columns_randomised(
    weight: torch.Tensor, scale: torch.Tensor, rank: int, seed: int, where: str
) -> OrderedFactors:
    """An approximation of W diag(s) from `rank` random directions and two power iterations (Halko et al.).

    It is worse than `weigh_columns`, and is here because it is what ASVD's authors run.

    Args:
        weight: W, m x n.
        scale: s, n, positive.
        rank: r; the factors hold this rank only.
        seed: of the random directions.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: a weight or scale is not finite, or the decomposition fails; the layer is named.
    """
    w, s = weight.double(), scale.to(weight.device).double()
    _check_finite(w * s, where)
    devices = [w.device] if w.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            u, sigma, v = torch.svd_lowrank(w * s, q=rank, niter=2)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankwiseError(f"{where}: the randomised decomposition failed: {error}") from error
    return balanced(u, (v * sigma).T / s, weight.dtype)


def singular_directions(matrix: torch.Tensor, where: str) -> torch.Tensor:
    """Left singular vectors of an m x n matrix, m x min(m, n), by decreasing singular value.

    Raises:
        RankwiseError: an entry is not finite, or the decomposition fails; the layer is named.
    """
    _check_finite(matrix, where)
    try:
        u, _ = left_singular_vectors(matrix)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankwiseError(f"{where}: the singular value decomposition failed: {error}") from error
    return u


def balanced(up: torch.Tensor, down: torch.Tensor, dtype: torch.dtype) -> OrderedFactors:
    """The same product with both vectors of each of its terms equally long; terms that vanish stay as they are.

    Args:
        up: m x k.
        down: k x n.
        dtype: of the weight; the factors are kept in it, but in no less than float32.
    """
    ratio = down.norm(dim=1) / up.norm(dim=0)
    root = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio)).sqrt()
    kept = torch.promote_types(dtype, torch.float32)
    return OrderedFactors((up * root).to(kept), (down / root[:, None]).to(kept))


def _check_finite(matrix: torch.Tensor, where: str) -> None:
    if not bool(matrix.isfinite().all()):
        raise RankwiseError(
            f"{where}: its weights or its statistics are not finite; set `dtype: float32`, or fetch anew"
        )

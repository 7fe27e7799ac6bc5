"""Truncation-aware whitening (SVD-LLM): the decomposition of W S, where S S' is the second moment of the inputs.

With E[x x'] = S S', the mean square error of a truncation is E|(W - W') x|^2 = ||(W - W') S||^2, so the best W' of
rank r is the truncation of W S, times S^-1. All square roots S of one second moment give the same W' (Cholesky's,
the symmetric one, the eigenvectors'), and so do

- the uncentred principal basis of the outputs (`covariance: {estimator: uncentred}`), W' = U_r U_r' W;
- the joint decomposition of DRONE, which decomposes W = U_W E_W V_W' and X = U_X E_X V_X', truncates
  E_W V_W' U_X E_X, and maps back: U_X E_X is one more square root of X X'.

So neither is a method of its own here: `svd-llm` is both, and the tests compare all three.
"""

from __future__ import annotations

import torch

from lowrank.bases.weighted_svd import OrderedFactors, balanced, singular_directions
from lowrank.errors import RankwiseError

RIDGE = 1e-6
"""What is added to the diagonal of a singular matrix, as a share of the diagonal's mean: equally in all directions, so
that what inputs say nothing about is left as it was. Shares of each feature's own value (`bases.damping`) would turn
directions without inputs towards small features."""


def cholesky_factor(matrix: torch.Tensor, where: str) -> torch.Tensor:
    """S with S S' = C, lower triangular, in float64.

    A matrix that is not positive definite in floating point (fewer tokens than features, a feature that is always
    zero) is taken as C + (1e-6 mean(diag C) - min(lambda_min, 0)) I, lambda_min being its smallest eigenvalue.

    Args:
        matrix: C, n x n, symmetric and positive semidefinite but for rounding.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: it is zero or not finite, or cannot be repaired so; the layer is named.
    """
    c = (matrix.double() + matrix.double().T) / 2
    if not bool(c.isfinite().all()):
        raise RankwiseError(f"{where}: the second moment of its inputs is not finite; its statistics are damaged")
    mean = float(c.diagonal().mean())
    if mean <= 0:
        raise RankwiseError(f"{where}: all its inputs are zero, so that any weights are as good as its own")
    root: torch.Tensor
    root, info = torch.linalg.cholesky_ex(c)
    if int(info) == 0:
        return root
    try:
        below = min(float(torch.linalg.eigvalsh(c)[0]), 0.0)
        root = torch.linalg.cholesky(c + (RIDGE * mean - below) * torch.eye(len(c), dtype=c.dtype, device=c.device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankwiseError(f"{where}: the second moment of its inputs cannot be decomposed: {error}") from error
    return root


def whitened_factors(weight: torch.Tensor, root: torch.Tensor, where: str) -> OrderedFactors:
    """The truncations of W S times S^-1, for every rank.

    Args:
        weight: W, m x n.
        root: S, n x n, lower triangular, float64.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: a weight is not finite, or the decomposition fails; the layer is named.
    """
    whitened = weight.double() @ root
    u = singular_directions(whitened, where)
    down = torch.linalg.solve_triangular(root, u.T @ whitened, upper=False, left=False)
    return balanced(u, down, weight.dtype)

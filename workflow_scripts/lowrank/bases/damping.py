"""Damping of second moments by each feature's own size, so that scaling a feature changes nothing but its unit.

A second moment from few tokens has directions in which nothing was seen, and is singular where features outnumber
tokens. What is added to its diagonal says how little such a direction may count. A share of the diagonal's mean would
do, were all features of one size: one that is a hundred times as large as the others, as residual streams have some,
lifts the mean above all that they ever did. A share of each feature's own second moment has no such blind spot.
"""

from __future__ import annotations

import torch

SMALLEST = 1e-10
"""Of a feature against the largest, as root mean squares."""


def damped_cholesky(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """L with L L' = C + eps diag(C), lower triangular, n x n in float64.

    With features scaled by s, diag(s) C diag(s) has diag(s) L. A feature that is always zero counts as large as the
    smallest of the others; none counts as smaller than `SMALLEST` of the largest, since rounding alone would be left of
    what is multiplied by L and its inverse. Where rounding has left the correlations with an eigenvalue so far below
    zero that this is not positive, eps is raised by it.

    Args:
        moment: C, n x n, symmetric and positive semidefinite but for rounding, not all zero.
        damping: eps.

    Raises:
        RuntimeError: values that are not finite, or a diagonal without a positive value.
    """
    c = (moment.double() + moment.double().T) / 2
    own = c.diagonal()
    seen = own[own > 0]
    if not len(seen) or not bool(c.isfinite().all()):
        raise RuntimeError("a second moment that is zero or not finite")
    sizes = own.clamp(min=max(float(seen.min()), SMALLEST**2 * float(own.max()))).sqrt()
    correlations = c / sizes / sizes[:, None]
    identity = torch.eye(len(c), dtype=c.dtype, device=c.device)
    lower, info = torch.linalg.cholesky_ex(correlations + damping * identity)
    if int(info):
        below = float(torch.linalg.eigvalsh(correlations)[0])
        lower = torch.linalg.cholesky(correlations + (damping - below) * identity)
    root: torch.Tensor = sizes[:, None] * lower
    return root

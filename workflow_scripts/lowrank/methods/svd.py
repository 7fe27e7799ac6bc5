"""Plain truncated singular value decomposition of each weight matrix, at one kept ratio for all.

By Eckart and Young the best approximation of W itself; it ignores what flows through W, and is far from the best
approximation of W x. It stands in the tables to show what the feature-based methods gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lowrank.config.sections import MethodSettings

if TYPE_CHECKING:
    from lowrank.compression import CompressionTask
    from lowrank.factors import LowRankFactors


class Settings(MethodSettings):
    """Plain SVD needs no data."""

    kind: Literal["svd"]
    uncompressed: tuple[str, ...] = ()


def compress(task: CompressionTask) -> dict[str, LowRankFactors]:
    """Truncate every matrix at the rank that the uniform ratio buys.

    With white inputs (Cov(x) = I, mean 0) the principal basis of W x is the left singular basis of W, so U_r U_r' W
    is the truncated decomposition.

    Raises:
        RankwiseError: a decomposition fails; the layer is named.
    """
    import torch

    from lowrank.allocation import uniform_ranks
    from lowrank.bases import principal_basis
    from lowrank.factors import LowRankFactors

    ranks = uniform_ranks(task.budget, task.ratio, task.settings.uncompressed)
    factors: dict[str, LowRankFactors] = {}
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer = task.model.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        n = weight.shape[1]
        white = torch.eye(n, dtype=torch.double, device=weight.device)
        basis = principal_basis(weight, None, white, torch.zeros(n, dtype=torch.double, device=weight.device), name)
        factors[name] = LowRankFactors(basis.projection[:rank], basis.directions[:, :rank], bias)
    return factors

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

    Raises:
        RankwiseError: a decomposition fails; the layer is named.
    """
    import torch

    from lowrank.allocation import uniform_ranks
    from lowrank.errors import RankwiseError
    from lowrank.factors import LowRankFactors

    ranks = uniform_ranks(task.budget, task.ratio, task.settings.uncompressed)
    factors: dict[str, LowRankFactors] = {}
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer = task.model.get_submodule(name)
        weight, bias = layer.weight.double(), layer.bias
        try:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        except torch.linalg.LinAlgError as error:
            raise RankwiseError(f"{name}: the singular value decomposition failed: {error}") from error
        root = s[:rank].sqrt()
        factors[name] = LowRankFactors(root[:, None] * vh[:rank], u[:, :rank] * root, bias)
    return factors

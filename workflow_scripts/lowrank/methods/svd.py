"""Plain truncated singular value decomposition of each weight matrix, at one kept ratio for all.

By Eckart and Young the best approximation of W itself; it ignores what flows through W, and is far from the best
approximation of W x. It stands in the tables to show what the feature-based methods gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lowrank.config.low_rank import UniformSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.replacements import Deferred


class Settings(UniformSettings):
    """Plain SVD needs no data."""

    kind: Literal["svd"]

    @property
    def takes_experts(self) -> bool:
        """Each matrix by itself."""
        return True


def compress(task: CompressionTask) -> Deferred[LowRankFactors]:
    """Truncate every matrix at the rank that the uniform ratio buys: U_r U_r' W, U_r the left singular vectors of W.

    Raises:
        RankwiseError: a decomposition fails; the layer is named.
    """
    import torch

    from lowrank.bases.principal import left_singular_vectors
    from lowrank.errors import RankwiseError
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.replacements import Deferred
    from lowrank.model.runtime import pick_device
    from lowrank.search.uniform import uniform_layers

    device = pick_device()
    layers = uniform_layers(task.budget, task.ratio, task.settings.uncompressed, task.settings.rounding)
    ranks = {module.name: rank for module, rank in layers}

    def truncated(name: str) -> LowRankFactors:
        layer = task.model.get_submodule(name)
        weight = layer.weight.to(device).double()
        try:
            vectors, _ = left_singular_vectors(weight)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankwiseError(f"{name}: the singular value decomposition failed: {error}") from error
        up = vectors[:, : ranks[name]]
        return LowRankFactors((up.T @ weight).cpu(), up.cpu(), layer.bias)

    return Deferred(ranks, truncated)

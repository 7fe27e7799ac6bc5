"""FWSVD: each weight matrix is decomposed with its rows weighted by how much the loss depends on them.

The weight of row i is d_i = sqrt(sum_s sum_j g_sij^2), with g_s the gradient of a calibration window's loss: the
square root of the row's share of the diagonal of the empirical Fisher information. The factors minimise
||diag(d) (W - W')||. Like plain SVD it ignores what flows through W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, Positive
from lowrank.config.low_rank import UniformSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(UniformSettings):
    """FWSVD reads calibration windows, for gradients."""

    reads: ClassVar[tuple[Literal["statistics", "tokens"], ...]] = ("tokens",)
    counts_windows: ClassVar[str] = "sequences"

    kind: Literal["fwsvd"]
    calibration: Name
    sequences: Positive | None = Field(
        default=None, description="calibration windows to take gradients on, the first ones; null: all"
    )


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Decompose every matrix with weighted rows, at the rank that the uniform ratio buys, as it is asked for.

    Raises:
        RankwiseError: the loss depends on no weight of a layer, a gradient is not finite, or a decomposition fails;
            the layer is named.
    """
    from lowrank.bases.weighted_svd import weigh_rows
    from lowrank.calibration.corpora import first_windows
    from lowrank.calibration.gradients import sum_gradients
    from lowrank.model.devices import pick_devices
    from lowrank.model.replacements import Deferred
    from lowrank.model.runtime import pick_device
    from lowrank.search.uniform import uniform_layers

    layers = uniform_layers(task.budget, task.ratio, task.settings.uncompressed, task.settings.rounding)
    if not layers:
        return {}
    device = pick_device()
    tokens = first_windows(task.required_tokens(), task.settings.sequences, "sequences")
    names = [module.name for module, _ in layers]
    squares = sum_gradients(task.model, tokens, names, pick_devices(), squared=True)
    importance = {name: squares.pop(name).double().sum(dim=1).sqrt() for name in names}
    ranks = {module.name: rank for module, rank in layers}

    def truncated(name: str) -> LowRankFactors:
        layer = task.model.get_submodule(name)
        return weigh_rows(layer.weight.to(device), importance[name], name).factors(ranks[name], layer.bias)

    return Deferred(ranks, truncated)

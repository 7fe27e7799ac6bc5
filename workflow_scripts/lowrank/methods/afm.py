"""AFM (atomic feature mimicking): principal bases of the outputs with a bias, at one kept ratio for all layers.

The paper's starting point (Section 3.1): the covariance is the plain one over all tokens, so a preset names one with
`estimator: naive`; every linear layer is compressed, v too. The biases count towards the budget (with `estimator:
uncentred` there are none).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from lowrank.config.base import Name
from lowrank.config.low_rank import UniformSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(UniformSettings):
    """AFM reads the bases of one covariance."""

    kind: Literal["afm"]
    calibration: Name
    covariance: Name

    @property
    def takes_experts(self) -> bool:
        """By the bases of each."""
        return True


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Slice the bases at the ranks that the uniform ratio buys."""
    from lowrank.search.allocation import sliced_factors
    from lowrank.search.uniform import uniform_layers

    layers = uniform_layers(task.budget, task.ratio, task.settings.uncompressed, task.settings.rounding)
    return sliced_factors(
        task.required_bases(), task.model, task.budget, {module.name: rank for module, rank in layers}
    )

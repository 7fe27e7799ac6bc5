"""SVD-LLM: truncation-aware whitening, at one kept ratio for all layers.

With S S' = E[x x'] the truncation of W S, times S^-1, minimises the mean square error of the layer's outputs. It is
also what DRONE's joint decomposition of W and X gives, and what uncentred principal bases give (see
`bases.whitening`); SVD-LLM-V2 reaches the same truncation by eigenvectors. They are no methods of their own here.

A dense layer's own bias stays as it is. `update: true` adds the closed-form update: the up factors are refitted on the
inputs that the compressed model gives (see `least_squares_update`), to the outputs of the dense model or, as
the authors' program does, to what the dense layer makes of these inputs. That program refits the layers of a block on
inputs that its own earlier layers do not change yet; here they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, Positive
from lowrank.config.low_rank import UniformSettings
from lowrank.config.presets import Reads

if TYPE_CHECKING:
    import torch

    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(UniformSettings):
    """SVD-LLM reads second moments, and calibration windows for its update."""

    reads: ClassVar[Reads] = ("statistics", "tokens")
    counts_windows: ClassVar[str] = "windows"

    kind: Literal["svd-llm"]
    calibration: Name
    update: bool = Field(default=False, description="refit the up factors on the inputs in the compressed model")
    target: Literal["dense", "inputs"] = Field(
        default="inputs",
        description="update: outputs to fit; dense: the dense model's; inputs: the dense layer's on the inputs at hand",
    )
    windows: Positive | None = Field(
        default=None, description="update: calibration windows to refit on, the first ones; null: all"
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Two keys are about the update."""
        reasons = super().unread(given)
        if not given.get("update"):
            reasons["windows"] = "is for `update: true` only; the whitening reads the statistics of all windows"
            reasons["target"] = "is for `update: true` only; leave it out"
        return reasons

    @property
    def needs(self) -> Reads:
        """Windows are for the update."""
        return self.reads if self.update else ("statistics",)

    @property
    def takes_experts(self) -> bool:
        """Without the update: on its inputs the router may choose other experts than in the dense model."""
        return not self.update


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Whiten and truncate every matrix at the rank that the uniform ratio buys; without an update, as it is asked for.

    Raises:
        RankwiseError: a layer's inputs are all zero, or a decomposition fails; the layer is named.
    """
    from lowrank.bases.whitening import whitened_factors
    from lowrank.calibration.corpora import first_windows
    from lowrank.compression.least_squares_update import refit_up_factors
    from lowrank.model.devices import pick_devices
    from lowrank.model.partial_forward import on_devices
    from lowrank.model.replacements import Deferred
    from lowrank.model.runtime import pick_device
    from lowrank.search.uniform import uniform_layers

    layers = uniform_layers(task.budget, task.ratio, task.settings.uncompressed, task.settings.rounding)
    if not layers:
        return {}
    device = pick_device()
    roots = _Roots(task, device)
    chosen = {module.name: (module, rank) for module, rank in layers}

    def truncated(name: str) -> LowRankFactors:
        (module, rank), layer = chosen[name], task.model.get_submodule(name)
        root = roots.of(module.layer, module.type.site)
        return whitened_factors(layer.weight.to(device), root, name).factors(rank, layer.bias)

    factors = Deferred(chosen, truncated)
    if not task.settings.update:
        return factors
    windows = first_windows(task.required_tokens(), task.settings.windows, "windows")
    with on_devices(task.model, pick_devices()):
        return refit_up_factors(
            task.model, windows, task.budget, factors, task.model.device, task.settings.target, task.parts
        )


class _Roots:
    """Cholesky factors of the second moments; the last one is kept, for the layers that share an input."""

    def __init__(self, task: CompressionTask, device: torch.device) -> None:
        self._moments = lru_cache(maxsize=1)(task.required_statistics().of)
        self._device = device
        self.of = lru_cache(maxsize=1)(self._root)

    def _root(self, layer: int, site: str) -> torch.Tensor:
        from lowrank.bases.whitening import cholesky_factor
        from lowrank.config.presets import Covariance

        second_moment, _ = self._moments(layer)[site].estimate(Covariance(estimator="uncentred"))
        return cholesky_factor(second_moment.to(self._device), f"block {layer}, input '{site}'")

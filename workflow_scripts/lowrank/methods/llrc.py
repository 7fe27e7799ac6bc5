"""LLRC (LREC 2026): masks over singular directions, trained on calibration text; nothing else is trained.

Directions are ASVD's: W diag(s) = U E V', s_j = mean(|x_j|)^alpha, and all of them at the start. Masks over them are
trained so that hidden states stay those of the dense model while the directions that are left become fewer
(`compression.masks`). They need not be the first ones of a matrix. Training ends some steps after the directions that
are left meet the budget; a matrix that has as many as break-even or more is dense.

Ours beyond the paper: distances are shares of each token's own size; the pressure on the logits grows until the budget
is met, where theirs is constant, and from then on it acts as theirs does, where the budget is not met; no term for
smooth masks; ranks are multiples of 8, those with the largest logits (two versions of the program keep as many first
directions instead), with what rounding frees given back.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, NotNegative, Number, Positive
from lowrank.config.low_rank import LowRankSettings
from lowrank.config.presets import Reads

if TYPE_CHECKING:
    import torch

    from lowrank.compression.compress import CompressionTask
    from lowrank.compression.masks import MaskedLinear
    from lowrank.model.factors import LowRankFactors

log = logging.getLogger(__name__)

_LEAST_SCALE = 1e-6
Above = Annotated[Number, Field(gt=0)]


class Settings(LowRankSettings):
    """LLRC reads the mean size of all inputs, and trains on its calibration windows."""

    reads: ClassVar[Reads] = ("statistics", "tokens")

    kind: Literal["llrc"]
    calibration: Name
    uncompressed: tuple[str, ...] = Field(default=(), description="types that stay dense")
    alpha: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.5, description="exponent of the inputs' mean size in the decomposition"
    )
    steps: Positive = Field(default=3000, description="at most; an error if the budget is not met by then")
    batch_size: Positive = Field(default=4, description="windows a step")
    learning_rate: Above = Field(default=1e-2, description="of Adam, on the logits of masks")
    temperature: Above = Field(default=0.4, description="of the sigmoid that the gradient goes through")
    pressure: Above = Field(default=0.1, description="weight of the mean logit in the first step")
    growth: Annotated[Number, Field(ge=0)] = Field(
        default=0.01, description="by which share the pressure grows from step to step, until the budget is met"
    )
    settle: NotNegative = Field(
        default=100, description="steps more from then on, with pressure only where the budget is not met"
    )

    @property
    def is_random(self) -> bool:
        """The seed draws windows and masks."""
        return True


def compress(task: CompressionTask) -> dict[str, LowRankFactors]:
    """Decompose every matrix, train the masks, and keep the directions of the largest logits.

    Raises:
        RankwiseError: the ratio is out of reach or not met within `steps`, or a decomposition fails; named.
    """
    from lowrank.compression.masks import MaskTraining, trained_masks
    from lowrank.model.devices import device_of, pick_devices
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.partial_forward import on_devices
    from lowrank.ranks.rounding import pair_or_dense, rounded_ranks

    if not task.ratio:
        return {}
    settings, devices, budget = task.settings, pick_devices(), task.budget
    device = devices[0]
    free = budget.free(settings.uncompressed)
    allowed = budget.allowed(task.ratio) - budget.dense_parameters + sum(module.parameters for module in free)
    rounded_ranks(budget, task.ratio, dict.fromkeys((module.name for module in free), 1))  # an error if out of reach

    def enough(counts: dict[str, int]) -> bool:
        return sum(pair_or_dense(budget, module, counts[module.name]) for module in free) <= allowed

    layers = _masked(task, device, "cpu" if len(devices) > 1 else device)
    training = MaskTraining(
        settings.steps, settings.batch_size, settings.learning_rate, settings.temperature, settings.pressure,
        settings.growth, settings.settle, task.seed,
    )  # fmt: skip
    directions = sum(layer.down.nbytes + layer.up.nbytes for layer in layers.values())
    with on_devices(task.model, devices, directions / budget.dimensions.layers):
        layers = {name: each.placed(device_of(task.model.get_submodule(name))) for name, each in layers.items()}
        logits = trained_masks(task.model, task.required_tokens(), layers, enough, training, device, task.parts)
    ranks = rounded_ranks(budget, task.ratio, {name: int((each > 0).sum()) for name, each in logits.items()})
    factors, first = {}, 0
    for name, rank in ranks.items():
        layer = layers.pop(name)
        if rank is None:
            continue
        kept = logits[name].sort(descending=True, stable=True).indices[:rank].sort().values
        first += int((kept < rank).sum())
        bias = task.model.get_submodule(name).bias
        factors[name] = LowRankFactors(layer.down.cpu()[kept], layer.up.cpu()[:, kept], bias)
    share = first / max(1, sum(rank or 0 for rank in ranks.values()))
    task.account["masks"] = {"share_of_first_directions": share}
    log.info("%.1f %% of the directions that are left are those of the largest singular values", 100 * share)
    return factors


def _masked(task: CompressionTask, device: torch.device, waiting: torch.device | str) -> dict[str, MaskedLinear]:
    """Every matrix with all of its directions, in the model's dtype, decomposed on one device and put on another."""
    from lowrank.bases.weighted_svd import weigh_columns
    from lowrank.compression.masks import MaskedLinear

    moments = lru_cache(maxsize=1)(task.required_statistics().of)
    layers = {}
    for module in task.budget.free(task.settings.uncompressed):
        layer = task.model.get_submodule(module.name)
        scale = moments(module.layer)[module.type.site].absolute_mean.double() ** task.settings.alpha + _LEAST_SCALE
        whole = weigh_columns(layer.weight.to(device), scale, module.name)
        down, up = whole.down.to(layer.weight.dtype), whole.up.to(layer.weight.dtype)
        layers[module.name] = MaskedLinear(down, up, layer.bias).placed(waiting)
    return layers

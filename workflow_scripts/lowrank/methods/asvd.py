"""ASVD: each weight matrix is decomposed with its columns scaled by the size of what they read.

The scale of column j is s_j = mean(|x_j|)^alpha + 1e-6 over the calibration tokens, and the factors minimise
||(W - W') diag(s)||. Ranks come from the losses of the model with one layer factorised at a time
(`allocation: strs`, see `compression.sensitivity_search`), or from one kept ratio for all.

Two departures from the authors' program: the decomposition is exact (theirs is `decomposition: randomised`), and the
budget is that of the decoder's linear layers, so the head, which they also factorise, stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import AtLeastTwo, Distinct, Name, Number, Positive, Share
from lowrank.config.low_rank import UniformSettings
from lowrank.config.presets import Calibration, Reads
from lowrank.ranks.rounding import Rounding

if TYPE_CHECKING:
    import torch

    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.families import LinearModule
    from lowrank.ranks.budget import Budget

_LEAST_SCALE = 1e-6


class Settings(UniformSettings):
    """ASVD reads the mean size of all inputs, and calibration windows for its search."""

    reads: ClassVar[Reads] = ("statistics", "tokens")

    kind: Literal["asvd"]
    calibration: Name
    alpha: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.5, description="exponent of the inputs' mean size; 0 is plain SVD"
    )
    decomposition: Literal["exact", "randomised"] = Field(
        default="exact", description="randomised: two power iterations on random directions, as the authors do"
    )
    allocation: Literal["strs", "uniform"] = Field(
        default="strs", description="strs: ranks by the sensitivity of each layer; uniform: one kept ratio for all"
    )
    kept: Distinct[Share] = Field(
        default=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9], min_length=1, description="strs: kept ratios at which layers are tried"
    )
    windows: Positive | None = Field(default=32, description="strs: at most so many calibration windows; null: all")
    length: AtLeastTwo | None = Field(default=None, description="strs: at most so many tokens of each; null: all")
    rounding: Rounding = Field(
        default="give-back",
        description="strs: whether what the cut leaves of the budget is given back, in steps of 8; uniform: as of svd",
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """One kept ratio for all needs no trials."""
        reasons = super().unread(given)
        if given.get("allocation") == "uniform":
            reasons |= dict.fromkeys(("kept", "windows", "length"), "is for `allocation: strs` only; leave it out")
        return reasons

    @property
    def needs(self) -> Reads:
        """Windows are for the trials."""
        return ("statistics",) if self.allocation == "uniform" else self.reads

    @property
    def is_random(self) -> bool:
        """The randomised decomposition begins with random directions."""
        return super().is_random or self.decomposition == "randomised"

    @classmethod
    def authors_rule(cls, given: Mapping[str, Any]) -> bool:
        """Not the ranks that the search tries."""
        return super().authors_rule(given) and given.get("allocation") == "uniform"

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """The search decides by losses."""
        return super().kept_parameters(budget, ratio) if self.allocation == "uniform" else None

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """The smallest ranks that the search tries may be too large."""
        from lowrank.model.families import FAMILIES
        from lowrank.ranks.reach import candidate_ranks

        known = {linear.name for linear in FAMILIES[budget.dimensions.family].types}
        if self.allocation == "uniform" or not known.issuperset(self.uncompressed):
            return
        budget = self.budget_of_pairs(budget, None)
        smallest = {name: ranks[0] for name, ranks in candidate_ranks(budget, self.kept, self.uncompressed).items()}
        if (least := budget.parameters(smallest)) > budget.allowed(ratio):
            yield (
                "",
                f"removing {ratio} % is out of reach: the smallest ranks that are tried keep "
                f"{100 * least / budget.dense_parameters:.1f} %; add smaller ratios to `kept`, or remove less",
            )

    @property
    def takes_experts(self) -> bool:
        """Trials of single matrices would be as many as there are experts: with one kept ratio for all."""
        return self.allocation == "uniform"


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Find the ranks; every matrix is decomposed with scaled columns as it is asked for.

    Raises:
        RankwiseError: the ratio is out of reach, or a decomposition fails; the layer is named.
    """
    from lowrank.model.replacements import Deferred
    from lowrank.model.runtime import pick_device
    from lowrank.search.uniform import layers_with_ranks, uniform_layers

    if not task.ratio:
        return {}
    device = pick_device()
    factorise = _factoriser(task, device)
    if task.settings.allocation == "uniform":
        layers = uniform_layers(task.budget, task.ratio, task.settings.uncompressed, task.settings.rounding)
    else:
        layers = layers_with_ranks(task.budget, _search_ranks(task, factorise, device))
    chosen = {module.name: (module, rank) for module, rank in layers}

    def factors(name: str) -> LowRankFactors:
        module, rank = chosen[name]
        return factorise(module)(rank)

    return Deferred(chosen, factors)


def _factoriser(
    task: CompressionTask, device: torch.device
) -> Callable[[LinearModule], Callable[[int], LowRankFactors]]:
    """From a layer to its factors of any rank."""
    from lowrank.bases.weighted_svd import weigh_columns, weigh_columns_randomised

    moments = lru_cache(maxsize=1)(task.required_statistics().of)

    def factorise(module: LinearModule) -> Callable[[int], LowRankFactors]:
        layer, name = task.model.get_submodule(module.name), module.name
        weight = layer.weight.to(device)
        scale = moments(module.layer)[module.type.site].absolute_mean.double() ** task.settings.alpha + _LEAST_SCALE
        if task.settings.decomposition == "exact":
            ordered = weigh_columns(weight, scale, name)
            return lambda rank: ordered.factors(rank, layer.bias)
        return lambda rank: weigh_columns_randomised(weight, scale, rank, task.seed, name).factors(rank, layer.bias)

    return factorise


def _search_ranks(
    task: CompressionTask,
    factorise: Callable[[LinearModule], Callable[[int], LowRankFactors]],
    device: torch.device,
) -> dict[str, int | None]:
    """The ranks of the sensitivity-based search."""
    from lowrank.compression.sensitivity_search import cut_trials, measure_layers, spend_rest
    from lowrank.model.devices import pick_devices
    from lowrank.model.partial_forward import on_devices
    from lowrank.ranks.reach import candidate_ranks

    settings, budget = task.settings, task.budget
    windows = task.required_tokens()[: settings.windows, : settings.length]
    candidates = candidate_ranks(budget, settings.kept, settings.uncompressed)
    with on_devices(task.model, pick_devices()):
        trials = measure_layers(task.model, windows, budget, candidates, factorise, task.model.device, task.parts)
    ranks = cut_trials(trials, budget, task.ratio)
    return spend_rest(ranks, trials, budget, task.ratio) if settings.rounding == "give-back" else ranks

"""ZS-SVD (Abbasi et al., ICML 2026): whitened singular directions, left out so that predicted changes cancel out.

Directions are those of SVD-LLM: with E[x x'] = S S' the left singular vectors u_i of W S, so that W' = U_r U_r' W. The
gradient g of the calibration loss says what leaving out one of them changes, to first order: delta_i = -u_i' g W' u_i
(`bases.first_order`). Directions of all matrices leave one by one, of each matrix the last first, so that the sum of
the changes stays near zero (`ranks.zero_sum`); matrices that end above their break-even rank are dense again.

`corrections` truncate, correct and truncate again (`compression.gradient_correction`); the authors' program has none by
default, and asks for five rounds for all models but LLaMA-1-7B.

Departures: ranks are multiples of 8 of at least 8, rounded as those of all methods here. The authors' program collects
second moments in the model of each round and allocates anew; here both stay those of the dense model. Its remapping to
8 bits is left out, and so is the floor of 0.3 break-even ranks that it has at 60 %.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, NotNegative, Positive
from lowrank.config.low_rank import LowRankSettings
from lowrank.config.presets import Reads

if TYPE_CHECKING:
    import torch

    from lowrank.bases.principal import PrincipalBasis
    from lowrank.compression.compress import CompressionTask
    from lowrank.jobs.state import Parts
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.families import LinearModule
    from lowrank.ranks.budget import Ranks

    Decompose = Callable[[LinearModule, torch.Tensor], PrincipalBasis]

log = logging.getLogger(__name__)


class Settings(LowRankSettings):
    """ZS-SVD reads second moments, and calibration windows for gradients."""

    reads: ClassVar[Reads] = ("statistics", "tokens")
    counts_windows: ClassVar[str] = "sequences"

    kind: Literal["zs-svd"]
    calibration: Name
    uncompressed: tuple[str, ...] = Field(default=(), description="types that stay dense")
    allocation: Literal["zero-sum", "smallest", "predicted-loss"] = Field(
        default="zero-sum",
        description="which directions leave; zero-sum: changes of the loss of both signs cancel out; smallest: the "
        "changes of the smallest size; predicted-loss: by the second order, as `rankwise` allocates, on the same "
        "directions",
    )
    sequences: Positive | None = Field(
        default=None, description="calibration windows to take gradients on, the first ones; null: all"
    )
    corrections: NotNegative = Field(
        default=0,
        description="rounds after the truncation: a step along the gradient towards the dense weights, and a "
        "truncation to the same ranks",
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Windows are read for gradients of weights alone."""
        reasons = super().unread(given)
        if given.get("allocation") == "predicted-loss" and not given.get("corrections"):
            reasons["sequences"] = "says nothing to `allocation: predicted-loss` without `corrections`; leave it out"
        return reasons

    @property
    def decompositions(self) -> int:
        """Once, and once more in each round of correction."""
        return 1 + self.corrections

    @property
    def needs(self) -> Reads:
        """The second order comes from the gradients at the outputs, which all methods share."""
        if self.allocation != "predicted-loss":
            return self.reads
        return ("statistics", "gradients", "tokens") if self.corrections else ("statistics", "gradients")

    @property
    def takes_experts(self) -> bool:
        """By what each reads and by the gradients of its weights; corrections were not tried."""
        return not self.corrections


@dataclass(frozen=True)
class _Round:
    """What a round leaves.

    Attributes:
        number: of the round; 0 is the truncation before all corrections.
        predicted: what leaving out directions is predicted to cost, nats per token.
        factors: layer -> its pair.
    """

    number: int
    predicted: float
    factors: dict[str, LowRankFactors]


def compress(task: CompressionTask) -> dict[str, LowRankFactors]:
    """Allocate ranks by predicted changes of the loss, and truncate every whitened matrix.

    Raises:
        RankwiseError: the ratio is out of reach, a gradient is not finite, or a decomposition fails; the layer is
            named.
    """
    from lowrank.compression.gradient_correction import correct
    from lowrank.model.runtime import pick_device
    from lowrank.search.uniform import layers_with_ranks

    if not task.ratio:
        return {}
    device, corrections = pick_device(), task.settings.corrections
    decompose, parts = _decomposer(task, device), task.parts if corrections else None
    last = _kept_round(parts)
    if last is None:
        last = _truncate(task, decompose, device)
        _keep_round(parts, last)
    _say_prediction(task, last.predicted)
    layers = layers_with_ranks(task.budget, {name: pair.rank for name, pair in last.factors.items()})
    for number in range(last.number + 1, corrections + 1):
        factors = correct(task.model, _windows(task), layers, last.factors, decompose, device, parts, number)
        last = _Round(number, last.predicted, factors)
        _keep_round(parts, last)
        log.info("corrections: round %d of %d", number, corrections)
    return last.factors


def _truncate(task: CompressionTask, decompose: Decompose, device: torch.device) -> _Round:
    """Allocate ranks, and cut every matrix to its own."""
    from lowrank.bases.weighted_svd import balanced
    from lowrank.search.uniform import layers_with_ranks

    by_loss = task.settings.allocation == "predicted-loss"
    ranks, predicted, directions = (
        _by_second_order(task, decompose) if by_loss else _by_first_order(task, decompose, device)
    )
    factors: dict[str, LowRankFactors] = {}
    for module, rank in layers_with_ranks(task.budget, ranks):
        layer = task.model.get_submodule(module.name)
        up = directions.pop(module.name)[:, :rank].to(device).double()
        factors[module.name] = balanced(up, up.T @ layer.weight.to(up), layer.weight.dtype).factors(rank, layer.bias)
    return _Round(0, predicted, factors)


def _keep_round(parts: Parts | None, last: _Round) -> None:
    """Keep what another try goes on from, in the place of the round before."""
    import torch

    from lowrank.model.factors import tensors_of

    if parts is not None:
        predicted = torch.tensor(last.predicted, dtype=torch.float64)
        parts.save("round", tensors_of(last.factors) | {"number": torch.tensor(last.number), "predicted": predicted})


def _kept_round(parts: Parts | None) -> _Round | None:
    """The last round that was finished before, if there is one."""
    from lowrank.model.factors import pairs_of

    kept = parts.load("round") if parts is not None else None
    if kept is None:
        return None
    number, predicted = int(kept.pop("number")), float(kept.pop("predicted"))
    log.info("corrections: going on after round %d", number)
    return _Round(number, predicted, pairs_of(kept))


def _say_prediction(task: CompressionTask, predicted: float) -> None:
    """Have the manifest and the log say what the allocation is predicted to cost."""
    if task.settings.allocation == "predicted-loss":
        from lowrank.ranks.predicted_loss import MEANING

        key, what = "predicted_loss_rise", "rise"
    else:
        from lowrank.ranks.zero_sum import MEANING

        key, what = "predicted_loss_change", "change"
    task.account[key] = {"nats_per_token": predicted, "meaning": MEANING}
    log.info("predicted %s of the loss: %.4f nats per token (%s)", what, predicted, MEANING)


def _by_first_order(
    task: CompressionTask, decompose: Decompose, device: torch.device
) -> tuple[Ranks, float, dict[str, torch.Tensor]]:
    """Ranks by the changes that gradients predict, their sum, and the directions of every matrix that may get one."""
    from lowrank.bases.first_order import loss_changes
    from lowrank.calibration.gradients import mean_gradients
    from lowrank.model.devices import pick_devices
    from lowrank.ranks.zero_sum import greedy_ranks

    free, changes, directions = task.budget.free(task.settings.uncompressed), {}, {}
    gradients = mean_gradients(task.model, _windows(task), [module.name for module in free], pick_devices())
    for module in free:
        basis = decompose(module, task.model.get_submodule(module.name).weight)
        changes[module.name] = loss_changes(basis, gradients.pop(module.name)).cpu().numpy()
        directions[module.name] = _kept(task, basis.directions)
    balanced = task.settings.allocation == "zero-sum"
    allocation = greedy_ranks(task.budget, task.ratio, changes, task.settings.uncompressed, balanced)
    return allocation.ranks, allocation.change, directions


def _by_second_order(task: CompressionTask, decompose: Decompose) -> tuple[Ranks, float, dict[str, torch.Tensor]]:
    """The same by `ranks.predicted_loss`: what leaving out u_i costs is 1/2 e_i^2 u_i' G u_i."""
    from lowrank.bases.fisher import with_predicted_losses
    from lowrank.ranks.predicted_loss import allocate

    of_block = lru_cache(maxsize=1)(task.required_gradients().of)
    losses, directions = {}, {}
    for module in task.budget.free(task.settings.uncompressed):
        basis = decompose(module, task.model.get_submodule(module.name).weight)
        predicted = with_predicted_losses(basis, of_block(module.layer)[module.type.key], module.name).losses
        assert predicted is not None
        losses[module.name] = predicted.cpu().numpy()
        directions[module.name] = _kept(task, basis.directions)
    allocation = allocate(task.budget, task.ratio, losses, task.settings.uncompressed)
    return allocation.ranks, allocation.loss, directions


def _decomposer(task: CompressionTask, device: torch.device) -> Decompose:
    """From a layer and a weight for it to all whitened singular directions: the principal ones, uncentred."""
    from lowrank.bases.principal import principal_basis
    from lowrank.config.presets import Covariance

    moments, uncentred = lru_cache(maxsize=1)(task.required_statistics().of), Covariance(estimator="uncentred")

    def decompose(module: LinearModule, weight: torch.Tensor) -> PrincipalBasis:
        second_moment, _ = moments(module.layer)[module.type.site].estimate(uncentred)
        return principal_basis(weight.to(device), None, second_moment, None, module.name, all_directions=True)

    return decompose


def _windows(task: CompressionTask) -> torch.Tensor:
    """What gradients are taken on."""
    from lowrank.calibration.corpora import first_windows

    return first_windows(task.required_tokens(), task.settings.sequences, "sequences")


def _kept(task: CompressionTask, directions: torch.Tensor) -> torch.Tensor:
    """Directions that wait on the CPU, in float32 or the model's own precision if that is higher."""
    import torch

    return directions.to("cpu", torch.promote_types(task.model.dtype, torch.float32))

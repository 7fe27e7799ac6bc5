"""OBD-LLM (Li et al., 2026): matrices whitened on both sides, by their inputs and by what the loss makes of outputs.

The Hessian of the loss by a weight W is taken as a Kronecker product of C = E[x x'] and G = E[g g'], g being the loss
gradient at the outputs. With S S' = C and M'M = G the cost of W' is 1/2 ||M (W - W') S||^2, so the best W' of rank r is
the truncation of M W S, times M^-1 on the left and S^-1 on the right. It is the Fisher basis of `rankwise`
(`bases.fisher`) without its mean and its bias: uncentred, at one kept ratio for all, without identity blocks.

`allocation: first-order` makes IO-SVD's ranks of it (Abbasi et al., 2026): the directions of all matrices leave one by
one, each time the last of that matrix whose predicted change of the loss is smallest in size (`ranks.zero_sum`). IO-SVD
takes G from the few most probable next tokens; here G is what the calibration collects, of the text's next tokens or of
drawn ones (`gradient_draws`). No program of either was to be had when this was written: the damping is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, Positive, Share
from lowrank.config.low_rank import UniformSettings
from lowrank.config.presets import Reads

if TYPE_CHECKING:
    from lowrank.bases.principal import PrincipalBasis
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.families import LinearModule
    from lowrank.ranks.budget import Budget, Ranks

    Decompose = Callable[[LinearModule], PrincipalBasis]


class Settings(UniformSettings):
    """OBD-LLM reads second moments of inputs and of loss gradients; IO-SVD's ranks want calibration windows too."""

    reads: ClassVar[Reads] = ("statistics", "gradients")
    counts_windows: ClassVar[str] = "sequences"

    kind: Literal["obd-llm"]
    calibration: Name
    damping: Share = Field(
        default=0.01, description="share of each output's own second moment of the gradient that is added to it"
    )
    allocation: Literal["uniform", "first-order"] = Field(
        default="uniform",
        description="uniform: one kept ratio for all; first-order: directions leave by the size of the change of the "
        "loss that the weights' gradients predict (IO-SVD)",
    )
    sequences: Positive | None = Field(
        default=None,
        description="first-order: calibration windows to take gradients of weights on, the first ones; null: all",
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Ranks by losses are rounded in one way, and uniform ones need no gradients of weights."""
        reasons = super().unread(given)
        if given.get("allocation", "uniform") == "uniform":
            return reasons | {"sequences": "is for `allocation: first-order` only; leave it out"}
        return reasons | {"rounding": "is for `allocation: uniform` only; leave it out"}

    @property
    def decompositions(self) -> int:
        """By losses once more: for the ranks, and for the pairs."""
        return 1 if self.allocation == "uniform" else 2

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """By losses, data decide."""
        return super().kept_parameters(budget, ratio) if self.allocation == "uniform" else None

    @property
    def needs(self) -> Reads:
        """Gradients of weights are taken on the windows themselves."""
        return self.reads if self.allocation == "uniform" else ("statistics", "gradients", "tokens")

    @property
    def takes_experts(self) -> bool:
        """By the moments of what each reads, and of the gradients at its outputs."""
        return True


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Whiten every matrix on both sides, and truncate it, as it is asked for.

    Raises:
        RankwiseError: the ratio is out of reach, the loss has no gradient at an output, or a decomposition fails; the
            layer is named.
    """
    from lowrank.bases.weighted_svd import balanced
    from lowrank.model.replacements import Deferred
    from lowrank.search.uniform import layers_with_ranks, uniform_layers

    if not task.ratio:
        return {}
    decompose, settings = _decomposer(task), task.settings
    if settings.allocation == "uniform":
        layers = uniform_layers(task.budget, task.ratio, settings.uncompressed, settings.rounding)
    else:
        layers = layers_with_ranks(task.budget, _first_order_ranks(task, decompose))
    chosen = {module.name: (module, rank) for module, rank in layers}

    def truncated(name: str) -> LowRankFactors:
        (module, rank), layer = chosen[name], task.model.get_submodule(name)
        basis = decompose(module)
        return balanced(basis.directions, basis.projection, layer.weight.dtype).factors(rank, layer.bias)

    return Deferred(chosen, truncated)


def _first_order_ranks(task: CompressionTask, decompose: Decompose) -> Ranks:
    """IO-SVD's ranks. Bases are computed for them and again for the pairs: together they would not fit into memory."""
    from lowrank.bases.first_order import loss_changes
    from lowrank.calibration.corpora import first_windows
    from lowrank.calibration.gradients import mean_gradients
    from lowrank.model.devices import pick_devices
    from lowrank.ranks.zero_sum import MEANING, greedy_ranks

    uncompressed = task.settings.uncompressed
    free = task.budget.free(uncompressed)
    tokens = first_windows(task.required_tokens(), task.settings.sequences, "sequences")
    gradients = mean_gradients(task.model, tokens, [module.name for module in free], pick_devices())
    changes = {m.name: loss_changes(decompose(m), gradients.pop(m.name)).cpu().numpy() for m in free}
    allocation = greedy_ranks(task.budget, task.ratio, changes, uncompressed, balanced=False)
    task.account["predicted_loss_change"] = {"nats_per_token": allocation.change, "meaning": MEANING}
    return allocation.ranks


def _decomposer(task: CompressionTask) -> Decompose:
    """From a layer to its basis, whitened on both sides."""
    from lowrank.bases.fisher import fisher_basis
    from lowrank.config.presets import Covariance
    from lowrank.model.runtime import pick_device

    device, uncentred = pick_device(), Covariance(estimator="uncentred")
    moments = lru_cache(maxsize=1)(task.required_statistics().of)
    gradients = lru_cache(maxsize=1)(task.required_gradients().of)

    def decompose(module: LinearModule) -> PrincipalBasis:
        weight = task.model.get_submodule(module.name).weight.to(device)
        second_moment, _ = moments(module.layer)[module.type.site].estimate(uncentred)
        gradient = gradients(module.layer)[module.type.key].to(device)
        return fisher_basis(weight, None, second_moment, None, gradient, task.settings.damping, module.name)

    return decompose

"""Ranks by predicted loss, directions by the Fisher information, factors with an identity block: no search at all.

One backward pass says how much the loss cares about each direction of each output. That gives the directions to keep
(`bases.fisher`), the loss that every rank is predicted to cost, and with it the best allocation under the
budget (`ranks.predicted_loss`). An identity block in one factor of each pair buys more rank for the same parameters.
See docs/rankwise.md for the derivation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lowrank.config.base import Name
from lowrank.config.low_rank import LowRankSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.factors import LowRankFactors


class Settings(LowRankSettings):
    """It reads bases whose preset of `covariance` names `gradients`, for these say what a direction is worth."""

    kind: Literal["rankwise"]
    calibration: Name
    covariance: Name
    identity_block: bool = Field(default=True, description="store pairs with an identity block: more rank a parameter")
    uncompressed: tuple[str, ...] = Field(default=(), description="types that stay dense")


def compress(task: CompressionTask) -> dict[str, LowRankFactors]:
    """Allocate ranks by predicted loss and slice the bases.

    Raises:
        RankwiseError: the bases hold no predicted losses; the layer is named.
    """
    import logging

    from lowrank.ranks.predicted_loss import MEANING, allocate
    from lowrank.search.allocation import sliced_factors
    from lowrank.search.loss_scales import predicted_losses

    bases = task.required_bases()
    losses = predicted_losses(bases, task.budget)
    allocation = allocate(task.budget, task.ratio, losses, task.settings.uncompressed)
    task.account["predicted_loss_rise"] = {"nats_per_token": allocation.loss, "meaning": MEANING}
    logging.getLogger(__name__).info(
        "predicted rise of the loss: %.4f nats per token (%s; expect more of other text)", allocation.loss, MEANING
    )
    return sliced_factors(bases, task.budget, allocation.ranks)

"""How much perplexity rises when only one type of matrix is compressed (paper, Figure 1)."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from lowrank.model.families import FAMILIES
from lowrank.ranks.budget import Budget, Ranks, rank_for
from lowrank.search.objective import finite_losses, window_losses
from lowrank.search.sliced_model import SlicedModel

log = logging.getLogger(__name__)


def measure_sensitivity(
    sliced: SlicedModel, budget: Budget, windows: torch.Tensor, kept: list[float], device: torch.device
) -> dict[str, Any]:
    """Perplexity of the dense model, and with each type alone at each kept ratio, in all layers."""
    sliced.set_ranks({})
    dense = _perplexity(sliced, windows, device, "the dense model")
    types: dict[str, list[dict[str, float | None]]] = {}
    for linear in FAMILIES[budget.dimensions.family].types:
        modules = [module for module in budget.free(()) if module.type.name == linear.name]
        for share in sorted(kept):
            ranks: Ranks = {m.name: rank_for(share, m.out_features, m.in_features) for m in modules}
            sliced.set_ranks(ranks)
            point = {"kept": share, "removed": 1 - budget.kept(ranks)} | _perplexity(
                sliced, windows, device, f"{linear.name} at {100 * share:g} % kept"
            )
            types.setdefault(linear.name, []).append(point)
            log.info("sensitivity: %s at %.0f %% kept: perplexity %.2f", linear.name, 100 * share, point["perplexity"])
    return {"dense": dense, "types": types}


def _perplexity(sliced: SlicedModel, windows: torch.Tensor, device: torch.device, what: str) -> dict[str, float | None]:
    """Perplexity over equal windows, and its standard error by the delta method."""
    losses = finite_losses(window_losses(sliced, windows, device), f"sensitivity: {what}")
    perplexity = math.exp(float(losses.mean()))
    if len(losses) < 2:
        return {"perplexity": perplexity, "stderr": None}
    return {"perplexity": perplexity, "stderr": perplexity * float(losses.std() / math.sqrt(len(losses)))}

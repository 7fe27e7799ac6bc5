"""Which windows the search is judged on: those whose loss depends most on the allocation (paper, Section 3.3)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lowrank.config.sections import Selection
from lowrank.objective import window_losses
from lowrank.search_space import SearchSpace
from lowrank.sliced import SlicedModel

log = logging.getLogger(__name__)


def score_windows(
    sliced: SlicedModel, windows: torch.Tensor, space: SearchSpace, allocations: int, seed: int, device: torch.device
) -> torch.Tensor:
    """Perplexity of each window under random feasible allocations.

    Returns:
        allocations x n, in float64.
    """
    rows = []
    for index, x in enumerate(space.sample(allocations, seed)):
        sliced.set_ranks(space.ranks(x))
        rows.append(window_losses(sliced, windows, device).exp())
        log.info("validation: allocation %d of %d, median perplexity %.2f", index + 1, allocations, rows[-1].median())
    return torch.stack(rows)


def select_windows(perplexities: torch.Tensor, settings: Selection) -> list[int]:
    """Indices of the windows to keep, in their order in the corpus.

    Args:
        perplexities: allocations x n.
        settings: `top` keeps those with the largest variance over allocations, `bottom` the smallest, `all` all.
    """
    variance = perplexities.var(dim=0)
    if settings.keep is None:
        return list(range(variance.numel()))
    order = torch.argsort(variance, descending=settings.strategy == "top", stable=True)
    return sorted(order[: settings.keep].tolist())


def selection_record(perplexities: torch.Tensor, kept: list[int]) -> dict[str, Any]:
    """What the validation artefact says about the choice."""
    return {
        "windows": kept,
        "variance": perplexities.var(dim=0).tolist(),
        "mean_perplexity": perplexities.mean(dim=0).tolist(),
        "allocations": perplexities.shape[0],
    }

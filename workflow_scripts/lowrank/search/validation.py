"""Which windows the search is judged on: those whose loss depends most on the allocation (paper, Section 3.3)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lowrank.calibration.corpora import Texts, sample_windows
from lowrank.config.presets import Selection, Validation
from lowrank.jobs.state import Parts
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.objective import finite_losses, window_losses
from lowrank.search.sliced_model import SlicedModel

log = logging.getLogger(__name__)


def candidate_windows(
    corpora: Sequence[Texts], tokenizer: PreTrainedTokenizerBase, settings: Validation
) -> torch.Tensor:
    """Random windows of all corpora, in equal numbers (the first ones give one more where that does not divide).

    Args:
        corpora: of each its documents, or token ids.
        tokenizer: of the model.
        settings: number and length of windows, and the seed.

    Returns:
        n x length token ids, corpus after corpus.
    """
    counts = [len(part) for part in np.array_split(np.arange(settings.windows), len(corpora))]
    return torch.cat(
        [
            sample_windows(documents, tokenizer, count, settings.length, settings.seed)
            for documents, count in zip(corpora, counts, strict=True)
            if count
        ]
    )


def score_windows(
    sliced: SlicedModel,
    windows: torch.Tensor,
    space: SearchSpace,
    allocations: int,
    seed: int,
    device: torch.device,
    parts: Parts | None = None,
) -> torch.Tensor:
    """Perplexity of each window under random feasible allocations.

    Args:
        sliced: the model, on `device`; its ranks are changed.
        windows: n x length token ids.
        space: of the allocations.
        allocations: how many.
        seed: of the allocations.
        device: where to compute.
        parts: where the losses of finished allocations are kept, and found again; they must be of the same call.

    Returns:
        allocations x n, in float64.

    Raises:
        RankwiseError: a loss is not finite, or losses that were kept are damaged.
    """
    rows = []
    for index, x in enumerate(space.sample(allocations, seed)):
        kept = parts.load(f"allocation_{index}") if parts is not None else None
        if kept is None:
            sliced.set_ranks(space.ranks(x))
            losses = finite_losses(window_losses(sliced, windows, device), f"validation: allocation {index + 1}")
            kept = {"losses": losses}
            if parts is not None:
                parts.save(f"allocation_{index}", kept)
        rows.append(kept["losses"].exp())
        log.info("validation: allocation %d of %d, median perplexity %.2f", index + 1, allocations, rows[-1].median())
    return torch.stack(rows)


def select_windows(perplexities: torch.Tensor, settings: Selection) -> list[int]:
    """Indices of the windows to keep, in their order in the corpus.

    Args:
        perplexities: allocations x n.
        settings: `top` keeps those with the largest variance over allocations, `bottom` the smallest.
    """
    order = torch.argsort(perplexities.var(dim=0), descending=settings.strategy == "top", stable=True)
    return sorted(order[: settings.keep].tolist())


def selection_record(perplexities: torch.Tensor | None, kept: list[int]) -> dict[str, Any]:
    """What the validation artefact says about the choice.

    Args:
        perplexities: allocations x n; None where every window is kept, so that none was scored.
        kept: their indices.
    """
    if perplexities is None:
        return {"windows": kept, "scored": False, "variance": None, "mean_perplexity": None, "allocations": 0}
    return {
        "windows": kept,
        "scored": True,
        "variance": perplexities.var(dim=0).tolist(),
        "mean_perplexity": perplexities.mean(dim=0).tolist(),
        "allocations": perplexities.shape[0],
    }

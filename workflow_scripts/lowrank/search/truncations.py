"""Single matrices truncated, each alone: by how much the loss rises, beside by how much it was predicted to.

Predictions come from the gradients of the calibration windows (`bases.fisher`), measurements from other text. What
counts for an allocation is the order of the predictions, so their rank correlation with the measurements is given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from lowrank.bases.principal import Bases
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of
from lowrank.model.families import FAMILIES, LinearModule
from lowrank.model.losses import head_of, token_nll
from lowrank.model.partial_forward import block_input, input_of, last_hidden_from
from lowrank.ranks.budget import ALIGNMENT, Budget
from lowrank.ranks.predicted_loss import MEANING
from lowrank.search.objective import finite_losses
from lowrank.search.sliced_model import SlicedModel

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Truncation:
    """One matrix at one rank, in a model that is dense otherwise.

    Attributes:
        module: the matrix.
        rank: its rank.
        predicted: rise of the mean loss per token in nats, as its basis says.
    """

    module: LinearModule
    rank: int
    predicted: float


def choose_truncations(
    budget: Budget, bases: Bases, matrices: int, kept: Sequence[float], seed: int
) -> list[Truncation]:
    """Random matrices, as many of each type as of any other (but for one), each at several ranks; block by block.

    Args:
        budget: of the model.
        bases: with predicted losses.
        matrices: how many; all, if the model has fewer.
        kept: shares of a matrix's largest possible rank min(m, n), rounded to multiples of 8 that truncate it.
        seed: of the choice.

    Raises:
        RankwiseError: a basis without predicted losses, or no matrix that could be truncated; the layer is named.
    """
    draw = np.random.default_rng(seed)
    of_type: dict[str, list[str]] = {t.name: [] for t in FAMILIES[budget.dimensions.family].types}
    for module in budget.free(()):
        of_type[module.type.name].append(module.name)
    shuffled = [[names[i] for i in draw.permutation(len(names))] for names in of_type.values()]
    in_turn = [name for names in zip_longest(*shuffled) for name in names if name is not None]
    chosen, found = set(in_turn[:matrices]), []
    for module in budget.modules:
        if module.name in chosen:
            losses = bases.losses(module.layer, module.type.key)
            if losses is None:
                raise RankwiseError(f"{module.name}: its basis predicts no loss; its `covariance` needs `gradients`")
            for rank in _ranks(min(module.out_features, module.in_features), kept):
                found.append(Truncation(module, rank, float(losses[rank:].double().sum())))
    if not found:
        raise RankwiseError(f"no rank in steps of {ALIGNMENT} truncates any of the chosen matrices")
    return found


def _ranks(largest: int, kept: Sequence[float]) -> list[int]:
    ranks = {ALIGNMENT * max(1, round(share * largest / ALIGNMENT)) for share in kept}
    return sorted(rank for rank in ranks if rank < largest)


def measure_truncations(
    sliced: SlicedModel, truncations: Sequence[Truncation], windows: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    """Measure what was predicted.

    A trial runs the blocks from the matrix's own on; what enters them is kept. Its loss is that of a whole pass.

    Args:
        sliced: the model, on `device`, with the bases that predict.
        truncations: block by block.
        windows: n x length token ids.
        device: where the model is.

    Returns:
        "dense": mean loss per token of the dense model; "truncations": one dict each, with the predicted and the
        measured rise of it, and the standard error of the latter over windows (None for one window); "predicted": what
        a prediction is; "spearman": rank correlation of predicted and measured, over all of them and by type (None
        where it is not defined).

    Raises:
        RankwiseError: a loss is not finite; the matrix and its rank are named.
    """
    sliced.set_ranks({})
    records: list[dict[str, Any]] = []
    log.info("rises of the loss in nats per token; predicted: %s; measured: on windows of other text", MEANING)
    with torch.inference_mode():
        walk = _Walk(sliced, windows, device)
        dense = finite_losses(walk.losses(), "the dense model")
        for truncation in truncations:
            walk.go_to(truncation.module.layer)
            sliced.set_ranks({truncation.module.name: truncation.rank})
            rise = finite_losses(walk.losses(), f"{truncation.module.name} at rank {truncation.rank}") - dense
            sliced.set_ranks({})
            records.append(_record(truncation, rise))
            log.info(
                "%d of %d: %s at rank %d: %+.5f nats, predicted %.5f",
                *(len(records), len(truncations), truncation.module.name, truncation.rank),
                *(float(rise.mean()), truncation.predicted),
            )
    return {
        "dense": float(dense.mean()),
        "predicted": MEANING,
        "truncations": records,
        "spearman": _correlations(records),
    }


class _Walk:
    """Losses of a model that is changed in one block, on the dense hidden states that enter this block."""

    def __init__(self, sliced: SlicedModel, windows: torch.Tensor, device: torch.device) -> None:
        self.model, self.device, self.block = sliced.model, device, 0
        self.batches = list(torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))
        self.entering = [block_input(self.model, ids.to(device)).cpu() for ids in self.batches]

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for ids, hidden in zip(self.batches, self.entering, strict=True):
            yield ids.to(self.device), hidden.to(self.device)

    def go_to(self, block: int) -> None:
        """Have the hidden states that enter a block, which is not before the present one; the model must be dense."""
        if block > self.block:
            name = f"{family_of(self.model).blocks}.{block}"
            self.entering = [input_of(self.model, name, ids, self.block, hidden).cpu() for ids, hidden in self._pairs()]
            self.block = block

    def losses(self) -> torch.Tensor:
        """Mean loss per token of each window, n, in float64."""
        head, found = head_of(self.model), []
        for ids, entering in self._pairs():
            hidden = last_hidden_from(self.model, ids, self.block, entering)[:, :-1]
            nll = token_nll(hidden.flatten(0, 1), head, ids[:, 1:].flatten())
            found.append(nll.double().view(len(ids), -1).mean(dim=1).cpu())
        return torch.cat(found)


def _record(truncation: Truncation, rise: torch.Tensor) -> dict[str, Any]:
    module = truncation.module
    return {
        "module": module.name,
        "type": module.type.name,
        "layer": module.layer,
        "rank": truncation.rank,
        "of_rank": min(module.out_features, module.in_features),
        "predicted": truncation.predicted,
        "measured": float(rise.mean()),
        "stderr": float(rise.std() / len(rise) ** 0.5) if len(rise) > 1 else None,
    }


def _correlations(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    types = dict.fromkeys(record["type"] for record in records)
    by_type = {name: _spearman([record for record in records if record["type"] == name]) for name in types}
    return {"all": _spearman(records), "by_type": by_type}


def _spearman(records: Sequence[Mapping[str, Any]]) -> float | None:
    predicted, measured = ([record[key] for record in records] for key in ("predicted", "measured"))
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(spearmanr(predicted, measured).statistic)

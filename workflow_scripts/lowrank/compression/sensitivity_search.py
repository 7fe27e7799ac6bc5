"""Ranks by the sensitivity of single layers: the search of ASVD.

Every linear layer is factorised alone, at several ranks, and the loss of the model is measured. All these trials are
put in one order, the most harmful first, and cut: what comes after the cut is permitted, and each layer takes the
smallest rank that is permitted to it (dense if there is none). The cut lies as far down the order as the budget lets
it, which a binary search finds, since what stays grows with the position of the cut.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from lowrank.calibration.gradients import first_not_finite
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import device_of
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import LinearModule
from lowrank.model.losses import head_of, token_nll
from lowrank.model.partial_forward import block_input, exchanged, input_of, last_hidden_from
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from lowrank.ranks.reach import largest_rank_worth_it

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 2048

Factorise = Callable[[LinearModule], Callable[[int], LowRankFactors]]
"""A layer -> its factors of any rank: what is decomposed once serves all ranks of the layer."""


@dataclass(frozen=True)
class Trial:
    """The model with one layer factorised.

    Attributes:
        layer: the layer's name.
        rank: its rank.
        loss: mean negative log-likelihood of the model's tokens, nats.
    """

    layer: str
    rank: int
    loss: float


class _Pass:
    """Losses of a model that is changed in one block, on the dense hidden states that enter this block."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, device: torch.device) -> None:
        self.model, self.device, self.block = model, device, 0
        self.batches = list(torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))
        self.entering = [block_input(model, ids.to(device)).cpu() for ids in self.batches]

    def next_block(self) -> None:
        """Go on to the block behind; the model must be dense."""
        name = f"{family_of(self.model).blocks}.{self.block + 1}"
        self.entering = [
            input_of(self.model, name, ids.to(self.device), self.block, hidden.to(self.device)).cpu()
            for ids, hidden in zip(self.batches, self.entering, strict=True)
        ]
        self.block += 1

    def loss(self) -> float:
        """Mean negative log-likelihood per token, nats, of the model as it stands."""
        total, count, head = 0.0, 0, head_of(self.model)
        for batch, entering in zip(self.batches, self.entering, strict=True):
            ids = batch.to(self.device)
            hidden = last_hidden_from(self.model, ids, self.block, entering.to(self.device))
            nll = token_nll(hidden[:, :-1].flatten(0, 1), head, ids[:, 1:].flatten())
            total += float(nll.double().sum())
            count += nll.numel()
        return total / count


def measure_layers(
    model: PreTrainedModel,
    windows: torch.Tensor,
    budget: Budget,
    candidates: Mapping[str, Sequence[int]],
    factorise: Factorise,
    device: torch.device,
    parts: Parts | None = None,
) -> list[Trial]:
    """Factorise every layer alone at every rank, and measure the loss.

    A trial runs the blocks from the layer's own on; what enters them is kept. Its loss is that of a whole pass.

    Args:
        model: the dense model, on `device`; changed, and changed back.
        windows: n x length token ids.
        budget: of the model.
        candidates: layer -> ranks.
        factorise: gives a layer's factors.
        device: where the model is.
        parts: where the trials of finished layers are kept, and found again; they must be of the same call.

    Returns:
        The trials, layer by layer. A loss that is not finite counts as infinite: that rank breaks the model.

    Raises:
        RankwiseError: windows of one token, a decomposition that fails, a loss of the dense model itself that is not
            finite, or trials that were kept and are damaged.
    """
    if windows.shape[1] < 2:
        raise RankwiseError("losses need calibration windows of two tokens or more; raise `length` in `calibration`")
    total, started = sum(map(len, candidates.values())), time.monotonic()
    trials: list[Trial] = []
    measured = 0
    with torch.inference_mode():
        running = _Pass(model, windows, device)
        dense = running.loss()
        if not math.isfinite(dense):
            where = first_not_finite(model, windows[:1].to(device))
            raise RankwiseError(
                f"{where}: outputs are not finite, and so the dense model's loss on the calibration windows. Set "
                "`dtype: float32` for this model in the config; if it is float32 already, the weights are damaged."
            )
        log.info("sensitivity: the dense loss is %.4f nats; %d trials", dense, total)
        for layer in range(budget.dimensions.layers):
            if layer:
                running.next_block()
            for module in budget.modules:
                ranks = candidates.get(module.name)
                if module.layer != layer or not ranks:
                    continue
                found = _kept(parts, module.name, ranks)
                if found is None:
                    found = _trials(running, module, ranks, factorise(module))
                    measured += len(found)
                    if parts is not None:
                        parts.save(module.name, _stored(found))
                trials += found
            left = (time.monotonic() - started) / max(1, measured) * (total - len(trials))
            when = f", {left:.0f} s left" if measured else ""
            log.info("sensitivity: block %d done, %d of %d trials%s", layer, len(trials), total, when)
    return trials


def _stored(trials: Sequence[Trial]) -> dict[str, torch.Tensor]:
    """The trials of a layer as tensors, which hold finite numbers only: ranks that break the model are left out."""
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    return {
        "ranks": torch.tensor([trial.rank for trial in finite], dtype=torch.int64),
        "losses": torch.tensor([trial.loss for trial in finite], dtype=torch.float64),
    }


def _kept(parts: Parts | None, layer: str, ranks: Sequence[int]) -> list[Trial] | None:
    """The inverse, of a layer and all ranks that were tried; None if it was not finished before."""
    stored = parts.load(layer) if parts is not None else None
    if stored is None:
        return None
    losses = dict(zip(stored["ranks"].tolist(), stored["losses"].tolist(), strict=True))
    return [Trial(layer, rank, losses.get(rank, math.inf)) for rank in ranks]


def _trials(
    running: _Pass, module: LinearModule, ranks: Sequence[int], factors: Callable[[int], LowRankFactors]
) -> list[Trial]:
    trials = []
    for rank in ranks:
        place = device_of(running.model.get_submodule(module.name))
        pair = factors(rank).as_module(running.model.dtype, place)
        with exchanged(running.model, {module.name: pair}):
            loss = running.loss()
        if not math.isfinite(loss):
            log.warning("sensitivity: %s at rank %d: the loss is not finite", module.name, rank)
            loss = math.inf
        trials.append(Trial(module.name, rank, loss))
    return trials


def cut_trials(trials: Sequence[Trial], budget: Budget, ratio: int) -> Ranks:
    """The ranks that the cut leaves.

    Args:
        trials: in any order.
        budget: of the model.
        ratio: percent of the linear layers' parameters to remove.

    Raises:
        RankwiseError: even the smallest ranks that were tried exceed the budget.
    """
    ordered = sorted(trials, key=lambda trial: (-trial.loss, trial.rank, trial.layer))
    allowed = budget.allowed(ratio)
    if (least := budget.parameters(_permitted(ordered))) > allowed:
        raise RankwiseError(
            f"removing {ratio} % is out of reach: the smallest ranks that are tried keep "
            f"{100 * least / budget.dense_parameters:.1f} %. Add smaller ratios to `kept`, or remove less."
        )
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high + 1) // 2
        if budget.parameters(_permitted(ordered[middle:])) <= allowed:
            low = middle
        else:
            high = middle - 1
    ranks: Ranks = {module.name: None for module in budget.modules}
    return ranks | _permitted(ordered[low:])


def spend_rest(ranks: Ranks, trials: Sequence[Trial], budget: Budget, ratio: int) -> Ranks:
    """Raise ranks in steps of 8 by what the budget has left, those of the most harmful layers first.

    The trials lie far apart, so a cut seldom meets the budget by itself.

    Args:
        ranks: of an allocation within the budget.
        trials: those it was chosen from.
        budget: of the model.
        ratio: percent of the linear layers' parameters to remove.
    """
    harm = {(trial.layer, trial.rank): trial.loss for trial in trials}
    raised = dict(ranks)
    left = budget.allowed(ratio) - budget.parameters(ranks)
    chosen = [(module, rank) for module in budget.modules if (rank := ranks.get(module.name)) is not None]
    for module, rank in sorted(chosen, key=lambda item: -harm[item[0].name, item[1]]):
        larger = range(rank, largest_rank_worth_it(budget, module) + 1, ALIGNMENT)
        affordable = bisect_right(larger, left + budget.cost(module, rank), key=partial(budget.cost, module))
        if affordable > 1:
            raised[module.name] = larger[affordable - 1]
            left -= budget.cost(module, raised[module.name]) - budget.cost(module, rank)
    return raised


def _permitted(trials: Sequence[Trial]) -> dict[str, int]:
    """The smallest rank of each layer."""
    smallest: dict[str, int] = {}
    for trial in trials:
        smallest[trial.layer] = min(trial.rank, smallest.get(trial.layer, trial.rank))
    return smallest

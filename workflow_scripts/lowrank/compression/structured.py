"""Structured pruning: which units of a block go, and how layers are cut.

The units are those of `branches`. The norms of single heads (Qwen3) are shared by all heads and need no cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.compression.branches import Counts, Place, Structure
from lowrank.errors import RankwiseError
from lowrank.model.replacements import Deferred, KeptHeads, Replacement, SmallerLinear

Scores = Mapping[Place, torch.Tensor]
"""One score a unit; the lowest go first, and among equals the one that comes first."""


def lowest_removal(
    structure: Structure, scores: Scores, allowed: float, removed: Mapping[Place, int] | None = None
) -> Counts:
    """Remove the units with the lowest scores of the whole model until no more than `allowed` parameters stay.

    Near the end a unit of the coarser branch would overshoot, where single neurons would not: it is passed over, so
    the budget is missed by less than one neuron. Only if the neurons run out do such units go after all, and what
    they free too much is given back to the best of the neurons that went.

    Args:
        structure: of the model.
        scores: of the units that may go, on one scale.
        allowed: parameters of all linear layers that may stay.
        removed: units that are gone already, in branches without scores.

    Raises:
        RankwiseError: the budget cannot be met.
    """
    counts = dict(removed or {})
    left = structure.remaining(counts)
    finest = min(structure.branch(place).cost for place in scores)
    passed: list[Place] = []
    taken: list[Place] = []
    for place in _ascending(structure, scores):
        if left <= allowed:
            break
        branch, gone = structure.branch(place), counts.get(place, 0)
        saving = branch.saved(gone + 1) - branch.saved(gone)
        if left - saving < allowed and branch.cost > finest:
            passed.append(place)
        else:
            counts[place], left = gone + 1, left - saving
            taken.append(place)
    for place in passed:
        if left > allowed:
            branch, gone = structure.branch(place), counts.get(place, 0)
            counts[place], left = gone + 1, left - branch.saved(gone + 1) + branch.saved(gone)
    if left > allowed:
        structure.require_reach(allowed)
        raise RankwiseError(f"the units with scores hold too little: {left:,} parameters stay, {allowed:,.0f} may")
    for place in reversed(taken):
        branch, gone = structure.branch(place), counts[place]
        cost = branch.saved(gone) - branch.saved(gone - 1)
        if branch.cost == finest and left + cost <= allowed:
            counts[place], left = gone - 1, left + cost
    return counts


def lowest_units(structure: Structure, scores: Scores, total: int) -> Counts:
    """Remove as many units as said, those with the lowest scores of all branches.

    Raises:
        RankwiseError: there are not so many.
    """
    order = _ascending(structure, scores)
    if total > len(order):
        raise RankwiseError(f"{total} units are to go, but only {len(order)} can: every branch keeps some")
    counts: Counts = {}
    for place in order[:total]:
        counts[place] = counts.get(place, 0) + 1
    return counts


def _ascending(structure: Structure, scores: Scores) -> list[Place]:
    """The places of all units that can go, from the lowest score to the highest; the best of each branch stay."""
    ranked: list[tuple[float, Place]] = []
    for place, values in scores.items():
        lowest = torch.sort(values, stable=True).values[: structure.branch(place).most]
        ranked += [(value, place) for value in lowest.tolist()]
    return [place for _, place in sorted(ranked)]


def kept_units(scores: Scores, removed: Mapping[Place, int]) -> dict[Place, torch.Tensor]:
    """The units that stay in the branches that lose some, in ascending order."""
    return {
        place: torch.sort(torch.sort(scores[place], stable=True).indices[count:]).values
        for place, count in removed.items()
        if count
    }


def cut(
    model: PreTrainedModel,
    structure: Structure,
    kept: Mapping[Place, torch.Tensor],
    means: Mapping[Place, torch.Tensor] | None = None,
) -> Deferred[Replacement]:
    """The layers of the pruned branches, and the heads that attention modules have left; made when they are asked for.

    Args:
        model: the dense model.
        structure: its structure.
        kept: branch -> units that stay, in ascending order.
        means: branch -> mean input of its reader (n); what the lost channels contributed on average, W (mean * lost),
            becomes a bias of the reader. None: the lost channels are not made up for.

    Returns:
        Module name -> what becomes of it.
    """
    makers: dict[str, Callable[[], Replacement]] = {}
    for place, units in kept.items():
        branch = structure.branch(place)
        for linear in branch.writers:
            name = structure.layer_name(place[0], linear)
            rows = channels(units, branch.widths[linear.output])
            makers[name] = partial(_shorter, model, name, rows)
        name = structure.layer_name(place[0], branch.reader)
        columns = channels(units, branch.reader_width)
        makers[name] = partial(_narrower, model, name, columns, None if means is None else means[place])
        if branch.name == structure.attention.name:
            heads = KeptHeads(len(units) * structure.heads_per_group, len(units))
            makers[name.rpartition(".")[0]] = partial(_same, heads)
    return Deferred(makers, lambda name: makers[name]())


def _same(heads: KeptHeads) -> KeptHeads:
    return heads


def channels(units: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the channels of some units that are `width` channels wide each."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def _shorter(model: PreTrainedModel, name: str, rows: torch.Tensor) -> SmallerLinear:
    """A layer with some of its rows."""
    return SmallerLinear.of_rows(model.get_submodule(name), rows)


def _narrower(model: PreTrainedModel, name: str, columns: torch.Tensor, mean: torch.Tensor | None) -> SmallerLinear:
    """A layer with some of its columns, and a bias for the mean of the others if it is given."""
    layer: Any = model.get_submodule(name)
    weight, bias = layer.weight.detach(), layer.bias
    if mean is not None:
        lost = torch.ones(weight.shape[1], dtype=torch.bool)
        lost[columns] = False
        average = weight[:, lost].double() @ mean[lost].double().to(weight.device)
        bias = average if bias is None else bias.detach().double() + average
    return SmallerLinear(weight[:, columns], bias)

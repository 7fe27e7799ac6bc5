"""Structured pruning: which units of a block can go, what each is worth, how many go where, and how layers are cut.

A block has two branches. A unit of the attention branch is a kv group: a key/value head with the query heads that
share it, that is rows of q, k, v and columns of o. A unit of the MLP branch is a neuron: a row of gate and up (or fc1)
and a column of down (or fc2). Every branch keeps at least one group or 8 neurons, since layers without any channel
are no layers. The norms of single heads (Qwen3) are shared by all heads and need no cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.budget import Budget, has_native_bias
from lowrank.errors import RankwiseError
from lowrank.families import FAMILIES, LinearModule, LinearType
from lowrank.replacements import KeptHeads, Replacement, SmallerLinear

LEAST_GROUPS = 1
LEAST_NEURONS = 8

Place = tuple[int, str]
"""A branch of a block: the block's index, and `attention` or `mlp`."""

Counts = dict[Place, int]
"""How many units a branch loses; branches that are not named lose none."""

Scores = Mapping[Place, torch.Tensor]
"""One score a unit; the lowest go first, and among equals the one that comes first."""


@dataclass(frozen=True)
class Branch:
    """One of a block's two branches; all blocks of a model have the same.

    Attributes:
        name: `attention` or `mlp`.
        units: in a dense block.
        least: that stay.
        cost: weights of a unit, over all layers that it is part of.
        added_bias: what the method adds to the reader where units went (0 if the dense layer has a bias).
        writers: the layers whose rows belong to units.
        reader: the layer whose columns belong to units.
        widths: name of a dimension -> its channels per unit.
    """

    name: str
    units: int
    least: int
    cost: int
    added_bias: int
    writers: tuple[LinearType, ...]
    reader: LinearType
    widths: Mapping[str, int]

    @property
    def most(self) -> int:
        """Units that can go."""
        return max(0, self.units - self.least)

    @property
    def reader_width(self) -> int:
        """Columns of the reader per unit."""
        return self.widths[self.reader.input]

    def saved(self, count: int) -> int:
        """Parameters that go with `count` units, less the bias that comes instead."""
        return count * self.cost - (self.added_bias if count else 0)

    def per_unit(self, by_type: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum values of channels (of a writer's rows, of the reader's columns) over the members of each unit."""
        total = torch.zeros(self.units, dtype=torch.float64)
        for linear in (*self.writers, self.reader):
            total += by_type[linear.name].double().cpu().view(self.units, -1).sum(dim=1)
        return total


@dataclass(frozen=True)
class Structure:
    """The branches of a model's blocks, from its shape alone.

    Attributes:
        budget: of the model; `adds_bias` says whether the reader of a pruned branch gets a bias.
        attention, mlp: its branches.
    """

    budget: Budget
    attention: Branch
    mlp: Branch

    @classmethod
    def of(cls, budget: Budget) -> Structure:
        """The structure of a model from its budget."""
        shape = budget.dimensions
        heads = {"query": shape.heads // shape.kv_heads * shape.head_dim, "key_value": shape.head_dim}
        return cls(
            budget,
            _branch(budget, "attention", shape.kv_heads, LEAST_GROUPS, heads),
            _branch(budget, "mlp", shape.intermediate, LEAST_NEURONS, {"intermediate": 1}),
        )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.budget.dimensions.heads // self.budget.dimensions.kv_heads

    def branch(self, place: Place) -> Branch:
        """The branch of a place."""
        return self.attention if place[1] == self.attention.name else self.mlp

    def places(self, layers: Iterable[int] | None = None) -> Iterator[tuple[Place, Branch]]:
        """All branches of some blocks (of all if None), in the order of the forward pass."""
        for layer in range(self.budget.dimensions.layers) if layers is None else layers:
            for branch in (self.attention, self.mlp):
                yield (layer, branch.name), branch

    def layer_name(self, layer: int, linear: LinearType) -> str:
        """Full module name of a layer of a block."""
        return f"{FAMILIES[self.budget.dimensions.family].blocks}.{layer}.{linear.path}"

    def remaining(self, removed: Mapping[Place, int]) -> int:
        """Parameters of all linear layers, with added biases, when so many units are gone."""
        return self.budget.dense_parameters - sum(self.branch(place).saved(count) for place, count in removed.items())

    def require_reach(self, allowed: float, layers: Iterable[int] | None = None) -> None:
        """See that pruning some blocks (all if None) as far as can be meets a budget.

        Raises:
            RankwiseError: it does not.
        """
        layers = list(range(self.budget.dimensions.layers)) if layers is None else list(layers)
        least = self.remaining({place: branch.most for place, branch in self.places(layers)})
        if least > allowed:
            dense = self.budget.dense_parameters
            raise RankwiseError(
                f"removing {100 * (1 - allowed / dense):.3g} % is out of reach: pruning {len(layers)} of "
                f"{self.budget.dimensions.layers} blocks down to {LEAST_GROUPS} key/value head and {LEAST_NEURONS} "
                f"neurons each leaves {100 * least / dense:.1f} %; remove less, or prune more blocks"
            )


def _branch(budget: Budget, name: str, units: int, least: int, widths: dict[str, int]) -> Branch:
    block: list[LinearModule] = [module for module in budget.modules if module.layer == 0]
    writers = [module for module in block if module.type.output in widths]
    (reader,) = (module for module in block if module.type.input in widths)
    cost = sum(widths[module.type.output] * module.in_features for module in writers)
    adds = budget.adds_bias and not has_native_bias(budget.dimensions, reader)
    return Branch(
        name=name,
        units=units,
        least=least,
        cost=cost + widths[reader.type.input] * reader.out_features,
        added_bias=reader.out_features if adds else 0,
        writers=tuple(module.type for module in writers),
        reader=reader.type,
        widths=widths,
    )


def even_removal(
    structure: Structure, allowed: float, layers: Sequence[int] | None = None, groups: int | None = None
) -> Counts:
    """Remove the same from each of some blocks, so that no more than `allowed` parameters stay.

    Groups can only be removed in whole numbers, which is coarse; so many are that their share comes as near as can be
    to the neurons', which make up for the rest. The neurons differ by at most one between blocks, spread over the
    depth, so the budget is missed by less than one neuron.

    Args:
        structure: of the model.
        allowed: parameters of all linear layers that may stay.
        layers: blocks to prune; all if None.
        groups: how many groups each of them loses; chosen if None.

    Raises:
        RankwiseError: the budget cannot be met, or `groups` alone overshoot it.
    """
    layers = list(range(structure.budget.dimensions.layers)) if layers is None else list(layers)
    structure.require_reach(allowed, layers)
    attention, mlp = structure.attention, structure.mlp
    whole = len(layers) * (attention.units * attention.cost + mlp.units * mlp.cost)
    share = (structure.budget.dense_parameters - allowed) / whole
    nearest = sorted(range(attention.most + 1), key=lambda count: (abs(count - share * attention.units), count))
    for count in nearest if groups is None else [groups]:

        def left(neurons: int, count: int = count) -> int:
            return structure.remaining(_even_counts(layers, count, neurons))

        most = len(layers) * mlp.most
        if left(0) >= allowed >= left(most):
            neurons = bisect_left(range(most + 1), True, key=lambda total: left(total) <= allowed)
            return _even_counts(layers, count, neurons)
    tried = "any number" if groups is None else f"{groups}"
    raise RankwiseError(f"the budget cannot be met: each block would lose {tried} of {attention.units} key/value heads")


def _even_counts(layers: Sequence[int], groups: int, neurons: int) -> Counts:
    """The same groups in each block, and a total of neurons in parts that differ by at most one."""
    counts: Counts = {}
    for index, layer in enumerate(layers):
        counts[layer, "attention"] = groups
        counts[layer, "mlp"] = (index + 1) * neurons // len(layers) - index * neurons // len(layers)
    return counts


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
) -> dict[str, Replacement]:
    """The layers of the pruned branches, and the heads that attention modules have left.

    Args:
        model: the dense model.
        structure: its structure.
        kept: branch -> units that stay, in ascending order.
        means: branch -> mean input of its reader (n); what the lost channels contributed on average, W (mean * lost),
            becomes a bias of the reader. None: the lost channels are not made up for.

    Returns:
        Module name -> what becomes of it.
    """
    replacements: dict[str, Replacement] = {}
    for place, units in kept.items():
        branch = structure.branch(place)
        for linear in branch.writers:
            name = structure.layer_name(place[0], linear)
            layer: Any = model.get_submodule(name)
            rows = channels(units, branch.widths[linear.output])
            bias = None if layer.bias is None else layer.bias.detach()[rows]
            replacements[name] = SmallerLinear(layer.weight.detach()[rows], bias)
        name = structure.layer_name(place[0], branch.reader)
        columns = channels(units, branch.reader_width)
        mean = None if means is None else means[place]
        replacements[name] = _narrower(model.get_submodule(name), columns, mean)
        if branch.name == structure.attention.name:
            heads = KeptHeads(len(units) * structure.heads_per_group, len(units))
            replacements[name.rpartition(".")[0]] = heads
    return replacements


def channels(units: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the channels of some units that are `width` channels wide each."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def _narrower(layer: Any, columns: torch.Tensor, mean: torch.Tensor | None) -> SmallerLinear:
    """A layer with some of its columns, and a bias for the mean of the others if it is given."""
    weight, bias = layer.weight.detach(), layer.bias
    if mean is not None:
        lost = torch.ones(weight.shape[1], dtype=torch.bool)
        lost[columns] = False
        average = weight[:, lost].double() @ mean[lost].double().to(weight.device)
        bias = average if bias is None else bias.detach().double() + average
    return SmallerLinear(weight[:, columns], bias)

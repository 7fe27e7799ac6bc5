"""The branches of a model's blocks, what a unit of them costs, and how many can go: arithmetic of shapes alone.

A block has two branches. A unit of the attention branch is a kv group: a key/value head with the query heads that
share it, that is rows of q, k, v and columns of o. A unit of the MLP branch is a neuron: a row of gate and up (or fc1)
and a column of down (or fc2). Every branch keeps at least one group or 8 neurons, since layers without any channel
are no layers. The config check reads this too, so torch is imported where it is needed only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES, LinearModule, LinearType, has_native_bias
from lowrank.ranks.budget import Budget

if TYPE_CHECKING:
    import torch

LEAST_GROUPS = 1
LEAST_NEURONS = 8

Place = tuple[int, str]
"""A branch of a block: the block's index, and `attention` or `mlp`."""

Counts = dict[Place, int]
"""How many units a branch loses; branches that are not named lose none."""


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

    def may_stay(self, multiple: int) -> list[int]:
        """How many units may stay: multiples of a number, from the fewest that may to all of them."""
        first = -(-self.least // multiple) * multiple
        return [*range(first, self.units, multiple), self.units]

    def tried(self, multiple: int) -> list[int]:
        """Those of `may_stay`, less all, that are tried where each costs bases: by eighths, down to three of them."""
        eighths = {multiple * (self.units * part // 8 // multiple) for part in range(3, 8)}
        return sorted(eighths & set(self.may_stay(multiple)) - {self.units})

    def saved(self, count: int) -> int:
        """Parameters that go with `count` units, less the bias that comes instead."""
        return count * self.cost - (self.added_bias if count else 0)

    def per_unit(self, by_type: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum values of channels (of a writer's rows, of the reader's columns) over the members of each unit."""
        import torch

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

    def modules(self, layer: int, branch: Branch) -> list[LinearModule]:
        """The linear layers of a branch of a block, in the order of the forward pass: the reader is the last."""
        types = (*branch.writers, branch.reader)
        return [module for module in self.budget.modules if module.layer == layer and module.type in types]

    def layer_name(self, layer: int, linear: LinearType) -> str:
        """Full module name of a layer of a block."""
        return f"{FAMILIES[self.budget.dimensions.family].blocks}.{layer}.{linear.path}"

    def remaining(self, removed: Mapping[Place, int]) -> int:
        """Parameters of all linear layers, with added biases, when so many units are gone."""
        return self.budget.dense_parameters - sum(self.branch(place).saved(count) for place, count in removed.items())

    def require_separate_heads(self, method: str) -> None:
        """See that heads can go without a change of the others.

        Raises:
            RankwiseError: the family norms queries and keys over all heads at once; it is named, with the method.
        """
        family = FAMILIES[self.budget.dimensions.family]
        if family.normed == "projections":
            raise RankwiseError(
                f"{method}: family '{family.model_type}' norms queries and keys over all heads at once, so none can go "
                "without a change of the others; take another method for this model"
            )

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
                f"neurons each leaves {100 * least / dense:.1f} %; remove less"
                f"{', or prune more blocks' if len(layers) < self.budget.dimensions.layers else ''}"
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
    raise RankwiseError(
        f"the budget cannot be met by neurons if each block loses {tried} of {attention.units} key/value heads"
        f"{'' if groups is None else '; change their number, or the ratio'}"
    )


def _even_counts(layers: Sequence[int], groups: int, neurons: int) -> Counts:
    """The same groups in each block, and a total of neurons in parts that differ by at most one."""
    counts: Counts = {}
    for index, layer in enumerate(layers):
        counts[layer, "attention"] = groups
        counts[layer, "mlp"] = (index + 1) * neurons // len(layers) - index * neurons // len(layers)
    return counts

"""MLPs of fewer neurons under one predicted loss: what the MLP of a block may become, and the layers of what it does.

A choice is a number of neurons and, for each matrix of what is left, a rank or none. What neurons and directions cost
was computed before (`eliminate_neurons`), and losses of different matrices are added. Layers are made for what was
picked: the matrices of fewer neurons as they are, or pairs of them by their own bases (`narrow_block`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lowrank.compression.branches import Structure
from lowrank.compression.eliminate_neurons import NeuronLosses
from lowrank.compression.narrow_block import NarrowBlock, narrow
from lowrank.compression.neurons import Elimination
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import LinearModule
from lowrank.model.replacements import Deferred, Replacement, SmallerLinear
from lowrank.model.runtime import pick_device
from lowrank.ranks.curves import Curve, Group, choices_of
from lowrank.ranks.groups import combined, worth_having

if TYPE_CHECKING:
    import torch

    from lowrank.compression.compress import CompressionTask


@dataclass(frozen=True)
class Choice:
    """What the MLP of a block may become.

    Attributes:
        neurons: that stay.
        ranks: of its matrices, in the order of the forward pass; None for one that stays plain.
    """

    neurons: int
    ranks: tuple[int | None, ...]


class Mlps:
    """The MLPs of a model: `groups` for an allocation, then `replacements` for what it picked."""

    def __init__(self, task: CompressionTask, multiple: int, one_width: bool, pairs: bool) -> None:
        """Look at nothing yet.

        Args:
            task: whose eliminations, bases, statistics, gradients and covariance are read.
            multiple: of which numbers of neurons are.
            one_width: every block keeps the same number.
            pairs: also pairs of what is left; not with `one_width`.
        """
        self._task, self._multiple, self._one_width, self._pairs = task, multiple, one_width, pairs
        self._structure, self._device = Structure.of(task.budget), pick_device()
        self._eliminations: dict[int, Elimination] = {}
        self._choices: dict[str, tuple[Choice, ...]] = {}

    def groups(self) -> dict[str, Group]:
        """What the MLP of every block may become, or what those of all blocks may together.

        Raises:
            RankwiseError: a file that is missing, damaged or made for something else.
        """
        curves = []
        for layer in self._layers:
            predicted = self._task.required_eliminations().of(layer)
            self._eliminations[layer] = predicted.elimination
            curves.append(self._choices_of(layer, predicted))
        if self._one_width:
            curves = [(Curve.of_all([curve for curve, _ in curves]), curves[0][1])]
        groups = {}
        for (name, layers), (curve, choices) in zip(self._names.items(), curves, strict=True):
            modules = [module.name for module in self._task.budget.modules if self._is_of(module, layers)]
            groups[name] = Group(curve.parameters, curve.losses, tuple(modules))
            self._choices[name] = choices
        return groups

    def chosen(self, picked: Mapping[str, int]) -> dict[int, Choice]:
        """Block -> what was picked.

        Args:
            picked: group -> index of its choice, of the last `groups`.
        """
        return {layer: self._choices[name][picked[name]] for name, layers in self._names.items() for layer in layers}

    def replacements(self, picked: Mapping[str, int]) -> Deferred[Replacement]:
        """The layers of the MLPs that do not stay as they are, made block by block when they are asked for.

        Plain ones are in the dtype of the model, pairs in float32, as bases are stored.

        Args:
            picked: as of `chosen`.

        Raises (when they are made):
            RankwiseError: an input that is missing or damaged, no gradient, or a decomposition that fails; the layer is
                named.
        """
        chosen = self.chosen(picked)

        def made(layer: int) -> dict[str, Replacement]:
            choice = chosen[layer]
            return self._narrower_layers(layer, choice) if self._narrows(choice) else self._pairs_of_all(layer, choice)

        return Deferred.of_groups(((layer, self._changed(layer, choice)) for layer, choice in chosen.items()), made)

    def _narrows(self, choice: Choice) -> bool:
        return choice.neurons < self._structure.mlp.units

    def _changed(self, layer: int, choice: Choice) -> list[str]:
        """The layers of a block that do not stay as they are: all of fewer neurons, else those that have a rank."""
        modules = self._structure.modules(layer, self._structure.mlp)
        ranked = zip(modules, choice.ranks, strict=True)
        return [module.name for module, rank in ranked if self._narrows(choice) or rank is not None]

    def _narrower_layers(self, layer: int, choice: Choice) -> dict[str, Replacement]:
        """The layers of a block that loses neurons."""
        task, changed = self._task, dict[str, Replacement]()
        moments, gradients = task.required_statistics().of(layer), task.required_gradients().of(layer)
        modules = self._structure.modules(layer, self._structure.mlp)
        dense = [(layer.weight, layer.bias) for layer in (task.model.get_submodule(each.name) for each in modules)]
        block = NarrowBlock(modules, dense, moments, gradients, task.required_covariance(), self._device)
        kept = self._eliminations[layer].kept(choice.neurons)
        for part, rank in zip(block.parts(kept), choice.ranks, strict=True):
            if rank is None:
                changed[part.module.name] = SmallerLinear(part.weight, part.bias).stored(task.model.dtype)
            else:
                changed[part.module.name] = _in_single(block.basis(part, kept).factors(rank))
        return changed

    def _pairs_of_all(self, layer: int, choice: Choice) -> dict[str, Replacement]:
        """The layers of a block that keeps all neurons; those that have a rank."""
        modules = self._structure.modules(layer, self._structure.mlp)
        bases, model = self._task.required_bases(), self._task.model
        return {
            module.name: _in_single(
                bases.of(layer, module.type.name, model.get_submodule(module.name).weight).factors(rank)
            )
            for module, rank in zip(modules, choice.ranks, strict=True)
            if rank is not None
        }

    @cached_property
    def _layers(self) -> range:
        return range(self._task.budget.dimensions.layers)

    @cached_property
    def _names(self) -> dict[str, list[int]]:
        """Group -> its blocks."""
        if self._one_width:
            return {"the MLPs of all blocks": list(self._layers)}
        return {f"the MLP of block {layer}": [layer] for layer in self._layers}

    def _is_of(self, module: LinearModule, layers: list[int]) -> bool:
        return module.layer in layers and module.type in (*self._structure.mlp.writers, self._structure.mlp.reader)

    def _choices_of(self, layer: int, predicted: NeuronLosses) -> tuple[Curve, tuple[Choice, ...]]:
        """What a block's MLP may become, with parameters and losses: of what no other choice beats in both."""
        found = list(self._with_pairs(layer, predicted) if self._pairs else self._plain(predicted.elimination))
        choices = [choice for choice, _, _ in found]
        curve = Curve(np.array([size for _, size, _ in found]), np.array([loss for _, _, loss in found]))
        worth = range(len(found)) if self._one_width else worth_having(curve).tolist()
        return curve.at(np.array(worth)), tuple(choices[each] for each in worth)

    def _plain(self, elimination: Elimination) -> Iterator[tuple[Choice, float, float]]:
        """Fewer neurons and plain matrices, from the fewest to all."""
        branch = self._structure.mlp
        for kept in branch.may_stay(self._multiple):
            gone = branch.units - kept
            size = branch.units * branch.cost - branch.saved(gone)
            none = (None,) * (len(branch.writers) + 1)
            yield Choice(kept, none), float(size), float(elimination.losses[gone])

    def _with_pairs(self, layer: int, predicted: NeuronLosses) -> Iterator[tuple[Choice, float, float]]:
        """Plain matrices, and for some numbers of neurons the combinations of ranks that are worth having."""
        elimination = predicted.elimination
        yield from self._plain(elimination)
        branch, budget = self._structure.mlp, self._task.budget
        *writers, reader = self._structure.modules(layer, branch)
        for width in [*branch.tried(self._multiple), branch.units]:
            gone = branch.units - width
            curves = []
            for module in (*writers, reader):
                losses = predicted.of(width, module.type.name) if gone else self._losses_of_all(module)
                choices = choices_of(budget, narrow(module, reader, width), losses.double().numpy())
                if gone and module == reader:  # it stays plain with a bias
                    choices.parameters[-1] += branch.added_bias
                curves.append(choices)
            curve, picks = combined(curves)
            for size, loss, pick in zip(curve.parameters, curve.losses, picks.tolist(), strict=True):
                ranks = tuple(choices.ranks[index] for choices, index in zip(curves, pick, strict=True))
                yield Choice(width, ranks), float(size), float(loss) + float(elimination.losses[gone])

    def _losses_of_all(self, module: LinearModule) -> torch.Tensor:
        """What leaving out directions costs where all neurons stay."""
        losses = self._task.required_bases().losses(module.layer, module.type.name)
        assert losses is not None  # the covariance of the preset names gradients
        return losses


def _in_single(pair: LowRankFactors) -> LowRankFactors:
    bias = None if pair.bias is None else pair.bias.float().cpu()
    return LowRankFactors(pair.down.float().cpu(), pair.up.float().cpu(), bias)

"""MLPs of fewer neurons under one predicted loss: what the MLP of a block may become, and the layers of what it does.

A choice is a number of neurons and, for each matrix of what is left, a rank or none. Neurons go as `neurons` has it,
and what is left are plain matrices: rows of the first ones, and the last one refitted. Pairs are made of these by their
own bases, from the covariance, the mean and the gradients of the kept neurons. Their losses are added to that of the
neurons, as losses of different matrices are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank.bases.block import basis_of, estimate
from lowrank.bases.principal import PrincipalBasis
from lowrank.compression.branches import Structure
from lowrank.compression.neurons import Elimination, Neurons
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import LinearModule
from lowrank.model.replacements import Replacement, SmallerLinear
from lowrank.model.runtime import pick_device
from lowrank.ranks.curves import Curve, Group, choices_of
from lowrank.ranks.groups import combined, worth_having

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What the MLP of a block may become.

    Attributes:
        neurons: that stay.
        ranks: of its matrices, in the order of the forward pass; None for one that stays plain.
    """

    neurons: int
    ranks: tuple[int | None, ...]


@dataclass(frozen=True)
class Layer:
    """A linear layer of the neurons that are left, in float64; `module` has its shape."""

    module: LinearModule
    weight: torch.Tensor
    bias: torch.Tensor | None


class Block:
    """The MLP of one block, with all that calibration says of it.

    Attributes:
        modules: its dense linear layers; the last of them is the one that reads neurons.
        neurons: as that one sees them.
    """

    def __init__(self, task: CompressionTask, structure: Structure, layer: int, device: torch.device) -> None:
        """Read a block's statistics and gradients onto a device, where all is computed.

        Raises:
            RankwiseError: a file that is missing or damaged, or no gradient; the layer is named.
        """
        self._settings, branch, self._task = task.required_covariance(), structure.mlp, task
        types = (*branch.writers, branch.reader)
        self.modules = [module for module in task.budget.modules if module.layer == layer and module.type in types]
        self._linears: list[Any] = [task.model.get_submodule(module.name) for module in self.modules]
        self._weights = [linear.weight.detach().to(device).double() for linear in self._linears]
        gradients, moments = task.required_gradients().of(layer), task.required_statistics().of(layer)
        self._gradients = [gradients[module.type.name].to(device).double() for module in self.modules]
        self._inputs = []
        for module in (self.modules[0], self.modules[-1]):
            covariance, mean = estimate(moments[module.type.site], self._settings, module.name)
            self._inputs.append((covariance.to(device), None if mean is None else mean.to(device)))
        bias, damping = self._linears[-1].bias, self._settings.damping
        self.neurons = Neurons.of(
            self._weights[-1], bias, *self._inputs[1], self._gradients[-1], damping, self.modules[-1].name
        )

    def parts(self, kept: torch.Tensor) -> list[Layer]:
        """The layers of the neurons that stay."""
        parts = []
        on_device = kept.to(self._weights[0].device)
        for module, linear, weight in zip(self.modules[:-1], self._linears, self._weights, strict=False):
            bias = None if linear.bias is None else linear.bias.detach().to(weight)[on_device]
            parts.append(Layer(replace(module, out_features=len(kept)), weight[on_device], bias))
        return [*parts, Layer(replace(self.modules[-1], in_features=len(kept)), *self.neurons.refit(kept))]

    def basis(self, part: Layer, kept: torch.Tensor) -> PrincipalBasis:
        """The basis of one of the `parts`; of a dense layer the one that is there.

        Raises:
            RankwiseError: a decomposition that fails; the layer is named.
        """
        module, last = part.module, part.module.type == self.modules[-1].type
        index = [each.type for each in self.modules].index(module.type)
        if len(kept) == len(self.neurons.deviations):
            return self._task.required_bases().of(module.layer, module.type.name)
        kept, gradient = kept.to(part.weight.device), self._gradients[index]
        covariance, mean = self._inputs[1 if last else 0]
        if last:
            covariance, mean = covariance[kept][:, kept], None if mean is None else mean[kept]
        else:
            gradient = gradient[kept][:, kept]
        return basis_of(part.weight, part.bias, covariance, mean, gradient, self._settings, module.name)


class Mlps:
    """The MLPs of a model: `groups` for an allocation, then `replacements` for what it picked."""

    def __init__(self, task: CompressionTask, multiple: int, one_width: bool, pairs: bool) -> None:
        """Look at nothing yet.

        Args:
            task: whose bases, statistics, gradients and covariance are read.
            multiple: of which numbers of neurons are.
            one_width: every block keeps the same number.
            pairs: also pairs of what is left; not with `one_width`.
        """
        self._task, self._multiple, self._one_width, self._pairs = task, multiple, one_width, pairs
        self._structure, self._device = Structure.of(task.budget), pick_device()
        self._eliminations: list[Elimination] = []
        self._choices: dict[str, tuple[Choice, ...]] = {}

    def groups(self) -> dict[str, Group]:
        """What the MLP of every block may become, or what those of all blocks may together.

        Raises:
            RankwiseError: no gradient, or a decomposition that fails; the layer is named.
        """
        count = len(self._layers)
        curves = []
        for layer in self._layers:
            block = self._block(layer)
            self._eliminations.append(block.neurons.eliminate())
            curves.append(self._choices_of(block, self._eliminations[-1]))
            log.info("neurons: block %d of %d", layer + 1, count)
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

    def replacements(self, picked: Mapping[str, int]) -> dict[str, Replacement]:
        """The layers of the MLPs that do not stay as they are.

        Plain ones are in the dtype of the model, pairs in float32, as bases are stored.

        Args:
            picked: as of `chosen`.
        """
        changed: dict[str, Replacement] = {}
        for layer, choice in self.chosen(picked).items():
            narrower = choice.neurons < self._structure.mlp.units
            if not narrower and not any(choice.ranks):
                continue
            block, kept = self._block(layer), self._eliminations[layer].kept(choice.neurons)
            for part, rank in zip(block.parts(kept), choice.ranks, strict=True):
                if rank is not None:
                    changed[part.module.name] = _in_single(block.basis(part, kept).factors(rank))
                elif narrower:
                    changed[part.module.name] = SmallerLinear(part.weight, part.bias).stored(self._task.model.dtype)
        return changed

    def _block(self, layer: int) -> Block:
        return Block(self._task, self._structure, layer, self._device)

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

    def _choices_of(self, block: Block, elimination: Elimination) -> tuple[Curve, tuple[Choice, ...]]:
        """What a block's MLP may become, with parameters and losses: of what no other choice beats in both."""
        found = list(self._with_pairs(block, elimination) if self._pairs else self._plain(elimination))
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

    def _with_pairs(self, block: Block, elimination: Elimination) -> Iterator[tuple[Choice, float, float]]:
        """Plain matrices, and for some numbers of neurons the combinations of ranks that are worth having."""
        yield from self._plain(elimination)
        branch, budget = self._structure.mlp, self._task.budget
        for width in [*branch.tried(self._multiple), branch.units]:
            kept, gone = elimination.kept(width), branch.units - width
            curves = []
            for part in block.parts(kept):
                losses = block.basis(part, kept).losses
                assert losses is not None  # the covariance of the preset names gradients
                choices = choices_of(budget, part.module, losses.double().cpu().numpy())
                if gone and part.module.type == branch.reader:  # it stays plain with a bias
                    choices.parameters[-1] += branch.added_bias
                curves.append(choices)
            curve, picks = combined(curves)
            for size, loss, pick in zip(curve.parameters, curve.losses, picks.tolist(), strict=True):
                ranks = tuple(choices.ranks[index] for choices, index in zip(curves, pick, strict=True))
                yield Choice(width, ranks), float(size), float(loss) + float(elimination.losses[gone])


def _in_single(pair: LowRankFactors) -> LowRankFactors:
    bias = None if pair.bias is None else pair.bias.float().cpu()
    return LowRankFactors(pair.down.float().cpu(), pair.up.float().cpu(), bias)

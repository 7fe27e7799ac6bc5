"""What removing neurons is predicted to cost, block by block, in files: the same for all ratios and many presets.

A file has the backward elimination of a block (`neurons`). Where pairs may be made of what is left, it has for each
number of neurons that is tried, and each matrix, what leaving out a direction of its basis costs besides. The bases
themselves are large, and few of them are picked: `narrower` makes those anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.calibration.output_gradients import OutputGradients
from lowrank.calibration.statistics import Statistics
from lowrank.compression.branches import Structure
from lowrank.compression.narrow_block import NarrowBlock
from lowrank.compression.neurons import Elimination
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.files import layer_files, layer_name
from lowrank.jobs.state import Parts
from lowrank.manifest import load_layer
from lowrank.model.families import LinearModule
from lowrank.model.stored_blocks import Layer
from lowrank.ranks.budget import Budget

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeuronLosses:
    """What removing neurons of one block is predicted to cost, in nats per token.

    Attributes:
        elimination: which go first, and what that costs.
        directions: name, as of `direction_name` -> what leaving out each direction costs besides, k.
        file: where this was read, for errors.
    """

    elimination: Elimination
    directions: dict[str, torch.Tensor]
    file: Path

    def of(self, neurons: int, type_name: str) -> torch.Tensor:
        """What leaving out directions of a matrix of so many neurons costs, k.

        Raises:
            RankwiseError: this number was not tried.
        """
        name = direction_name(neurons, type_name)
        if name not in self.directions:
            raise RankwiseError(
                f"{self.file}: holds nothing of '{type_name}' with {neurons} neurons, so it was made for something "
                f"else. Delete {self.file.parent} and run the workflow again."
            )
        return self.directions[name]


class Eliminations:
    """The predictions for all blocks of a model: a folder with one file a block."""

    def __init__(self, folder: str | Path, layers: int) -> None:
        """Args: folder: the `layers` folder of the rule that made them; layers: how many blocks."""
        self._files = layer_files(folder, layers)

    def of(self, layer: int) -> NeuronLosses:
        """Those of one block.

        Raises:
            RankwiseError: the file is damaged, or was made for something else.
        """
        tensors = load_layer(self._files[layer], ("order", "losses"))
        elimination = Elimination(tensors.pop("order").long(), tensors.pop("losses"))
        return NeuronLosses(elimination, tensors, self._files[layer])


def direction_name(neurons: int, type_name: str) -> str:
    """Name of the tensor of a matrix of so many neurons."""
    return f"{neurons}.{type_name}"


def eliminate_neurons(
    dense: Callable[[Sequence[LinearModule]], Sequence[Layer]],
    budget: Budget,
    statistics: Statistics,
    gradients: OutputGradients,
    settings: Covariance,
    device: torch.device,
    parts: Parts,
    multiple: int | None = None,
    found: Eliminations | None = None,
) -> None:
    """Remove the neurons of all blocks, one block after another; each one that is finished is kept in `parts`.

    Args:
        dense: weight and bias of some layers of the dense model.
        budget: its linear layers.
        statistics, gradients: what calibration says of them.
        settings: how covariances are estimated, and bases made.
        device: where to compute.
        parts: of unfinished work; a block that is there is not computed again.
        multiple: of which the numbers of neurons are that pairs are tried of; None: no pairs.
        found: the eliminations, if they are there already.

    Raises:
        RankwiseError: an input is damaged, no gradient, or a decomposition that fails; the layer is named.
    """
    structure = Structure.of(budget)
    widths = structure.mlp.tried(multiple) if multiple else []
    for layer in range(budget.dimensions.layers):
        name = Path(layer_name(layer)).stem
        if parts.load(name) is not None:
            log.info("neurons: block %d of %d was finished before", layer + 1, budget.dimensions.layers)
            continue
        modules = structure.modules(layer, structure.mlp)
        calibrated = statistics.of(layer), gradients.of(layer)
        block = NarrowBlock(modules, dense(modules), *calibrated, settings, device)
        elimination = found.of(layer).elimination if found else block.neurons.eliminate()
        parts.save(name, _tensors(block, elimination, widths))
        log.info("neurons: block %d of %d", layer + 1, budget.dimensions.layers)


def _tensors(block: NarrowBlock, elimination: Elimination, widths: Sequence[int]) -> dict[str, torch.Tensor]:
    """What is stored of a block."""
    stored = {"order": elimination.order.int(), "losses": elimination.losses}
    for width in widths:
        kept = elimination.kept(width)
        for part in block.parts(kept):
            losses = block.basis(part, kept).losses
            assert losses is not None  # the covariance of the preset names gradients
            stored[direction_name(width, part.module.type.name)] = losses.double()
    return stored

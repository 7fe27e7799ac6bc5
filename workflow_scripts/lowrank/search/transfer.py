"""An allocation that was found for one model, as a starting point for another.

Kept ratios are carried over, never ranks, so the models may differ in width and depth. A layer takes the ratios of
the layer at the same relative depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.search.kept_ratios import SearchSpace


def transferred_point(space: SearchSpace, source: Mapping[str, Any], shape: ModelShape) -> np.ndarray:
    """The kept ratios of another model's allocation, before they are scaled into this model's budget.

    The ratio of a variable is the mean over the layers of its group; all layers of a type hold equally many
    parameters, so no weights are needed. A type that the source leaves dense has the ratio 1.

    Args:
        space: of the model to be compressed.
        source: the other model's allocation, as the search writes it.
        shape: of the other model.

    Returns:
        d ratios.

    Raises:
        RankwiseError: the other model has no layers of a type that is searched here.
    """
    ratios = {name: _of_each_layer(values, source["groups"]) for name, values in source["variables"].items()}
    known = {linear.tied for linear in FAMILIES[shape.family].types}
    family = space.budget.dimensions.family
    layers = space.budget.dimensions.layers
    point = np.ones(len(space.names))
    for index, name in enumerate(space.names):
        tied, group = name.split("/")
        if tied in ratios:
            there = [same_depth(layer, layers, shape.layers) for layer in space.groups[int(group)]]
            point[index] = np.mean([ratios[tied][layer] for layer in there])
        elif tied not in known:
            raise RankwiseError(
                f"nothing can be transferred from '{source['subject']['model']}' of family '{shape.family}', which has "
                f"no layers of type '{tied}' ({', '.join(sorted(known))}), to a model of family '{family}'; "
                "choose a `transfer.model` with the same types of layers"
            )
    return point


def same_depth(layer: int, layers: int, source_layers: int) -> int:
    """The layer of a model of `source_layers` layers in which the middle of a layer of `layers` lies."""
    return (2 * layer + 1) * source_layers // (2 * layers)


def _of_each_layer(values: Sequence[float], groups: Sequence[Sequence[int]]) -> list[float]:
    """The ratio of each layer, from those of groups given by their first and last layers."""
    return [value for value, (first, last) in zip(values, groups, strict=True) for _ in range(first, last + 1)]

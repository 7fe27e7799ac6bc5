"""Heat maps of what is left of every matrix, by type and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from lowrank.config.sources import ModelShape
from lowrank.model.families import Dimensions, LinearModule, linear_modules
from lowrank.paper.page.results import Checkpoint
from lowrank.paper.tables.data import Json
from lowrank.paper.tables.rows import manifests_of

ELSEWHERE = 0.001
"""Share of the dense weights from which on it is told that some stand in no matrix of the map."""


@dataclass(frozen=True)
class Run:
    """Consecutive layers that keep the same share of a matrix, or of a width."""

    first: int
    last: int
    share: float

    @property
    def layers(self) -> str:
        """In words."""
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first}–{self.last}"


@dataclass(frozen=True)
class Strip:
    """One line of a heat map: a type of matrix, or a width that some layers have less of."""

    name: str
    runs: Sequence[Run]

    @property
    def mean(self) -> float:
        """Over layers, which are alike."""
        layers = sum(run.last - run.first + 1 for run in self.runs)
        return sum(run.share * (run.last - run.first + 1) for run in self.runs) / layers


@dataclass(frozen=True)
class HeatMap:
    """What a checkpoint keeps.

    Attributes:
        checkpoint: of which seed 0, or the first, is shown.
        layers: how many.
        strips: one a type of matrix, its share of weights; then those of widths that are not as in the dense model.
        elsewhere: share of the dense weights that stands in shortcuts and indices, which are in no matrix; 0 if small.
    """

    checkpoint: Checkpoint
    layers: int
    strips: Sequence[Strip]
    elsewhere: float


def heat_maps(found: Sequence[Checkpoint], shapes: Mapping[str, ModelShape]) -> tuple[list[HeatMap], list[Checkpoint]]:
    """Heat maps of all compressed checkpoints, and those of which none can be drawn.

    Post-training keeps the sizes, so of one compression one checkpoint is shown: that before post-training, if it was
    judged. A manifest that does not list the linear layers was written by an earlier version.
    """
    shown: dict[tuple[str, str, int], Checkpoint] = {}
    for checkpoint in sorted(found, key=lambda each: each.row.tuning != "none"):
        shown.setdefault(_compression(checkpoint), checkpoint)
    maps, left_out = [], []
    for checkpoint in found:
        if not checkpoint.row.ratio or shown[_compression(checkpoint)] is not checkpoint:
            continue
        manifests = manifests_of(checkpoint.results, "compression")
        if manifests and "linears" in manifests[0]:
            maps.append(_map(checkpoint, manifests[0], shapes[checkpoint.row.model]))
        else:
            left_out.append(checkpoint)
    return maps, left_out


def _compression(checkpoint: Checkpoint) -> tuple[str, str, int]:
    return checkpoint.row.model, checkpoint.row.method, checkpoint.row.ratio


def _map(checkpoint: Checkpoint, manifest: Json, shape: ModelShape) -> HeatMap:
    modules = list(linear_modules(cast(Dimensions, shape)))
    sizes = manifest["linears"]
    strips = [
        _strip(
            name,
            [
                sum(sizes[module.name]["parameters"] for module in members) / sum(m.parameters for m in members)
                for members in of_layers
            ],
        )
        for name, of_layers in _by_type(modules).items()
    ]
    of_all = sum(size["parameters"] for size in sizes.values())
    elsewhere = manifest["parameters"]["decoder_linears"] - of_all
    share = elsewhere / manifest["parameters"]["decoder_linears_dense"]
    widths = [strip for strip in _widths(modules, sizes) if strip.mean != 1]
    return HeatMap(checkpoint, shape.layers, [*strips, *widths], share if share >= ELSEWHERE else 0.0)


def _by_type(modules: Sequence[LinearModule]) -> dict[str, list[list[LinearModule]]]:
    """Type -> its modules, layer by layer: one, or that of each expert; types in the order of the forward pass."""
    found: dict[str, dict[int, list[LinearModule]]] = {}
    for module in modules:
        found.setdefault(module.type.name, {}).setdefault(module.layer, []).append(module)
    return {name: list(of_layers.values()) for name, of_layers in found.items()}


def _widths(modules: Sequence[LinearModule], sizes: Json) -> Iterator[Strip]:
    """What attention, its values and the MLP have left of their widths, and the stream that they read."""
    by_type = _by_type(modules)
    last = list(by_type)[-1]
    for name, linear, side in (
        ("query dimensions", "q", "out_features"),
        ("value dimensions", "v", "out_features"),
        ("neurons", last, "in_features"),
        ("residual stream", "q", "in_features"),
    ):
        firsts = [members[0] for members in by_type[linear]]  # no method prunes experts, so one stands for all
        yield _strip(name, [sizes[module.name][side] / getattr(module, side) for module in firsts])


def _strip(name: str, shares: Sequence[float]) -> Strip:
    runs, layer = [], 0
    for share, members in groupby(shares):
        count = len(list(members))
        runs.append(Run(layer, layer + count - 1, share))
        layer += count
    return Strip(name, runs)

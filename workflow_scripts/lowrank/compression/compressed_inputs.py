"""Layers made one after the other in the order of the forward pass, each on inputs that come through those before it.

Two streams of hidden states go through the blocks: that of the dense model, and that of the model as far as it is
compressed. Layers that read one input are made together; then the next input is taken. `refine` may change the layers
of a block once all of them are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.calibration.gram import add_gram
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.model.devices import device_of
from lowrank.model.factors import LowRankFactors, pairs_of, tensors_of
from lowrank.model.families import LinearModule
from lowrank.model.partial_forward import block_input, exchanged, input_of, output_of
from lowrank.model.replacements import Deferred
from lowrank.ranks.budget import Budget

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096


class Products:
    """Sums of X X'' and X' X'' over batches, n x n, formed in float32 (float64 for float64 inputs), kept in float64.

    Of X' X'' it is the upper triangle. X are the inputs where outputs are right, X' those in the compressed model.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.cross = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.own = torch.zeros_like(self.cross)

    def add(self, dense: torch.Tensor, compressed: torch.Tensor) -> None:
        """Add a batch of both inputs, ... x n."""
        wide = torch.promote_types(dense.dtype, torch.float32)
        x, y = (states.flatten(0, -2).to(wide) for states in (dense, compressed))
        self.cross += (x.T @ y).double()
        add_gram(self.own, y)


Make = Callable[[LinearModule, torch.Tensor, Products], LowRankFactors]
"""From a layer, its dense weight and the products of its inputs to its pair."""


class Refine(Protocol):
    """Changes the pairs of a block so that it puts out something else."""

    def __call__(
        self,
        layer: int,
        pairs: Mapping[str, LowRankFactors],
        batches: list[torch.Tensor],
        entering: list[torch.Tensor],
        leaving: list[torch.Tensor],
    ) -> dict[str, LowRankFactors]:
        """Other pairs of the same ranks.

        Args:
            layer: index of the block.
            pairs: its pairs.
            batches: token ids, each windows x length.
            entering: what enters the block in the compressed model, on the CPU, windows x length x d each.
            leaving: what leaves it in the dense model.
        """


def factors_in_order(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    budget: Budget,
    names: Collection[str],
    make: Make,
    device: torch.device,
    target: Literal["dense", "inputs"],
    refine: Refine | None = None,
    parts: Parts | None = None,
) -> Mapping[str, LowRankFactors]:
    """Make the pairs of some layers; where they are kept in files, they are read again when they are asked for.

    Args:
        model: the dense model; changed, and changed back.
        tokens: windows x length token ids.
        budget: of the model.
        names: the layers that become pairs; the others stay dense.
        make: the pair of a layer.
        device: where the model is, or its embeddings are.
        target: whose inputs X are. dense: the dense model's; inputs: those at hand, so that X = X'.
        refine: what is done to the pairs of a block.
        parts: where the pairs of finished blocks are kept, and found again; they must be of the same call.

    Raises:
        RankwiseError: what `make` raises.
    """
    batches = list(torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1])))
    made: dict[str, LowRankFactors] = {}
    changed_in: dict[int, list[str]] = {}
    last = budget.dimensions.layers - 1
    with torch.no_grad():
        dense = [block_input(model, ids.to(device)).cpu() for ids in batches]
        compressed = dense
        for layer in range(last + 1):
            kept = parts.load(f"block_{layer}") if parts else None
            pairs: dict[str, LowRankFactors] = {} if kept is None else pairs_of(kept)
            for modules in _sites(budget, layer) if kept is None else ():
                changed = [module for module in modules if module.name in names]
                if not changed:
                    continue
                before = _running(model, pairs)
                products = _products(model, modules[0], batches, (dense, compressed), before, device, target)
                for module in changed:
                    pairs[module.name] = make(module, model.get_submodule(module.name).weight, products)
            if refine is not None or (target == "dense" and layer < last):
                dense = _outputs(model, layer, batches, dense, device)
            if kept is None:
                if refine is not None and pairs:
                    pairs = refine(layer, pairs, batches, compressed, dense)
                if parts is not None:
                    parts.save(f"block_{layer}", tensors_of(pairs))
            if layer < last:
                with exchanged(model, _running(model, pairs)):
                    compressed = _outputs(model, layer, batches, compressed, device)
            changed_in[layer] = list(pairs)
            if parts is None:
                made |= pairs
            log.info("made block %d of %d on the inputs of the compressed model", layer + 1, last + 1)
    if parts is None:
        return made
    return Deferred.of_groups(changed_in.items(), partial(_kept, parts))


def _kept(parts: Parts, layer: int) -> dict[str, LowRankFactors]:
    """The pairs of a finished block."""
    kept = parts.load(f"block_{layer}")
    if kept is None:
        raise RankwiseError(f"block {layer}: the pairs that were made of it are gone. Run the workflow again.")
    return pairs_of(kept)


def _running(model: PreTrainedModel, pairs: Mapping[str, LowRankFactors]) -> dict[str, nn.Module]:
    """The layers that pairs become."""
    return {name: pair.as_module(model.dtype, _place(model, name)) for name, pair in pairs.items()}


def _place(model: PreTrainedModel, name: str) -> torch.device:
    """Where a dense layer is."""
    return device_of(model.get_submodule(name))


def _sites(budget: Budget, layer: int) -> list[list[LinearModule]]:
    """The linear layers of a block that read the same input, in the order of the forward pass."""
    sites: dict[str, list[LinearModule]] = {}
    for module in budget.modules:
        if module.layer == layer:
            sites.setdefault(module.type.site, []).append(module)
    return list(sites.values())


def _products(
    model: PreTrainedModel,
    module: LinearModule,
    batches: list[torch.Tensor],
    entering: tuple[list[torch.Tensor], list[torch.Tensor]],
    pairs: Mapping[str, nn.Module],
    device: torch.device,
    target: Literal["dense", "inputs"],
) -> Products:
    """Products of what a layer reads where its outputs are right (the dense model, or the compressed) and where not."""
    products = Products(module.in_features, _place(model, module.name))
    for ids, *hidden in zip(batches, *entering, strict=True):
        on_device = ids.to(device)
        with exchanged(model, pairs):
            read = input_of(model, module.name, on_device, module.layer, hidden[1].to(device))
        right = read
        if target == "dense":
            right = input_of(model, module.name, on_device, module.layer, hidden[0].to(device))
        products.add(right, read)
    return products


def _outputs(
    model: PreTrainedModel, layer: int, batches: list[torch.Tensor], entering: list[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """What leaves a block, batch by batch, on the CPU."""
    return [
        output_of(model, ids.to(device), layer, hidden.to(device)).cpu()
        for ids, hidden in zip(batches, entering, strict=True)
    ]

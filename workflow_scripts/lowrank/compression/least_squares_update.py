"""Refitting of the up factors on what flows through the compressed model (SVD-LLM's closed-form update).

A factorised model changes the inputs of its own later layers. With X' the inputs of a layer W in the compressed model,
V its down factor and Y the outputs that it should have, the up factor that is best there solves

    min_U ||Y - U V X'||^2,    U = Y X'' V' (V X' X'' V')^-1,

where '' is the transpose of X'. Two targets: Y = W X, the layer's outputs in the dense model, so that the update also
works against the errors of the layers before; or Y = W X', what the dense layer would make of the inputs at hand, which
only undoes that V was fitted to others. Layers are refitted in the order of the forward pass, each on inputs that come
through those refitted before it. Biases stay as they are, since both sides have the same.

It is computed as a correction, U = U_0 + (Y X'' V' - U_0 G) G^-1 with G = V X' X'' V', which is the same where G can be
inverted. Where it cannot (fewer tokens than ranks), a small multiple of the identity is added to G, and what the inputs
say nothing about keeps its U_0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from lowrank.bases.whitening import cholesky_factor
from lowrank.calibration.gram import add_gram, symmetric
from lowrank.model.checkpoint import family_of
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import LinearModule
from lowrank.model.partial_forward import block_input, exchanged, input_of
from lowrank.ranks.budget import Budget

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096


class _Products:
    """Sums of X X'' and X' X'' over batches, n x n, formed in float32 (float64 for float64 inputs), kept in float64.

    Of X' X'' it is the upper triangle.
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


def refit_up_factors(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    budget: Budget,
    factors: Mapping[str, LowRankFactors],
    device: torch.device,
    target: Literal["dense", "inputs"],
) -> dict[str, LowRankFactors]:
    """Refit the up factor of every low-rank pair, site by site in the order of the forward pass.

    Args:
        model: the dense model, on `device`; changed, and changed back.
        tokens: windows x length token ids.
        budget: of the model.
        factors: layer -> its pair; layers that are not named are dense.
        device: where the model is.
        target: the outputs to fit. dense: W X, those in the dense model; inputs: W X', on the inputs at hand.

    Raises:
        RankwiseError: a layer's inputs in the compressed model are zero or not finite; it is named.
    """
    batches = list(torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1])))
    refitted: dict[str, LowRankFactors] = {}
    with torch.inference_mode():
        dense = [block_input(model, ids.to(device)).cpu() for ids in batches]
        compressed = dense
        for layer in range(budget.dimensions.layers):
            pairs: dict[str, torch.nn.Module] = {}
            for modules in _sites(budget, layer):
                changed = [module for module in modules if module.name in factors]
                if not changed:
                    continue
                products = _products(model, modules[0], batches, (dense, compressed), pairs, device, target)
                for module in changed:
                    weight = model.get_submodule(module.name).weight
                    new = _refitted(factors[module.name], weight, products, module.name)
                    refitted[module.name] = new
                    pairs[module.name] = new.as_module(model.dtype, device)
            log.info("update: block %d of %d", layer + 1, budget.dimensions.layers)
            if layer + 1 < budget.dimensions.layers:
                name = f"{family_of(model).blocks}.{layer + 1}"
                if target == "dense":
                    dense = _inputs(model, name, batches, layer, dense, device)
                with exchanged(model, pairs):
                    compressed = _inputs(model, name, batches, layer, compressed, device)
    return refitted


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
    pairs: Mapping[str, torch.nn.Module],
    device: torch.device,
    target: Literal["dense", "inputs"],
) -> _Products:
    """Products of what a layer reads where its outputs are right (the dense model, or the compressed) and where not."""
    products = _Products(module.in_features, device)
    for ids, *hidden in zip(batches, *entering, strict=True):
        on_device = ids.to(device)
        with exchanged(model, pairs):
            read = input_of(model, module.name, on_device, module.layer, hidden[1].to(device))
        right = read
        if target == "dense":
            right = input_of(model, module.name, on_device, module.layer, hidden[0].to(device))
        products.add(right, read)
    return products


def _refitted(pair: LowRankFactors, weight: torch.Tensor, products: _Products, where: str) -> LowRankFactors:
    """A pair with the best up factor for its down factor."""
    own = symmetric(products.own)
    down, up, w = pair.down.to(own), pair.up.to(own), weight.to(own)
    gram = down @ own @ down.T
    root = cholesky_factor(gram, where)
    missing = w @ products.cross @ down.T - up @ gram
    return replace(pair, up=(up + torch.cholesky_solve(missing.T, root).T).to(pair.up))


def _inputs(
    model: PreTrainedModel,
    name: str,
    batches: list[torch.Tensor],
    layer: int,
    entering: list[torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """What a block reads, batch by batch, on the CPU."""
    return [
        input_of(model, name, ids.to(device), layer, hidden.to(device)).cpu()
        for ids, hidden in zip(batches, entering, strict=True)
    ]

"""ZS-SVD's correction: truncate, step along the gradient towards the dense weights, truncate again.

With W_r the truncated weight of a layer and g the gradient of the calibration loss there, in the model where all
layers are truncated, the part of what was lost that lies along g comes back,

    W_c = W_r + (<W - W_r, g> / <g, g>) g,

and W_c is truncated to the rank of W_r in the same whitened coordinates. All gradients of a round are taken before any
weight moves. The step has no size to choose; whether it goes down the gradient or up is a matter of what was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.bases.principal import PrincipalBasis
from lowrank.bases.weighted_svd import balanced
from lowrank.calibration.gradients import mean_gradients
from lowrank.jobs.state import Parts
from lowrank.model.devices import pick_devices
from lowrank.model.factors import LowRankFactors, pairs_of, tensors_of
from lowrank.model.families import LinearModule
from lowrank.model.partial_forward import exchanged

Decompose = Callable[[LinearModule, torch.Tensor], PrincipalBasis]
"""From a layer and a weight for it to its whitened directions; it decides where to compute."""


def correct(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    layers: Sequence[tuple[LinearModule, int]],
    factors: Mapping[str, LowRankFactors],
    decompose: Decompose,
    device: torch.device,
    parts: Parts | None = None,
    number: int = 1,
) -> dict[str, LowRankFactors]:
    """One round.

    Args:
        model: the dense model; changed, and changed back.
        tokens: windows x length token ids, whose mean loss has the gradient.
        layers: those that are pairs, block by block, and their ranks.
        factors: layer -> its pair so far.
        decompose: as for the first truncation.
        device: where to take gradients.
        parts: where the pairs of finished blocks are kept, and found again; they must be of the same corrections.
        number: of this round; those of another are not taken, and are written over.

    Raises:
        RankwiseError: a gradient is not finite, a decomposition fails, or pairs that were kept are damaged; named.
    """
    blocks = {layer: list(those) for layer, those in groupby(layers, key=lambda item: item[0].layer)}
    found = {layer: _kept(parts, layer, number) for layer in blocks}
    left = [module.name for module, _ in layers if found[module.layer] is None]
    gradients = _gradients(model, tokens, factors, left, device) if left else {}
    corrected: dict[str, LowRankFactors] = {}
    for layer, those in blocks.items():
        pairs = found.pop(layer)
        if pairs is None:
            pairs = {
                module.name: _corrected(model, module, rank, factors, gradients, decompose, device)
                for module, rank in those
            }
            if parts is not None:
                parts.save(f"block_{layer}", tensors_of(pairs) | {"number": torch.tensor(number)})
        corrected |= pairs
    return corrected


def _kept(parts: Parts | None, layer: int, number: int) -> dict[str, LowRankFactors] | None:
    """The pairs of a block after a round, if they are there."""
    kept = parts.load(f"block_{layer}") if parts is not None else None
    return pairs_of(kept) if kept is not None and int(kept.pop("number")) == number else None


def _gradients(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    factors: Mapping[str, LowRankFactors],
    names: Sequence[str],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The gradients of some layers in the model where all pairs are."""
    truncated = {name: _dense(model, name, pair, device) for name, pair in factors.items()}
    with exchanged(model, truncated):
        return mean_gradients(model, tokens, names, pick_devices())


def _corrected(
    model: PreTrainedModel,
    module: LinearModule,
    rank: int,
    factors: Mapping[str, LowRankFactors],
    gradients: dict[str, torch.Tensor],
    decompose: Decompose,
    device: torch.device,
) -> LowRankFactors:
    """The pair of a layer after the round; its gradient is given up."""
    name, layer = module.name, model.get_submodule(module.name)
    weight = corrected_weight(layer.weight, product(factors[name], device), gradients.pop(name))
    basis = decompose(module, weight)
    return balanced(basis.directions, basis.projection, layer.weight.dtype).factors(rank, layer.bias)


def corrected_weight(dense: torch.Tensor, truncated: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """W_r and the part of W - W_r along the gradient, m x n in float64; W_r itself where there is no gradient."""
    w_r = truncated.double()
    w, g = dense.to(w_r), gradient.to(w_r)
    size = float((g * g).sum())
    return w_r + (float(((w - w_r) * g).sum()) / size) * g if size > 0 else w_r


def product(pair: LowRankFactors, device: torch.device) -> torch.Tensor:
    """B A, m x n in float64, on a device."""
    return pair.up.to(device).double() @ pair.down.to(device).double()


def _dense(model: PreTrainedModel, name: str, pair: LowRankFactors, device: torch.device) -> nn.Linear:
    """A dense layer with the weights of a pair, in the model's dtype: of it gradients can be taken."""
    layer = model.get_submodule(name)
    m, n = layer.weight.shape
    with torch.device("meta"):
        made = nn.Linear(n, m, bias=layer.bias is not None)
    made.weight = nn.Parameter(product(pair, device).to(layer.weight), requires_grad=False)
    if layer.bias is not None:
        made.bias = layer.bias
    return made

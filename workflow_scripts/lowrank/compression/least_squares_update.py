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

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from lowrank.bases.whitening import cholesky_factor
from lowrank.calibration.gram import symmetric
from lowrank.compression.compressed_inputs import Products, factors_in_order
from lowrank.jobs.state import Parts
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget


def refit_up_factors(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    budget: Budget,
    factors: Mapping[str, LowRankFactors],
    device: torch.device,
    target: Literal["dense", "inputs"],
    parts: Parts | None = None,
) -> Mapping[str, LowRankFactors]:
    """Refit the up factor of every low-rank pair, site by site in the order of the forward pass.

    Args:
        model: the dense model, on `device`; changed, and changed back.
        tokens: windows x length token ids.
        budget: of the model.
        factors: layer -> its pair, each asked for once; layers that are not named are dense.
        device: where the model is.
        target: the outputs to fit. dense: W X, those in the dense model; inputs: W X', on the inputs at hand.
        parts: where the pairs of finished blocks are kept, and found again; they must be of the same call.

    Raises:
        RankwiseError: a layer's inputs in the compressed model are zero or not finite; it is named.
    """

    def make(module: LinearModule, weight: torch.Tensor, products: Products) -> LowRankFactors:
        return _refitted(factors[module.name], weight, products, module.name)

    # A set: where factors are made when they are asked for, to look for a name in them makes them.
    return factors_in_order(model, tokens, budget, set(factors), make, device, target, parts=parts)


def _refitted(pair: LowRankFactors, weight: torch.Tensor, products: Products, where: str) -> LowRankFactors:
    """A pair with the best up factor for its down factor."""
    own = symmetric(products.own)
    down, up, w = pair.down.to(own), pair.up.to(own), weight.to(own)
    gram = down @ own @ down.T
    root = cholesky_factor(gram, where)
    missing = w @ products.cross @ down.T - up @ gram
    return replace(pair, up=(up + torch.cholesky_solve(missing.T, root).T).to(pair.up))

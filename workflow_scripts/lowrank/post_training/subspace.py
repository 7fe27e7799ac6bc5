"""The trained layer of the paper's post-training (Equation 9), and its exact merge into the factors.

A compressed layer is `y = B A x + b` with `A` (r x n) and `B` (m x r). Post-training picks r' of the r rank
dimensions, I, and trains two vectors, one for the inner dimensions and one for the outputs:

    y = B A x + b + outer * ( B_I ( inner * (A_I x) ) ),    inner in R^r' (Lambda_d), outer in R^m (Lambda_b)

`inner` starts at 0.1 and `outer` at 0, so that training starts at the compressed model. Since `A_I` are rows
of `A`, the result is a low-rank layer of the same rank: `B[:, i] += outer * B[:, i] * inner[i]` for i in I.

A pair whose `B` has an identity block is trained in the same way, with that `B`. The merge makes of the identity a
diagonal matrix, which goes over into `A`: so the block is an identity again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowrank.errors import RankwiseError
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import IdentityBlockLinear, IdentityColumns, LowRankLinear
from lowrank.model.replacements import IdentityBlockFactors

Strategy = Literal["random", "top", "bottom"]
PairLinear = LowRankLinear | IdentityBlockLinear

INNER_START = 0.1
SMALLEST_SCALE = 0.1
"""Of a merged identity block; with a smaller one, dividing by it would lose digits, and other rows are chosen."""


@dataclass(frozen=True)
class SubspaceVectors:
    """What post-training learns about one layer.

    Attributes:
        indices: I, int64, r' ascending rank indices.
        inner: Lambda_d, r'.
        outer: Lambda_b, m.
    """

    indices: torch.Tensor
    inner: torch.Tensor
    outer: torch.Tensor


class ScaledSubspaceLinear(nn.Module):
    """A low-rank layer with two trainable vectors on r' of its rank dimensions (paper, Equation 9).

    The factors stay frozen in their dtype; the vectors are float32 (float64 in a float64 layer), since steps of
    an optimiser on values near 0.1 are lost in bfloat16. Products with them are formed in their dtype.
    """

    indices: torch.Tensor
    subspace: torch.Tensor

    def __init__(self, layer: PairLinear, indices: torch.Tensor) -> None:
        super().__init__()
        weight = second_factor(layer).detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        indices = indices.to(weight.device)
        self.layer = layer.requires_grad_(False)
        self.register_buffer("indices", indices)
        # A copy of B_I (m x r'): indexing B in each forward pass would cost this copy every time.
        self.register_buffer("subspace", weight[:, indices].clone(), persistent=False)
        self.inner = nn.Parameter(torch.full((len(indices),), INNER_START, dtype=dtype, device=weight.device))
        self.outer = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        inside = self.layer.down(x)
        scaled = (self.inner * inside[..., self.indices]).to(inside.dtype)
        update = self.outer * nn.functional.linear(scaled, self.subspace)
        return self.layer.expand(inside) + update.to(inside.dtype)


def second_factor(layer: PairLinear) -> torch.Tensor:
    """B, m x r; an identity block is written out."""
    if isinstance(layer, LowRankLinear):
        return layer.up.weight
    rest = layer.rest.weight
    return torch.cat([torch.eye(layer.rank, dtype=rest.dtype, device=rest.device), rest])[layer.places()]


def choose_indices(rank: int, count: int, strategy: Strategy, generator: torch.Generator) -> torch.Tensor:
    """The rank indices I whose dimensions are scaled: min(count, rank) of them, ascending.

    The rows of `A` are in the order of their eigenvalues, so `top` are the directions of largest variance.
    """
    count = min(count, rank)
    if strategy == "random":
        return torch.randperm(rank, generator=generator)[:count].sort().values
    first = 0 if strategy == "top" else rank - count
    return torch.arange(first, first + count)


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, PairLinear]]:
    """Name and module of all low-rank layers, in the order of the model.

    Raises:
        RankwiseError: the model has none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PairLinear)]
    if not layers:
        raise RankwiseError(
            "this checkpoint has no low-rank layer, so there is nothing to post-train. "
            "Tune a compressed model, or take `tuning: none` for this row."
        )
    yield from layers


def attach_subspaces(model: nn.Module, count: int, strategy: Strategy, seed: int) -> dict[str, ScaledSubspaceLinear]:
    """Wrap every low-rank layer of a model, in place, and freeze everything but the new vectors.

    Args:
        model: a compressed model.
        count: r'; a layer of smaller rank uses all its dimensions.
        strategy: which rank dimensions.
        seed: of the `random` strategy.

    Returns:
        Name of the layer -> its trainable wrapper.

    Raises:
        RankwiseError: the model has no low-rank layer, or one with an identity block, whose dimensions have no order,
            and a strategy that needs one.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    wrapped: dict[str, ScaledSubspaceLinear] = {}
    for name, layer in low_rank_layers(model):
        if strategy != "random" and (isinstance(layer, IdentityBlockLinear) or isinstance(layer.down, IdentityColumns)):
            raise RankwiseError(
                f"{name}: its pair has an identity block, so its dimensions are in no order of variance and "
                f"`subspace: {strategy}` means nothing. Write `subspace: random` in this tuning."
            )
        wrapper = ScaledSubspaceLinear(layer, choose_indices(layer.rank, count, strategy, generator))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper)
        wrapped[name] = wrapper
    return wrapped


@torch.no_grad()
def merge_subspaces(model: nn.Module, vectors: Mapping[str, SubspaceVectors]) -> None:
    """Fold trained vectors into the factors of a compressed model, in place; ranks and dtypes stay.

    `B[:, i] += outer * B[:, i] * inner[i]` for i in I, in float64, rounded once to the dtype of `B`.

    Args:
        model: the compressed model as it was before training.
        vectors: layer name -> what was learnt.

    Raises:
        RankwiseError: what was learnt leaves a pair with an identity block without its full rank; the layer is named.
    """
    for name, learnt in vectors.items():
        layer = model.get_submodule(name)
        if isinstance(layer, IdentityBlockLinear):
            _merge_identity_block(layer, learnt, name)
            continue
        weight = layer.get_parameter("up.weight")
        indices = learnt.indices.to(weight.device)
        columns = weight[:, indices].double()
        change = learnt.outer.to(columns)[:, None] * columns * learnt.inner.to(columns)
        weight[:, indices] = (columns + change).to(weight.dtype)


def _merge_identity_block(layer: IdentityBlockLinear, learnt: SubspaceVectors, name: str) -> None:
    """The same for a pair with an identity block, which becomes diag(scale): `A = diag(scale) A`, `B = B / scale`."""
    up = second_factor(layer).double()
    indices, rows = learnt.indices.to(up.device), layer.rows.long()
    up[:, indices] += learnt.outer.to(up)[:, None] * up[:, indices] * learnt.inner.to(up)
    down, scale = layer.down.weight.double(), up[rows].diagonal()
    if bool(scale.abs().min() >= SMALLEST_SCALE):
        others = torch.ones(len(up), dtype=torch.bool, device=up.device).index_fill_(0, rows, False)
        merged = IdentityBlockFactors(layer.rows, scale[:, None] * down, up[others] / scale)
    else:
        merged = IdentityBlockFactors.of(LowRankFactors(down, up), name)
    layer.rows.copy_(merged.rows)
    layer.places()
    layer.down.weight.copy_(merged.down)
    layer.rest.weight.copy_(merged.rest)


def pack_vectors(vectors: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """As named tensors, for a safetensors file; of each layer a dataclass of tensors."""
    return {f"{name}:{field}": tensor for name, learnt in vectors.items() for field, tensor in vars(learnt).items()}


def unpack_vectors(tensors: Mapping[str, torch.Tensor]) -> dict[str, SubspaceVectors]:
    """The inverse of `pack_vectors`."""
    names = sorted({key.rpartition(":")[0] for key in tensors})
    fields = ("indices", "inner", "outer")
    return {name: SubspaceVectors(**{field: tensors[f"{name}:{field}"] for field in fields}) for name in names}

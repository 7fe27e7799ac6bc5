"""The trained layer of the paper's post-training (Equation 9), and its exact merge into the factors.

A compressed layer is `y = B A x + b` with `A` (r x n) and `B` (m x r). Post-training picks r' of the r rank
dimensions, I, and trains two vectors, one for the inner dimensions and one for the outputs:

    y = B A x + b + outer * ( B_I ( inner * (A_I x) ) ),    inner in R^r' (Lambda_d), outer in R^m (Lambda_b)

`inner` starts at 0.1 and `outer` at 0, so that training starts at the compressed model. Since `A_I` are rows
of `A`, the result is a low-rank layer of the same rank: `B[:, i] += outer * B[:, i] * inner[i]` for i in I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowrank.errors import RankwiseError
from lowrank.modeling.modeling_rankwise import LowRankLinear

Strategy = Literal["random", "top", "bottom"]

INNER_START = 0.1


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

    def __init__(self, layer: LowRankLinear, indices: torch.Tensor) -> None:
        super().__init__()
        weight = layer.up.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        indices = indices.to(weight.device)
        self.layer = layer.requires_grad_(False)
        self.register_buffer("indices", indices)
        # A copy of B_I (m x r'): indexing B in each forward pass would cost this copy every time.
        self.register_buffer("subspace", weight.detach()[:, indices].clone(), persistent=False)
        self.inner = nn.Parameter(torch.full((len(indices),), INNER_START, dtype=dtype, device=weight.device))
        self.outer = nn.Parameter(torch.zeros(layer.out_features, dtype=dtype, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        inside = self.layer.down(x)
        scaled = (self.inner * inside[..., self.indices]).to(inside.dtype)
        update = self.outer * nn.functional.linear(scaled, self.subspace)
        compressed: torch.Tensor = self.layer.up(inside)
        return compressed + update.to(inside.dtype)


def choose_indices(rank: int, count: int, strategy: Strategy, generator: torch.Generator) -> torch.Tensor:
    """The rank indices I whose dimensions are scaled: min(count, rank) of them, ascending.

    The rows of `A` are in the order of their eigenvalues, so `top` are the directions of largest variance.
    """
    count = min(count, rank)
    if strategy == "random":
        return torch.randperm(rank, generator=generator)[:count].sort().values
    first = 0 if strategy == "top" else rank - count
    return torch.arange(first, first + count)


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Name and module of all low-rank layers, in the order of the model.

    Raises:
        RankwiseError: the model has none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
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
        RankwiseError: the model has no low-rank layer.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    wrapped: dict[str, ScaledSubspaceLinear] = {}
    for name, layer in low_rank_layers(model):
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
    """
    for name, learnt in vectors.items():
        weight = model.get_submodule(name).get_parameter("up.weight")
        indices = learnt.indices.to(weight.device)
        columns = weight[:, indices].double()
        change = learnt.outer.to(columns)[:, None] * columns * learnt.inner.to(columns)
        weight[:, indices] = (columns + change).to(weight.dtype)


def pack_vectors(vectors: Mapping[str, SubspaceVectors]) -> dict[str, torch.Tensor]:
    """As named tensors, for a safetensors file."""
    return {f"{name}:{field}": tensor for name, learnt in vectors.items() for field, tensor in vars(learnt).items()}


def unpack_vectors(tensors: Mapping[str, torch.Tensor]) -> dict[str, SubspaceVectors]:
    """The inverse of `pack_vectors`."""
    names = sorted({key.rpartition(":")[0] for key in tensors})
    fields = ("indices", "inner", "outer")
    return {name: SubspaceVectors(**{field: tensors[f"{name}:{field}"] for field in fields}) for name in names}

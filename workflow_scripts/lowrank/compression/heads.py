"""Attention heads of fewer dimensions: which go, and the layers that are left.

v and o of a group of heads (a key/value head and the query heads that share it) meet in `head_dim` numbers, and any
basis of these may stand between them: `T v` and `O T^-1` are the same map. So a direction can be cut without a second
factor. With M = E[v v'] and N = sum_h O_h' O_h over the query heads h of the group, the map `D E'` of rank r whose
outputs have the least squared error, tr(N (I - D E') M (I - D E')'), is

    M = L L',   N = R R',   R' L = U S V'   ->   E' = U_r' R',   D = L V_r S_r^-1,   error = sum_{i > r} s_i^2.

That is the SVD of C^(1/2) W_v' [O_1' ... O_g'] (MoDeGPT, Lin et al., ICLR 2025), without a
root of C or its inverse. It is best for the values of single tokens; what a head passes on are averages of these.

q and k meet in a sum of products over the dimensions of a head, of which some are left out (a CR decomposition). Rotary
positions turn dimension i together with i + head_dim / 2, so these pairs stay or go as wholes; their size does not
depend on the position. Each group keeps those with the largest products of sizes, sqrt(E|q_i|^2 E|k_i|^2), where
E|q_i|^2 is summed over the query heads of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import RankwiseError
from lowrank.model.replacements import SmallerLinear

_NO_ENERGY = 1e-12
"""Share of the largest singular value below which a direction carries nothing."""


@dataclass(frozen=True)
class Inputs:
    """Moments of what q, k and v of a block read, in float64.

    Attributes:
        second: n x n, E[x x'].
        mean: n, E[x].
    """

    second: torch.Tensor
    mean: torch.Tensor

    def of_outputs(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """E[y y'] of y = W x + b, m x m."""
        moment = weight @ self.second @ weight.T
        if bias is None:
            return moment
        crossed = (weight @ self.mean)[:, None] * bias
        return moment + crossed + crossed.T + bias[:, None] * bias

    def sizes_of_outputs(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The diagonal of `of_outputs`, m."""
        sizes = (weight @ self.second * weight).sum(dim=1)
        if bias is None:
            return sizes
        return sizes + 2 * (weight @ self.mean) * bias + bias**2


@dataclass(frozen=True)
class InnerBasis:
    """Directions of the space in which v and o of a group of heads meet, those first that cost most if cut.

    Attributes:
        encode: k x k, the first r rows are E': they make r new dimensions of v.
        decode: k x k, the first r columns are D: they bring the old ones back.
    """

    encode: torch.Tensor
    decode: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor, metric: torch.Tensor) -> InnerBasis:
        """The basis from M and N, both k x k in float64.

        The scale of a direction is free; a row of `encode` and its column of `decode` are made equally long.
        """
        left, right = _root(moment), _root(metric)
        u, s, vt = torch.linalg.svd(right.T @ left)
        carries = s > _NO_ENERGY * s[0]
        encode, decode = u.T @ right.T, left @ vt.T * torch.where(carries, 1 / s, 0)
        scale = torch.where(carries, (decode.norm(dim=0) / encode.norm(dim=1)).sqrt(), 1)
        return cls(encode * scale[:, None], decode / scale)


@dataclass(frozen=True)
class ValueOutput:
    """v and o of one block, in float64.

    Attributes:
        value: groups x k x n, rows of v.
        value_bias: groups x k, or None.
        output: groups x heads of a group x d x k, columns of o.
        output_bias: d, or None.
        bases: one a group.
    """

    value: torch.Tensor
    value_bias: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    bases: tuple[InnerBasis, ...]

    @classmethod
    def of(cls, value: Any, output: Any, kv_heads: int, inputs: Inputs, where: str) -> ValueOutput:
        """Decompose a block, where its moments are.

        Args:
            value: v, a dense linear layer.
            output: o, another.
            kv_heads: groups of heads.
            inputs: of v.
            where: the block's name, for errors.

        Raises:
            RankwiseError: weights or moments that are not finite.
        """
        weight, bias = _rows(value, kv_heads, inputs.second)
        columns = output.weight.detach().to(weight)  # d x (groups, heads of a group, k)
        columns = columns.unflatten(1, (kv_heads, -1, weight.shape[1])).permute(1, 2, 0, 3)
        own = None if output.bias is None else output.bias.detach().to(weight)
        sizes = (columns.transpose(2, 3) @ columns).sum(dim=1)
        bases = []
        for group, size in enumerate(sizes):
            moment = inputs.of_outputs(weight[group], None if bias is None else bias[group])
            check_finite(where, moment, size)
            bases.append(InnerBasis.of(moment, size))
        return cls(weight, bias, columns, own, tuple(bases))

    def narrower(self, rank: int) -> tuple[SmallerLinear, SmallerLinear]:
        """v and o with so many dimensions a head."""
        encode = torch.stack([basis.encode[:rank] for basis in self.bases])
        decode = torch.stack([basis.decode[:, :rank] for basis in self.bases])
        bias = None if self.value_bias is None else (encode @ self.value_bias[:, :, None]).flatten()
        output = (self.output @ decode[:, None]).permute(2, 0, 1, 3).flatten(1)
        return SmallerLinear((encode @ self.value).flatten(0, 1), bias), SmallerLinear(output, self.output_bias)


@dataclass(frozen=True)
class QueryKey:
    """q and k of one block.

    Attributes:
        query, key: dense linear layers.
        scores: groups x units; a unit is a rotary pair, or a dimension where nothing is rotated.
        rotary: whether units are pairs.
    """

    query: Any
    key: Any
    scores: torch.Tensor
    rotary: bool

    @classmethod
    def of(cls, query: Any, key: Any, kv_heads: int, inputs: Inputs, rotary: bool, where: str) -> QueryKey:
        """Measure a block, where its moments are.

        Raises:
            RankwiseError: weights or moments that are not finite.
        """
        sizes, head_dim, halves = [], key.out_features // kv_heads, 2 if rotary else 1
        for layer in (query, key):
            weight, bias = _rows(layer, 1, inputs.second)
            size = inputs.sizes_of_outputs(weight[0], None if bias is None else bias[0])
            sizes.append(size.clamp(min=0).view(kv_heads, -1, halves, head_dim // halves).sum(dim=(1, 2)))
        scores = (sizes[0] * sizes[1]).sqrt()
        check_finite(where, scores)
        return cls(query, key, scores, rotary)

    def kept(self, count: int) -> torch.Tensor:
        """Groups x count units that stay, increasing; of equals those that come first."""
        return self.scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values.cpu()

    def narrower(self, kept: torch.Tensor) -> tuple[SmallerLinear, SmallerLinear]:
        """q and k with the units that `kept` names in every head."""
        units = self.scores.shape[1]
        dimensions = torch.cat([kept, kept + units], dim=1) if self.rotary else kept
        head_dim = 2 * units if self.rotary else units
        found = []
        for layer in (self.query, self.key):
            heads = layer.out_features // head_dim
            mine = dimensions.repeat_interleave(heads // len(kept), dim=0)
            found.append(SmallerLinear.of_rows(layer, (mine + head_dim * torch.arange(heads)[:, None]).flatten()))
        return found[0], found[1]


def check_finite(where: str, *tensors: torch.Tensor) -> None:
    """Stop at values that are no numbers.

    Raises:
        RankwiseError: there are some; `where` names the block.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise RankwiseError(f"{where}: its weights or its statistics are damaged, they hold values that are no numbers")


def _rows(layer: Any, groups: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight, groups x rows x n, and bias, groups x rows, of a dense layer."""
    weight: torch.Tensor = layer.weight.detach().to(like).unflatten(0, (groups, -1))
    return weight, None if layer.bias is None else layer.bias.detach().to(like).view(groups, -1)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """L with L L' = the positive part of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt()
    return root

"""One whitened decomposition for matrices that share their first factor.

With C the second moment of what they read, summed over their inputs, and S S' = C, the pairs B_i A that minimise
sum_i ||(W_i - B_i A) S||^2 are the truncation of W S, W being the W_i on top of each other, times S^-1, cut into rows.

With an identity block in A: r columns of A are chosen so that, with A_1 these and A_2 the others, no entry of
T = A_1^-1 A_2 exceeds `BOUND`; then B A x = (B A_1) (x_1 + T x_2). Columns are exchanged, one of A_1 for one of A_2,
where T is largest: each such step multiplies |det A_1| by that entry, so they come to an end. Of a matrix of rank r
that is the strong rank-revealing QR decomposition of Gu and Eisenstat (1996), which bounds the same entries. The first
choice is that of Gaussian elimination with pivoting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from lowrank.bases.whitening import cholesky_factor, whitened_factors
from lowrank.config.presets import Covariance
from lowrank.model.factors import IdentityColumnsFactors, LowRankFactors, SharedDownFactors
from lowrank.model.replacements import Deferred, IdentityBlockFactors, Pair
from lowrank.ranks.stacks import Stack

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask

BOUND = 2.0
"""Largest entry of T in size."""


def shared_pairs(
    task: CompressionTask, stacks: Sequence[tuple[Stack, int]], device: torch.device, identity_columns: bool = False
) -> Deferred[Pair]:
    """Decompose stacks of matrices, each when the first of its members is asked for.

    Args:
        task: whose statistics are read.
        stacks: stacks and their ranks.
        device: where to decompose.
        identity_columns: put an identity block into every first factor.

    Raises (when they are asked for):
        RankwiseError: inputs are all zero, a decomposition fails, or a factor has not its full rank; named.
    """
    most = max((len(stack.members) for stack, _ in stacks), default=1)
    moments = lru_cache(maxsize=most)(task.required_statistics().of)

    @lru_cache(maxsize=1)
    def root(layers: tuple[int, ...], site: str) -> torch.Tensor:
        uncentred = Covariance(estimator="uncentred")
        total = sum(moments(layer)[site].estimate(uncentred)[0] for layer in layers)
        assert isinstance(total, torch.Tensor)
        blocks = f"block {layers[0]}" if len(layers) == 1 else f"blocks {layers[0]} to {layers[-1]}"
        return cholesky_factor(total.to(device), f"{blocks}, input '{site}'")

    ranks = {tuple(member.name for member in stack.members): (stack, rank) for stack, rank in stacks}

    def decomposed(names: tuple[str, ...]) -> dict[str, Pair]:
        (stack, rank), pairs = ranks[names], dict[str, Pair]()
        layers = [task.model.get_submodule(member.name) for member in stack.members]
        weight = torch.cat([layer.weight.detach() for layer in layers]).to(device)
        read = tuple(dict.fromkeys(member.layer for member in stack.members))
        where = stack.members[0].name
        factors = whitened_factors(weight, root(read, stack.members[0].type.site), where).factors(rank, None)
        whole = with_identity_columns(factors, where, device) if identity_columns else factors
        ups = torch.split(whole.up, [member.out_features for member in stack.members])
        first = stack.members[0].name
        if isinstance(whole, IdentityColumnsFactors):
            pairs[first] = IdentityColumnsFactors(whole.order, whole.rest, ups[0], layers[0].bias)
        else:
            pairs[first] = LowRankFactors(whole.down, ups[0], layers[0].bias)
        for member, layer, up in list(zip(stack.members, layers, ups, strict=True))[1:]:
            pairs[member.name] = SharedDownFactors(first, up, layer.bias)
        return pairs

    return Deferred.of_groups(((names, names) for names in ranks), decomposed)


def with_identity_columns(
    factors: LowRankFactors, where: str, device: torch.device | str | None = None
) -> IdentityColumnsFactors:
    """The same map, with an identity block in the first factor.

    Args:
        factors: B and A; the result is where they are, and in float32 at least.
        where: the layer's name, for errors.
        device: where to compute, in float64; None: where the factors are.

    Raises:
        RankwiseError: the first factor has not full rank, so no such block exists; the layer is named.
    """
    a, b = (factor.to(device=device, dtype=torch.float64) for factor in (factors.down, factors.up))
    eliminated = IdentityBlockFactors.of(LowRankFactors(b.T, a.T), where)
    others = torch.ones(a.shape[1], dtype=torch.bool, device=a.device)
    others[eliminated.rows.long().to(a.device)] = False
    order = torch.cat([eliminated.rows.long().to(a.device), others.nonzero()[:, 0]])
    order, rest = _exchanged(order, eliminated.rest.T.contiguous())
    like = factors.up.new_empty(0, dtype=torch.promote_types(factors.up.dtype, torch.float32))
    up = b @ a[:, order[: len(a)]]
    return IdentityColumnsFactors(order.int().to(like.device), rest.to(like), up.to(like), factors.bias)


def _exchanged(order: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Other columns, so that no entry of T = A_1^-1 A_2 exceeds `BOUND`.

    Args:
        order: n, the columns of A_1, then those of A_2; int64.
        rest: T, r x (n - r), float64.
    """
    order, rank = order.clone(), len(rest)
    while rest.numel():
        row, column = divmod(int(rest.abs().argmax()), rest.shape[1])
        pivot = rest[row, column].clone()
        if abs(float(pivot)) <= BOUND:
            break
        of_row, of_column = rest[row] / pivot, rest[:, column].clone()
        rest = rest - torch.outer(of_column, of_row)
        rest[row], rest[:, column] = of_row, -of_column / pivot
        rest[row, column] = 1 / pivot
        order[[row, rank + column]] = order[[rank + column, row]]
    return order, rest

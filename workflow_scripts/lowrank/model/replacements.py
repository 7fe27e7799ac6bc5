"""What a method may make of a module: a low-rank pair, a smaller layer, a norm without gain, other heads, shortcuts.

A pair may have an identity block, or the first factor of another layer's pair. A method returns a mapping of module
names to these; whatever it does not name stays as it is. Each knows how to change a model in memory; what the
checkpoint's recipe says is read off the changed model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from lowrank.errors import RankwiseError
from lowrank.model.factors import IdentityColumnsFactors, LowRankFactors, SharedDownFactors
from lowrank.model.modeling_rankwise import (
    GainFreeRMSNorm,
    IdentityBlockLinear,
    ResizedLinear,
    set_heads,
    set_narrow_heads,
    set_shortcuts,
)

_SINGULAR = 1e-12
"""Ratio of pivots below which a factor has not full rank."""


@dataclass(frozen=True)
class IdentityBlockFactors:
    """A pair whose second factor holds an identity: the same map as `LowRankFactors` with r^2 weights less.

    `B A` does not change under `B G^-1, G A`. With G the block of r rows of B, that block becomes the identity and
    needs no storage, only the r indices of its rows.

    Attributes:
        rows: r indices of outputs, increasing, int32.
        down: B[rows] A, r x n, applied first.
        rest: B[others] B[rows]^-1, (m - r) x r.
        bias: m, or None.
    """

    rows: torch.Tensor
    down: torch.Tensor
    rest: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, factors: LowRankFactors, where: str, device: torch.device | str | None = None) -> IdentityBlockFactors:
        """Choose rows by Gaussian elimination with row pivoting, `B = P L U`: the rows that become pivots.

        No entry of L exceeds 1, and `B[others] B[rows]^-1 = L2 L1^-1` has entries of a few units in practice, so that
        nothing is lost in half precision. The scale of B's columns does not matter.

        Args:
            factors: on any device, of any precision; the result is where they are, and in float32 at least.
            where: the layer's name, for errors.
            device: where to compute, in float64; None: where the factors are.

        Raises:
            RankwiseError: the second factor has not full rank, so no such block exists; the layer is named.
        """
        up, rank = factors.up.to(device=device, dtype=torch.float64), factors.rank
        lower, swaps, _ = torch.linalg.lu_factor_ex(up / up.norm(dim=0).clamp_min(torch.finfo(up.dtype).tiny))
        diagonal = lower.diagonal().abs()
        if rank > len(up) or not float(diagonal.min()) > float(diagonal.max()) * _SINGULAR:
            raise RankwiseError(f"{where}: its factor of rank {rank} has not full rank; lower its rank")
        order = torch.arange(len(up))
        for row, other in enumerate((swaps - 1).tolist()):
            order[[row, other]] = order[[other, row]]
        first, others = (part.to(up.device).argsort() for part in (order[:rank], order[rank:]))
        rest = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
        rows = order[:rank].sort().values
        down = up[rows.to(up.device)] @ factors.down.to(up)
        like = factors.up.new_empty(0, dtype=torch.promote_types(factors.up.dtype, torch.float32))
        return cls(rows.int(), down.to(like), rest[others][:, first].to(like), factors.bias)

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def as_module(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The layer that a model runs."""
        n, m = self.down.shape[1], len(self.rest) + self.rank
        with torch.device("meta"):
            layer = IdentityBlockLinear(n, m, self.rank, bias=self.bias is not None)
        layer = layer.to_empty(device=device).to(dtype)
        with torch.no_grad():
            layer.down.weight.copy_(self.down)
            layer.rest.weight.copy_(self.rest)
            layer.rows.copy_(self.rows)
            layer.places()  # now, so that it need not be computed in a forward pass
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.requires_grad_(False)


@dataclass(frozen=True)
class SmallerLinear:
    """A dense layer with other weights: fewer rows, fewer columns, or a bias that it did not have.

    Attributes:
        weight: m' x n'.
        bias: m', or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of_rows(cls, layer: Any, rows: torch.Tensor) -> SmallerLinear:
        """Some rows of a dense layer, with their biases."""
        rows = rows.to(layer.weight.device)
        return cls(layer.weight.detach()[rows], None if layer.bias is None else layer.bias.detach()[rows])

    def stored(self, dtype: torch.dtype) -> SmallerLinear:
        """In main memory, in the model's dtype: those of a whole model in float64 would not fit beside it."""
        return SmallerLinear(self.weight.to("cpu", dtype), None if self.bias is None else self.bias.to("cpu", dtype))

    def as_module(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The layer that a model runs."""
        layer: nn.Module = _linear(ResizedLinear, self.weight, self.bias, dtype, device)
        return layer


@dataclass(frozen=True)
class NormWithoutGain:
    """A root mean square norm whose gain went into the layers behind it.

    Attributes:
        divisor: channels of the full basis, over which the mean is taken.
        eps: as in the norm that it replaces.
    """

    divisor: int
    eps: float

    def as_module(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The norm that a model runs; it has no weights."""
        return GainFreeRMSNorm(self.divisor, self.eps)


@dataclass(frozen=True)
class KeptHeads:
    """How many heads an attention module has left; the widths of its layers are replacements of their own.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads, which divide them.
    """

    heads: int
    kv_heads: int

    def change(self, attention: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Tell the module."""
        set_heads(attention, self.heads, self.kv_heads)


@dataclass(frozen=True)
class NarrowedHeads:
    """Heads of other widths; the widths of the attention module's layers are replacements of their own.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads, which divide them.
        pairs: kv_heads x p, which rotary pairs q and k have left, increasing; None where they have all, or none at all
            (OPT).
    """

    heads: int
    kv_heads: int
    pairs: torch.Tensor | None = None

    def change(self, attention: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Tell the module."""
        set_narrow_heads(attention, self.heads, self.kv_heads, None if self.pairs is None else self.pairs.shape[1])
        if self.pairs is not None:
            attention.register_buffer("pairs", self.pairs.to(device, torch.int32))


@dataclass(frozen=True)
class ResidualShortcuts:
    """The changes of basis of a block's two residual connections, as `Linear` weights (out x in).

    Attributes:
        attention: from the basis in which the block is entered to that of its MLP.
        mlp: from there to the basis in which it is left.
    """

    attention: torch.Tensor
    mlp: torch.Tensor

    def change(self, block: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Put the shortcuts into the block."""
        set_shortcuts(
            block, *(_linear(nn.Linear, weight, None, dtype, device) for weight in (self.attention, self.mlp))
        )


ChangedModule = KeptHeads | NarrowedHeads | ResidualShortcuts
"""What changes a module and leaves it in its place."""
Pair = LowRankFactors | IdentityBlockFactors | IdentityColumnsFactors | SharedDownFactors
"""What has a rank."""
Replacement = Pair | SmallerLinear | NormWithoutGain | ChangedModule
Replacements = Mapping[str, Replacement]
Kind = TypeVar("Kind", bound=Replacement)
Group = TypeVar("Group", bound=Hashable)


class Deferred(Mapping[str, Kind]):
    """Replacements that are made when they are asked for, each time anew.

    So that a large model's new layers are never all there beside its old ones: what is put into the model takes the
    place of what it was made of.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Kind]) -> None:
        self._make = dict.fromkeys(names, make)

    def __getitem__(self, name: str) -> Kind:
        return self._make[name](name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)

    @classmethod
    def of_groups(
        cls, groups: Iterable[tuple[Group, Iterable[str]]], make: Callable[[Group], Mapping[str, Kind]]
    ) -> Deferred[Kind]:
        """Replacements that are made together, when the first of a group is asked for, from what is in the model then.

        The last group is held: when its second is asked for, what it would be made of has been replaced. So all of one
        are to be asked for before the next.

        Args:
            groups: what tells a group, and the names in it.
            make: all of a group.
        """
        made = lru_cache(maxsize=1)(make)
        group_of = {name: group for group, names in groups for name in names}
        return cls(group_of, lambda name: made(group_of[name])[name])


def _linear(
    kind: type[nn.Linear],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Any:
    """A frozen layer of some class around given weights."""
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype, device=device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)

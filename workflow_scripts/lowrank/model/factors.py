"""A linear layer as two thin factors: plain, with an identity block in the first, or the first of another layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowrank.model.modeling_rankwise import (
    IdentityBlockLinear,
    IdentityColumns,
    IdentityColumnsLinear,
    LowRankLinear,
    SharedDownLinear,
)

_PARTS = ("down", "up", "bias")


@dataclass(frozen=True)
class LowRankFactors:
    """`W x + b` replaced by `up (down x) + bias`.

    Attributes:
        down: A, r x n, applied first.
        up: B, m x r.
        bias: m, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def as_module(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LowRankLinear:
        """The layer that a model runs."""
        m, n = self.up.shape[0], self.down.shape[1]
        with torch.device("meta"):
            layer = LowRankLinear(n, m, self.rank, bias=self.bias is not None)
        layer = layer.to_empty(device=device).to(dtype)
        with torch.no_grad():
            layer.get_parameter("down.weight").copy_(self.down)
        return _with_up(layer, self)


def tensors_of(pairs: Mapping[str, LowRankFactors]) -> dict[str, torch.Tensor]:
    """Pairs as named tensors, for a file."""
    tensors = {f"{name}:{part}": getattr(pair, part) for name, pair in pairs.items() for part in _PARTS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def pairs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, LowRankFactors]:
    """The inverse."""
    names = dict.fromkeys(key.rpartition(":")[0] for key in tensors)
    return {name: LowRankFactors(*(tensors.get(f"{name}:{part}") for part in _PARTS)) for name in names}  # type: ignore[arg-type]


@dataclass(frozen=True)
class IdentityColumnsFactors:
    """A pair whose first factor holds an identity: `y = up (x_1 + rest x_2) + bias`, r^2 weights less, n indices more.

    Attributes:
        order: a permutation of the n inputs, int32; its first r are x_1, the others x_2.
        rest: r x (n - r).
        up: m x r.
        bias: m, or None.
    """

    order: torch.Tensor
    rest: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[1]

    def as_module(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LowRankLinear:
        """The layer that a model runs."""
        with torch.device("meta"):
            layer = IdentityColumnsLinear(len(self.order), len(self.up), self.rank, bias=self.bias is not None)
        layer = layer.to_empty(device=device).to(dtype)
        with torch.no_grad():
            layer.get_parameter("down.rest.weight").copy_(self.rest)
            layer.get_buffer("down.order").copy_(self.order)
        return _with_up(layer, self)


@dataclass(frozen=True)
class SharedDownFactors:
    """A pair whose first factor is that of another layer, where alone it is stored and counted.

    Attributes:
        shares: full name of that layer, whose own factors are a replacement beside this one.
        up: m x r.
        bias: m, or None.
    """

    shares: str
    up: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[1]

    def as_module(self, owner: LowRankLinear, dtype: torch.dtype, device: torch.device | str = "cpu") -> LowRankLinear:
        """The layer that a model runs, beside the one that it shares with."""
        m, bias = len(self.up), self.bias is not None
        with torch.device("meta"):
            layer = SharedDownLinear(owner.in_features, m, self.rank, bias, self.shares, owner)
        return _with_up(layer.to_empty(device=device).to(dtype), self)


def _with_up(
    layer: LowRankLinear, factors: LowRankFactors | IdentityColumnsFactors | SharedDownFactors
) -> LowRankLinear:
    """A layer with the second factor and the bias of a pair, frozen."""
    with torch.no_grad():
        layer.up.weight.copy_(factors.up)
        if factors.bias is not None:
            layer.up.bias.copy_(factors.bias)
    return layer.requires_grad_(False)


def factor_paths(layer: LowRankLinear | IdentityBlockLinear) -> dict[str, str]:
    """Factor of a pair -> path of its linear module; a shared first one belongs to the layer that stores it."""
    if isinstance(layer, IdentityBlockLinear):
        return {"down": "down", "up": "rest"}
    if isinstance(layer, SharedDownLinear):
        return {"up": "up"}
    return {"down": "down.rest" if isinstance(layer.down, IdentityColumns) else "down", "up": "up"}

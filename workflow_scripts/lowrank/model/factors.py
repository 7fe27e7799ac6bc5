"""A linear layer as two thin factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.model.modeling_rankwise import LowRankLinear


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
            layer.down.weight.copy_(self.down)
            layer.up.weight.copy_(self.up)
            if self.bias is not None:
                layer.up.bias.copy_(self.bias)
        return layer.requires_grad_(False)

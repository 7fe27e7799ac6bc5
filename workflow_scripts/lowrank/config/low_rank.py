"""What the presets of all methods that make low-rank pairs may name."""

from __future__ import annotations

from pydantic import Field

from lowrank.config.presets import MethodSettings


class LowRankSettings(MethodSettings):
    """A method whose `compress` returns pairs; what it chooses here is done to them by `compression.compress_model`.

    Attributes:
        identity_block: store every pair with an identity block in its second factor, which frees r^2 weights less r
            indices. The method's budget counts so, hence its ranks are larger at the same ratio.
    """

    identity_block: bool = Field(
        default=False, description="store pairs with an identity block: the same map, and more rank a parameter"
    )

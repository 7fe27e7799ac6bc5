"""How wide the parts of a block are: neurons, dimensions of q and k, dimensions of v and o; from shapes alone.

A part is `mlp` (neurons: rows of gate and up, columns of down), `qk` (the same number of dimensions in all query and
key heads of a block) or `vo` (rows of v and columns of o, likewise). Where q and k are rotated, dimensions go in pairs,
and which are left is stored: an index a pair and key head, which counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES, Dimensions
from lowrank.ranks.budget import Budget

PARTS = ("mlp", "qk", "vo")


@dataclass(frozen=True)
class Widths:
    """The widths of one block.

    Attributes:
        mlp: neurons.
        qk: dimensions of each query and key head.
        vo: dimensions of each value head.
    """

    mlp: int
    qk: int
    vo: int

    @classmethod
    def dense(cls, shape: Dimensions) -> Widths:
        """Of a block as it was."""
        return cls(shape.intermediate, shape.head_dim, shape.head_dim)

    def parameters(self, budget: Budget) -> int:
        """Parameters of a block's linear layers, indices counted; no bias is added."""
        shape = budget.dimensions
        family, total = FAMILIES[shape.family], 0
        inner = {"q": self.qk, "k": self.qk, "v": self.vo, "o": self.vo}
        for linear in family.types:
            width = inner.get(linear.name, 0)
            sizes = {
                "hidden": shape.hidden,
                "intermediate": self.mlp,
                "query": shape.heads * width,
                "key_value": shape.kv_heads * width,
            }
            total += sizes[linear.output] * sizes[linear.input]
        stored = bool(family.rotary) and self.qk < shape.head_dim
        return total + (shape.kv_heads * self.qk // 2 if stored else 0)


@dataclass(frozen=True)
class Steps:
    """Which widths a block may have.

    Attributes:
        budget: of the model.
        parts: those that may be narrower; the others stay.
        multiple: widths are multiples of it, or all that there was.
    """

    budget: Budget
    parts: tuple[str, ...]
    multiple: int

    def full(self, part: str) -> int:
        """A part's width in the dense model."""
        width: int = getattr(Widths.dense(self.budget.dimensions), part)
        return width

    def step(self, part: str) -> int:
        """By how much a part's width changes at least."""
        pairs = part == "qk" and bool(FAMILIES[self.budget.dimensions.family].rotary)
        return 2 * self.multiple if pairs and self.multiple % 2 else self.multiple

    def nearest(self, lost: float) -> Widths:
        """A block that loses a share of each of its parts: the nearest widths, of neurons the nearest below."""
        widths = {}
        for part in self.parts:
            full, step = self.full(part), self.step(part)
            target = (1 - lost) * full
            below = step * max(1, int(target / step + 1e-9))
            above = min(full, below + step)
            rounds_down = part == "mlp" or target - below < above - target
            widths[part] = full if lost <= 0 else below if rounds_down else above
        return replace(Widths.dense(self.budget.dimensions), **widths)

    def blocks(self, weights: Sequence[float], most: float, ratio: int) -> list[Widths]:
        """The widths of all blocks when each loses a share in proportion to its weight.

        The shares are `min(most, c weight)` with the smallest c that meets the budget. What rounding leaves of it goes
        back to neurons, a step at a time, where most are missing.

        Args:
            weights: one a block, not negative.
            most: largest share that a block may lose.
            ratio: percent of the linear layers' parameters to remove.

        Raises:
            RankwiseError: out of reach.
        """
        allowed = self.budget.allowed(ratio)
        self.require_reach(most, ratio)

        def at(scale: float) -> list[Widths]:
            return [self.nearest(min(most, scale * weight)) for weight in weights]

        def fits(scale: float) -> bool:
            return sum(widths.parameters(self.budget) for widths in at(scale)) <= allowed

        low, high = 0.0, 1.0
        while not fits(high):
            high *= 2
        while low < (middle := (low + high) / 2) < high:
            low, high = (low, middle) if fits(middle) else (middle, high)
        wanted = [(1 - min(most, high * weight)) * self.budget.dimensions.intermediate for weight in weights]
        return self._given_back(at(high), wanted, allowed) if "mlp" in self.parts else at(high)

    def require_reach(self, most: float, ratio: int) -> None:
        """See that a budget can be met.

        Raises:
            RankwiseError: it cannot, even if every block loses `most` of its parts.
        """
        least = self.budget.dimensions.layers * self.nearest(most).parameters(self.budget)
        if least > self.budget.allowed(ratio):
            raise RankwiseError(
                f"removing {ratio} % is out of reach: blocks that lose {100 * most:.3g} % of {', '.join(self.parts)} "
                f"leave {100 * least / self.budget.dense_parameters:.1f} %; remove less, or let them lose more"
            )

    def _given_back(self, blocks: list[Widths], wanted: Sequence[float], allowed: float) -> list[Widths]:
        full, step = self.budget.dimensions.intermediate, self.step("mlp")
        left = allowed - sum(widths.parameters(self.budget) for widths in blocks)

        def missing(index: int) -> float:
            return wanted[index] - blocks[index].mlp if blocks[index].mlp < full else float("-inf")

        while True:
            index = max(range(len(blocks)), key=missing)
            wider = replace(blocks[index], mlp=min(full, blocks[index].mlp + step))
            extra = wider.parameters(self.budget) - blocks[index].parameters(self.budget)
            if extra == 0 or extra > left:
                return blocks
            blocks[index], left = wider, left - extra

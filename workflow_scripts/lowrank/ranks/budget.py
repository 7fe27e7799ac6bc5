"""Parameter accounting: what a rank costs, which rank a kept ratio buys, and what an allocation adds up to.

A pair of rank r of an m x n matrix holds r (m + n) weights; with an identity block in one factor, r^2 weights less and
r indices more. Where the method adds a bias to a layer that had none, there are m more. The budget is a share of the
weights of the decoder's linear layers, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES, Dimensions, LinearModule, has_native_bias, linear_modules

ALIGNMENT = 8
"""Ranks are multiples of this (paper, Section 4.1), which matrix kernels like."""

Ranks = dict[str, int | None]
"""Module name -> rank, or None for a dense layer."""


def share_of(parameters: int, ratio: int) -> float:
    """What stays of so many parameters when `ratio` percent are removed.

    Divided last, it is exact wherever it is a whole number, so that what fits exactly fits: in floats
    (1 - 90 / 100) 25,600 is less than 2,560.
    """
    return (100 - ratio) * parameters / 100


def break_even_rank(m: int, n: int) -> float:
    """The rank m n / (m + n) at which a pair is as large as the dense m x n matrix."""
    return m * n / (m + n)


def largest_rank(m: int, n: int) -> int:
    """The largest rank at which a pair is smaller than the dense matrix."""
    return math.ceil(break_even_rank(m, n)) - 1


def rank_for(kept: float, m: int, n: int) -> int | None:
    """The rank that keeps a share of a matrix's parameters, or None where the layer is better left dense.

    Nearest multiple of `ALIGNMENT` below, as the paper's authors compute it: 8 floor(ceil(kept r*) / 8), at least 8.
    A pair that saves nothing means dense: also where 8 is too much, as for narrow keys and values, and where the
    bias of the pair takes what its rank saves (13824 x 5120, in LLaMA-2-13B, breaks even at 3736.2: not at 3736).
    """
    if kept >= 1:
        return None
    rank = ALIGNMENT * (math.ceil(kept * break_even_rank(m, n) - 1e-9) // ALIGNMENT)
    rank = max(ALIGNMENT, rank)
    return rank if rank * (m + n) + m < m * n else None


@dataclass(frozen=True)
class Budget:
    """The decoder's linear layers of one model and the arithmetic of what they keep.

    Attributes:
        dimensions: the model's shape.
        modules: its linear layers, in order.
        adds_bias: whether the low-rank form has a bias where the dense layer had none.
        identity_block: whether one factor holds an r x r identity, which takes r indices and no weights.
        left_dense: names of layers that stay dense whatever is asked for: of experts with too few tokens. The others
            pay for them.
    """

    dimensions: Dimensions
    modules: tuple[LinearModule, ...]
    adds_bias: bool = True
    identity_block: bool = False
    left_dense: frozenset[str] = frozenset()

    @classmethod
    def of(cls, dimensions: Dimensions) -> Budget:
        """The budget of a model from its shape alone."""
        return cls(dimensions, tuple(linear_modules(dimensions)))

    @cached_property
    def dense_parameters(self) -> int:
        """Weights of all linear layers of the dense decoder."""
        return sum(module.parameters for module in self.modules)

    def cost(self, module: LinearModule, rank: int | None) -> int:
        """Parameters of one layer at a rank; a bias counts only if the low-rank form adds it."""
        if rank is None:
            return module.parameters
        adds = self.adds_bias and not has_native_bias(self.dimensions, module)
        added_bias = module.out_features if adds else 0
        saved = rank * (rank - 1) if self.identity_block else 0
        return rank * (module.out_features + module.in_features) - saved + added_bias

    def rank_of_share(self, module: LinearModule, kept: float) -> float:
        """The rank, not rounded, at which a pair without its bias holds that share of the dense layer's parameters."""
        m, n = module.out_features, module.in_features
        if not self.identity_block:
            return kept * break_even_rank(m, n)
        half = (m + n + 1) / 2  # r (m + n) - r (r - 1) = kept m n
        return half - math.sqrt(half**2 - kept * m * n)

    def parameters(self, ranks: Mapping[str, int | None]) -> int:
        """Parameters of all linear layers; modules that are not named are dense."""
        return sum(self.cost(module, ranks.get(module.name)) for module in self.modules)

    def kept(self, ranks: Mapping[str, int | None]) -> float:
        """Share of the dense linear layers' weights that an allocation keeps."""
        return self.parameters(ranks) / self.dense_parameters

    def allowed(self, ratio: int) -> float:
        """How many parameters may stay when `ratio` percent are removed, see `share_of`."""
        return share_of(self.dense_parameters, ratio)

    def types(self, names: Iterable[str]) -> list[str]:
        """Check type names of the model's family.

        Raises:
            RankwiseError: an unknown name.
        """
        known = [linear.name for linear in FAMILIES[self.dimensions.family].types]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise RankwiseError(
                f"family '{self.dimensions.family}' has no linear layers of type {', '.join(unknown)}; "
                f"it has {', '.join(known)}"
            )
        return list(names)

    def free(self, uncompressed: Iterable[str]) -> list[LinearModule]:
        """The layers that may be compressed, when some types stay dense.

        Raises:
            RankwiseError: an unknown type.
        """
        dense = self.types(uncompressed)
        return [m for m in self.modules if m.type.name not in dense and m.name not in self.left_dense]

    @property
    def left_dense_why(self) -> str:
        """For messages: how much stays dense for want of tokens, and what to do; empty where nothing does."""
        count = len(self.left_dense)
        return (
            f" {count} of {len(self.modules)} matrices stay dense, of experts that got too few calibration tokens: "
            "more `windows`, or a smaller `expert_tokens` of the calibration, frees them."
            if count
            else ""
        )

    def __post_init__(self) -> None:
        if not self.modules:
            raise RankwiseError(f"family '{self.dimensions.family}': no linear layers")


def uniform_kept(budget: Budget, ratio: int, uncompressed: Sequence[str]) -> dict[str, float]:
    """One kept ratio for all types but those that stay dense, which it pays for; biases that are added are not counted.

    Raises:
        RankwiseError: an unknown type, or what stays dense leaves nothing to the others.
    """
    dense = set(budget.types(uncompressed))
    free = sum(module.parameters for module in budget.free(uncompressed))
    kept = 1 - ratio / 100 * budget.dense_parameters / free if free else 0.0
    if kept <= 0:
        raise RankwiseError(
            f"removing {ratio} % is out of reach: with {', '.join(uncompressed)} dense nothing would be left of the "
            f"others; compress more types, or remove less.{budget.left_dense_why}"
        )
    return {module.type.name: 1.0 if module.type.name in dense else kept for module in budget.modules}


def authors_ranks(budget: Budget, kept: Mapping[str, float]) -> Ranks:
    """The ranks of kept ratios by type as the paper's authors compute them, see `rank_for`."""
    return {
        m.name: None if m.name in budget.left_dense else rank_for(kept[m.type.name], m.out_features, m.in_features)
        for m in budget.modules
    }


def lord_kept(budget: Budget, ratio: int) -> dict[str, float]:
    """LoRD's kept ratios by type: v dense, paid for by q and k, the same for all others.

    Where experts are left dense, the others pay for them, type by type.

    Raises:
        RankwiseError: q and k are too small to pay for v at this ratio.
    """
    removed = ratio / 100
    size = {name: sum(m.parameters for m in budget.modules if m.type.name == name) for name in ("q", "k", "v")}
    attention = 1 - removed * (1 + size["v"] / (size["q"] + size["k"]))
    if attention <= 0:
        raise RankwiseError(f"LoRD cannot remove {ratio} %: q and k would have to shrink to nothing to keep v dense")
    sizes, free = _sizes_by_type(budget.modules), _sizes_by_type(budget.free(()))
    if short := [name for name, size in sizes.items() if removed * size >= free.get(name, 0)]:
        raise RankwiseError(f"LoRD cannot remove {ratio} % of {', '.join(short)}: too few experts got enough tokens")
    others = {name: 1 - removed * (size / free[name]) for name, size in sizes.items()}
    return others | {"q": attention, "k": attention, "v": 1.0}


def _sizes_by_type(modules: Iterable[LinearModule]) -> dict[str, int]:
    """Type -> weights of all its layers."""
    sizes: dict[str, int] = {}
    for module in modules:
        sizes[module.type.name] = sizes.get(module.type.name, 0) + module.parameters
    return sizes

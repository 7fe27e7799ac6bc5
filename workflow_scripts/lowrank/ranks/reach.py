"""What a budget leaves within reach: the arithmetic that the config check and the search space share.

All blocks of a model have the same shapes, so one of them stands for all, unless experts of some are left dense.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from lowrank.model.families import LinearModule
from lowrank.ranks.budget import ALIGNMENT, Budget, share_of

_CLOSE = 1e-9
"""Shares closer than this are equal: a range of one point is no range to search."""

Limits = Mapping[str, tuple[float, float]]
"""Tied type -> smallest and largest kept ratio."""


def largest_rank_worth_it(budget: Budget, module: LinearModule) -> int:
    """The largest rank at which a pair, with the bias that it adds, is smaller than the dense matrix; may be 0."""
    ranks = range(min(module.out_features, module.in_features) + 1)
    return max(0, bisect_left(ranks, module.parameters, key=partial(budget.cost, module)) - 1)


def smallest_choice(budget: Budget, module: LinearModule) -> int | None:
    """The cheapest that a matrix can get: rank 8, or the largest below it that is worth it, or dense if none is."""
    return min(ALIGNMENT, largest_rank_worth_it(budget, module)) or None


def candidate_ranks(budget: Budget, kept: Sequence[float], uncompressed: Sequence[str]) -> dict[str, list[int]]:
    """Layer -> the ranks at which it is tried, ascending: shares of its break-even rank, down to multiples of 8.

    Shares that round to one rank are one trial. A layer so narrow that rank 8 saves nothing is tried at the largest
    rank that does; layers that no rank makes smaller are not tried.

    Args:
        budget: of the model.
        kept: shares of a layer's parameters, below 1.
        uncompressed: types that stay dense.

    Raises:
        RankwiseError: an unknown type.
    """
    budget.types(uncompressed)
    ranks: dict[str, list[int]] = {}
    for module in budget.modules:
        largest = largest_rank_worth_it(budget, module)
        if module.type.name in uncompressed or module.name in budget.left_dense or not largest:
            continue
        shares = [budget.rank_of_share(module, share) for share in kept]
        wanted = [max(ALIGNMENT, ALIGNMENT * int((rank + 1e-9) // ALIGNMENT)) for rank in shares]
        ranks[module.name] = sorted({min(rank, largest) for rank in wanted})
    return ranks


def tied_types(modules: Iterable[LinearModule]) -> list[str]:
    """Names of the search variables of some modules, in the order of the forward pass."""
    return list(dict.fromkeys(module.type.tied for module in modules))


def limits_of(
    modules: Iterable[LinearModule], lower: float, upper: float, bounds: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Tied type -> its own bounds, or those of all."""
    return {name: bounds.get(name, (lower, upper)) for name in tied_types(modules)}


def why_out_of_reach(
    budget: Budget,
    ratio: int,
    uncompressed: Sequence[str],
    lower: float,
    upper: float = 1.0,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    band: float | None = None,
) -> str | None:
    """Why no allocation removes this share, or None if there is one.

    Args:
        budget: of the model.
        ratio: percent of the decoder's linear weights to remove.
        uncompressed: types that stay dense.
        lower, upper: smallest and largest kept ratio of a compressed matrix.
        bounds: tied type -> bounds of its own.
        band: by how much the kept share may fall short of the budget.
    """
    block = [module for module in budget.modules if module.layer == 0 or budget.left_dense]
    free = [m for m in block if m.type.name not in uncompressed and m.name not in budget.left_dense]
    dense = sum(module.parameters for module in block)
    fixed = dense - sum(module.parameters for module in free)
    biases = sum(budget.cost(module, 0) for module in free)
    allowed = share_of(dense, ratio)
    limits = limits_of(free, lower, upper, bounds or {})
    least, most = (
        (fixed + biases + sum(limits[module.type.tied][side] * module.parameters for module in free)) / dense
        for side in (0, 1)
    )
    kept = ", ".join(uncompressed) or "nothing"
    if least >= allowed / dense - _CLOSE:
        bound = f" and {_bound('at least', lower, bounds)}" if lower or bounds else ""
        cure = f"lower {_keys('lower', bounds)}, " if lower or bounds else ""
        return (
            f"removing {ratio} % is out of reach: with {kept} dense{bound}, {100 * least:.1f} % stays; "
            f"{cure}compress more types, or remove less{'.' * bool(budget.left_dense)}{budget.left_dense_why}"
        )
    if most <= allowed / dense - (band or 0.0) + _CLOSE:
        return (
            f"removing only {ratio} % is out of reach: with {kept} dense and {_bound('at most', upper, bounds)}, no "
            f"more than {100 * most:.1f} % can stay; raise {_keys('upper', bounds)}, "
            f"{'set a' if band is None else 'widen the'} `band`, or remove more"
        )
    if sum(budget.cost(module, smallest_choice(budget, module)) for module in free) > allowed - fixed:
        return f"removing {ratio} % is out of reach: even ranks of {ALIGNMENT} exceed the budget; remove less"
    return None


def _bound(words: str, value: float, bounds: Limits | None) -> str:
    """`at least 20 % of every other matrix`, with a word on bounds of single types."""
    return f"{words} {100 * value:g} % of every other matrix" + (" (or what `bounds` says)" if bounds else "")


def _keys(key: str, bounds: Limits | None) -> str:
    return f"`{key}` or `bounds`" if bounds else f"`{key}`"

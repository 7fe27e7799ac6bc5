"""What a model costs by its shape and the ranks of its layers alone: no weights, no torch.

The conventions are those of `lowrank.evaluation.cost`; here the model need not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowrank.errors import RankwiseError
from lowrank.model.families import (
    Dimensions,
    LinearModule,
    LinearType,
    bias_parameters,
    expert_share,
    linear_modules,
    norm_parameters,
    router_parameters,
)
from lowrank.ranks.budget import Budget, Ranks, break_even_rank, largest_rank

ATTENTION_SITES = ("attention", "attention_output")
"""What q, k, v and o read."""


class Sizes(Dimensions, Protocol):
    """The numbers of a model's configuration that decide all of its parameters."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def tied_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class Counts:
    """What an allocation of ranks comes to.

    Attributes:
        parameters: of the whole model; biases that a low-rank form may add are not counted, as in the paper.
        kept: share of the dense decoder's linear weights.
        macs: multiply-accumulates of one pass.
        macs_attention_dense: the same, were q, k, v and o dense and the rest as it is.
    """

    parameters: int
    kept: float
    macs: int
    macs_attention_dense: int


def count(shape: Sizes, ranks: Mapping[str, int | None], tokens: int) -> Counts:
    """Count a model's parameters and multiply-accumulates.

    Args:
        shape: of the model.
        ranks: module -> rank; None, or not named: dense.
        tokens: of the pass.

    Raises:
        RankwiseError: a family whose size the shape does not decide, or a rank at which a pair is not smaller.
    """
    budget = Budget(shape, tuple(linear_modules(shape)), adds_bias=False)
    for module in budget.modules:
        rank, most = ranks.get(module.name), largest_rank(module.out_features, module.in_features)
        if rank is not None and not 1 <= rank <= most:
            raise RankwiseError(
                f"rank {rank} of {module.name} ({module.out_features} x {module.in_features}): a pair is smaller than "
                f"the matrix at ranks 1 to {most} only"
            )
    attention_dense = {m.name: None if m.type.site in ATTENTION_SITES else ranks.get(m.name) for m in budget.modules}
    linears = budget.parameters(ranks)
    return Counts(
        parameters=linears + other_parameters(shape),
        kept=budget.kept(ranks),
        macs=_macs(shape, _passed(budget, ranks), tokens),
        macs_attention_dense=_macs(shape, _passed(budget, attention_dense), tokens),
    )


def other_parameters(shape: Sizes) -> int:
    """Parameters outside the decoder's linear weights: embeddings, head, norms, native biases, routers of experts.

    Raises:
        RankwiseError: an OPT, whose position embeddings are as many as its longest context, which no shape holds.
    """
    if shape.family == "opt":
        raise RankwiseError("the shape of an OPT does not say how many position embeddings it has")
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied_embeddings else 2)
    return embeddings + norm_parameters(shape) + bias_parameters(shape) + router_parameters(shape)


def module_ranks(printed: Sequence[Mapping[str, float | None]], shape: Sizes, units: Sizes | None = None) -> Ranks:
    """The rank of every linear layer, from ranks that are printed by type and group of layers.

    Args:
        printed: one dict a group of consecutive layers, in order: type (or `qk`, for types that share a rank) -> rank,
            None where dense; other types are dense. `group` is passed over.
        shape: of the model.
        units: the shape in whose units the ranks are printed. A rank means the same share of the break-even rank in
            both models: it is multiplied by the ratio of the break-even ranks, to the nearest whole number.

    Raises:
        RankwiseError: a type that the model does not have, or more groups than layers.
    """
    modules = list(linear_modules(shape))
    if len(printed) > shape.layers:
        raise RankwiseError(f"{len(printed)} groups of ranks for a model of {shape.layers} layers")
    known = {"group"} | {name for module in modules for name in (module.type.name, module.type.tied)}
    if unknown := [name for name in printed[0] if name not in known]:
        raise RankwiseError(f"ranks of '{unknown[0]}', a type that family '{shape.family}' does not have")
    parts = np.array_split(np.arange(shape.layers), len(printed))
    groups = {int(layer): group for part, group in zip(parts, printed, strict=True) for layer in part}
    factors = _unit_factors(modules, units)
    ranks: Ranks = {}
    for module in modules:
        rank = _printed_rank(groups[module.layer], module.type)
        ranks[module.name] = None if rank is None else round(rank * factors[module.type.name])
    return ranks


def _printed_rank(group: Mapping[str, float | None], linear: LinearType) -> float | None:
    return group.get(linear.name, group.get(linear.tied))


def _unit_factors(modules: Sequence[LinearModule], units: Sizes | None) -> dict[str, float]:
    """Type -> break-even rank of the model over that of the model whose units the ranks are in."""
    if units is None:
        return dict.fromkeys([module.type.name for module in modules], 1.0)
    others = {m.type.name: break_even_rank(m.out_features, m.in_features) for m in linear_modules(units)}
    if missing := {module.type.name for module in modules} - set(others):
        raise RankwiseError(
            f"family '{units.family}', in whose units the ranks are, has no {', '.join(sorted(missing))}"
        )
    return {m.type.name: break_even_rank(m.out_features, m.in_features) / others[m.type.name] for m in modules}


def _passed(budget: Budget, ranks: Mapping[str, int | None]) -> int:
    """Weights that a token passes: all, but of the experts those that it is routed to; and the router."""
    experts = sum(budget.cost(m, ranks.get(m.name)) for m in budget.modules if m.type.expert is not None)
    alone = budget.parameters(ranks) - experts
    return alone + router_parameters(budget.dimensions) + expert_share(experts, budget.dimensions)


def _macs(shape: Sizes, linears: int, tokens: int) -> int:
    attention = shape.layers * 2 * tokens**2 * shape.heads * shape.head_dim
    return tokens * linears + attention + tokens * shape.vocabulary * shape.hidden

"""Which tokens the experts of a block got, and which experts got too few to be compressed by what they read.

A covariance of fewer tokens than features has directions in which nothing was seen, and a decomposition would throw
them away for no reason. So an expert with few tokens stays dense, in all of its matrices, and is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.files import peek_tensors
from lowrank.model.families import Family, family_for
from lowrank.ranks.budget import Budget

TOKENS, LEFT_DENSE = "experts.tokens", "experts.left_dense"
"""In a block's files of statistics and bases, int64: how many tokens each expert got; of which the file holds nothing.
Files of models without experts have neither."""


@contextmanager
def watched(block: nn.Module, family: Family) -> Iterator[list[torch.Tensor]]:
    """A list whose last entry, in a forward pass, is the experts of each token: tokens x k; empty without experts."""
    seen: list[torch.Tensor] = []
    if not family.experts:
        yield seen
        return

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[1]]

    handle = block.get_submodule(family.experts).register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def tokens_of(expert: int, routed: torch.Tensor) -> torch.Tensor:
    """Indices of the tokens that an expert got, in the order in which it reads them.

    Args:
        expert: its index.
        routed: tokens x k, the experts of each token.
    """
    mine = routed.eq(expert)
    found: torch.Tensor = mine.any(dim=1).nonzero().squeeze(1)
    return found


def least_tokens(stated: int | None, widths: Sequence[int]) -> int:
    """Tokens below which an expert stays dense: as stated, else as many as the widest of its inputs has features."""
    return max(widths) if stated is None else stated


def left_dense_of(tensors: Mapping[str, torch.Tensor]) -> set[int]:
    """The experts of which a block's file holds nothing."""
    return set(tensors[LEFT_DENSE].tolist()) if LEFT_DENSE in tensors else set()


def about_experts(file: Path, family: Family) -> dict[str, torch.Tensor]:
    """What a block's file of statistics says of its experts, for the file of the bases that are made of it."""
    return peek_tensors(file, (TOKENS, LEFT_DENSE)) if family.experts else {}


def experts_left_dense(files: Sequence[Path], budget: Budget) -> dict[str, int]:
    """The experts that got too few tokens, by the statistics or bases of a model.

    Args:
        files: one a block.
        budget: of the model.

    Returns:
        Module path of the expert -> tokens that it got.
    """
    family, found = family_for(budget.dimensions), {}
    for layer, file in enumerate(files if family.experts else ()):
        tensors = about_experts(file, family)
        for expert in sorted(left_dense_of(tensors)):
            found[f"{family.blocks}.{layer}.{family.experts}.{expert}"] = int(tensors[TOKENS][expert])
    return found


def with_dense(budget: Budget, experts: Iterable[str]) -> Budget:
    """A budget in which the layers of some experts stay dense, whatever a method would do; they count as before."""
    paths = set(experts)
    dense = [module.name for module in budget.modules if module.name.rpartition(".")[0] in paths]
    return replace(budget, left_dense=frozenset(dense))

"""A trial of the search against a dense forward pass of the same tokens, without head or loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch

from lowrank.bases.principal import PrincipalBasis
from lowrank.model.losses import last_hidden
from lowrank.ranks.budget import Budget, largest_rank
from lowrank.search.objective import TOKENS_PER_BATCH, Objective
from lowrank.search.sliced_model import SlicedModel
from tests.benchmarks.measuring import (
    Row,
    Setting,
    in_turns,
    random_basis,
    random_model,
    random_windows,
    ratios,
    row_of,
    whole_rank,
)

KEPT = 0.8
DENSE, NOTHING = "dense", "a trial with everything dense"
TRIAL, WITHOUT = (f"a trial, {1 - KEPT:.0%} removed{how}" for how in ("", ", without divergence"))


class RandomBases:
    """One basis a type, for all blocks: what is in it takes no other time."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    @cached_property
    def _by_type(self) -> Mapping[str, PrincipalBasis]:
        shapes = {module.type.name: (module.out_features, module.in_features) for module in self.budget.modules}
        return {name: random_basis(m, n, largest_rank(m, n)) for name, (m, n) in shapes.items()}

    def of(self, layer: int, type_name: str, weight: torch.Tensor) -> PrincipalBasis:
        """The basis of a type."""
        return self._by_type[type_name]


def rows(setting: Setting) -> list[Row]:
    """For each dtype a trial with its divergence, without it, and with every layer dense."""
    return [row for dtype in setting.dtypes for row in _of_dtype(setting, dtype)]


def _of_dtype(setting: Setting, dtype: str) -> list[Row]:
    size, device = setting.size, torch.device(setting.device)
    windows = random_windows(size)
    budget = replace(Budget.of(size.shape), adds_bias=False)
    sliced = SlicedModel(random_model(size, dtype, setting.device), budget, RandomBases(budget))  # type: ignore[arg-type]
    ranks = {m.name: whole_rank(KEPT, m.out_features, m.in_features) for m in budget.modules}
    judged, plain = (Objective(sliced, windows, weight, device) for weight in (1.0, 0.0))
    batches = [ids.to(device) for ids in windows.split(max(1, TOKENS_PER_BATCH // size.length))]

    @torch.inference_mode()
    def forward() -> None:
        sliced.set_ranks({})
        for ids in batches:
            last_hidden(sliced.model, ids)

    ways = {
        DENSE: forward,
        TRIAL: lambda: judged.evaluate(ranks),
        WITHOUT: lambda: plain.evaluate(ranks),
        NOTHING: lambda: judged.evaluate({}),
    }
    times = in_turns(ways, size.turns, setting.device)
    found = []
    for name, target in ((TRIAL, 1.0), (WITHOUT, 1.0), (NOTHING, None)):
        what = f"search, {name} / forward pass"
        found.append(row_of(what, ratios(times, name, DENSE), dtype, target=target))
    return found

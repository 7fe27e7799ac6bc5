"""Numbers that were worked out by hand or published: ranks and sizes of the paper's models, and exact identities."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowrank.bases.principal import principal_basis
from lowrank.config.sources import ModelShape
from lowrank.methods.lord import Settings
from lowrank.model.factors import LowRankFactors
from lowrank.ranks.budget import Budget, Ranks, break_even_rank, largest_rank, lord_kept, rank_for
from lowrank.ranks.by_type import lord_ranks
from tests import tiny
from tests.unit.ranks.test_budget import LLAMA_7B, LLAMA_13B, OTHER_7B, OTHER_13B

PUBLISHED = Path(__file__).parents[3] / "config" / "published" / "table_8.csv"
TIED = {"q": "qk", "k": "qk"}


def weights(budget: Budget, ranks: Ranks) -> int:
    """Parameters of all linear layers without the biases that compression adds, as the paper counts."""
    return sum(
        m.parameters if (rank := ranks[m.name]) is None else rank * (m.out_features + m.in_features)
        for m in budget.modules
    )


@pytest.mark.parametrize(
    ("shape", "other", "ratio", "share", "total"),
    [
        (LLAMA_7B, OTHER_7B, 20, 0.79868, 5_434_642_432),
        (LLAMA_7B, OTHER_7B, 30, 0.69905, 4_789_440_512),
        (LLAMA_13B, OTHER_13B, 20, 0.79911, 10_467_005_440),
        (LLAMA_13B, OTHER_13B, 30, 0.70012, 9_211_008_000),
    ],
)
def test_lord_has_the_sizes_of_the_papers_comparison(
    shape: ModelShape, other: int, ratio: int, share: float, total: int
) -> None:
    budget = Budget.of(shape)
    kept = weights(budget, lord_ranks(budget, ratio, "down"))
    assert kept / budget.dense_parameters == pytest.approx(share, abs=1e-5)
    assert kept + other == total


def test_lord_rounded_down_can_keep_more_than_asked_for() -> None:
    """Worked out by hand for SmolLM2-135M; the share is what the pages say that users read."""
    budget = Budget.of(ModelShape(**tiny.SMOLLM))
    ranks = lord_ranks(budget, 20, "down")
    kept = lord_kept(budget, 20)
    assert (kept["q"], kept["k"]) == (pytest.approx(0.75), pytest.approx(0.75))  # 0.2 (1 + 110592 / 442368) go
    assert lord_kept(Budget.of(LLAMA_7B), 20)["q"] == pytest.approx(0.70)  # 0.2 (1 + 1 / 2) go
    by_type = {module.type.name: ranks[module.name] for module in budget.modules}
    assert by_type == {"q": 216, "k": 104, "v": None, "o": 224, "gate": 336, "up": 336, "down": 336}
    assert weights(budget, ranks) == 30 * 2_826_240  # 79.861 %
    assert budget.parameters(ranks) == 30 * 2_831_232 > budget.allowed(20) == pytest.approx(84_934_656)
    share = f"{100 * budget.kept(ranks):.3f} %"
    assert share == "80.002 %"
    page = PUBLISHED.parents[2] / "docs/config.md"
    for text in (lord_ranks.__doc__, Settings.model_fields["rounding"].description, page.read_text(encoding="utf-8")):
        assert share in " ".join((text or "").split())


def published_ranks(budget: Budget, model: str, method: str, ratio: int) -> Ranks:
    """A row of Table 8 for every module: its groups are equally many consecutive layers, and v is dense."""
    lines = [line for line in PUBLISHED.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    wanted = {"model": model, "method": method, "ratio": str(ratio)}
    rows = [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]
    rows.sort(key=lambda row: int(row["group"]))
    layers = budget.dimensions.layers
    assert rows
    assert layers % len(rows) == 0
    ranks: Ranks = {}
    for module in budget.modules:
        row = rows[module.layer * len(rows) // layers]
        printed = row.get(TIED.get(module.type.name, module.type.name), "NA")
        ranks[module.name] = None if printed == "NA" else int(printed)
    return ranks


@pytest.mark.parametrize(
    ("method", "ratio", "share", "total"),
    [
        ("bolaco-5x1", 20, 0.79854, 5_433_790_464),
        ("bolaco-5x1", 30, 0.69927, 4_790_882_304),
        ("bolaco-5x4", 20, 0.81945, 5_569_187_840),  # printed as 5.44 B; these ranks keep more than the 80 %
        ("bolaco-5x4", 30, 0.69890, 4_788_490_240),
    ],
)
def test_the_papers_allocations_have_their_sizes(method: str, ratio: int, share: float, total: int) -> None:
    budget = Budget.of(LLAMA_7B)
    ranks = published_ranks(budget, "llama-2-7b", method, ratio)
    kept = weights(budget, ranks)
    assert kept / budget.dense_parameters == pytest.approx(share, abs=1e-5)
    assert kept + OTHER_7B == total
    biases = sum(module.out_features for module in budget.modules if ranks[module.name] is not None)
    assert budget.parameters(ranks) == kept + biases  # ours counts what the low-rank form adds


@given(m=st.integers(1, 20000), n=st.integers(1, 20000))
@example(m=13824, n=5120)  # breaks even at 3736.2, and 3736 is a multiple of 8
@example(m=17, n=17)
@example(m=1, n=9)
def test_a_low_rank_layer_is_always_smaller_than_the_dense_one(m: int, n: int) -> None:
    for kept in (0.001, 0.5, 0.999, 0.999999, 1.0, 1.001):
        rank = rank_for(kept, m, n)
        assert rank is None or (rank * (m + n) + m < m * n and rank <= largest_rank(m, n))


@given(m=st.integers(64, 8192), n=st.integers(64, 8192))
def test_at_the_break_even_rank_and_above_a_layer_is_dense(m: int, n: int) -> None:
    even = break_even_rank(m, n)
    assert even * (m + n) == pytest.approx(m * n)  # it saves nothing
    assert rank_for(1.0, m, n) is None
    assert rank_for(1.001, m, n) is None
    rank = rank_for(0.999999, m, n)
    assert rank is None or rank < even


def test_narrow_keys_and_values_stay_dense_where_8_directions_are_too_many() -> None:
    grouped = LLAMA_7B.model_copy(update={"hidden": 64, "heads": 8, "head_dim": 8, "kv_heads": 1, "intermediate": 160})
    budget = Budget.of(grouped)
    narrow = [module for module in budget.modules if module.type.name in "kv"]
    assert all(module.out_features == 8 for module in narrow)
    assert all(rank_for(kept, 8, 64) is None for kept in (0.2, 0.5, 0.9))
    assert rank_for(0.5, 64, 64) == 16
    ranks = lord_ranks(budget, 20, "down")
    assert all(ranks[module.name] is None for module in narrow)
    assert all(ranks[module.name] for module in budget.modules if module not in narrow)


@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (1024, 4096), (14336, 4096), (512, 3584)])
def test_a_shared_ratio_means_each_matrix_own_break_even_rank(m: int, n: int) -> None:
    assert rank_for(0.5, m, n) == 8 * (-(-m * n // (2 * (m + n))) // 8)


def test_centred_uncentred_and_biasless_errors_worked_out_by_hand() -> None:
    # Outputs y1 = 10 always, y2 = +-3 and y3 = +-2 uncorrelated, y4 = y5 = 0. W is the identity; one direction is kept.
    y = torch.zeros(5, 4, dtype=torch.double)
    y[0], y[1], y[2] = 10, torch.tensor([3, 3, -3, -3]), torch.tensor([2, -2, 2, -2])
    w = torch.eye(5, dtype=torch.double)
    centred = principal_basis(w, None, torch.cov(y, correction=0), y.mean(1), "layer").factors(1)
    uncentred = principal_basis(w, None, y @ y.T / 4, torch.zeros(5, dtype=torch.double), "layer").factors(1)

    def error(pair: LowRankFactors, bias: torch.Tensor | None) -> float:
        assert bias is not None
        return float((y - pair.up @ (pair.down @ y) - bias[:, None]).pow(2).sum() / 4)

    assert error(centred, centred.bias) == pytest.approx(4)  # y3 is lost
    assert error(uncentred, uncentred.bias) == pytest.approx(9 + 4)  # y2 and y3 are
    assert error(centred, torch.zeros(5)) == pytest.approx(100 + 4)  # y1 and y3 are

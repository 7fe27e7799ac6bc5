"""Parameter accounting, against numbers published for real models and against counting by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.ranks.budget import Budget, break_even_rank, largest_rank, rank_for, share_of
from lowrank.ranks.by_type import lord_ranks, uniform_ranks
from lowrank.ranks.predicted_loss import allocate
from lowrank.ranks.zero_sum import greedy_ranks
from tests import tiny

LLAMA_7B = ModelShape(
    family="llama",
    layers=32,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocabulary=32000,
    tied_embeddings=False,
)
LLAMA_13B = LLAMA_7B.model_copy(
    update={"layers": 40, "hidden": 5120, "intermediate": 13824, "heads": 40, "kv_heads": 40}
)
# Not linear layers of the decoder: embeddings, head, norms.
OTHER_7B = 2 * 32000 * 4096 + 65 * 4096
OTHER_13B = 2 * 32000 * 5120 + 81 * 5120


def test_llama_2_has_its_published_size() -> None:
    assert Budget.of(LLAMA_7B).dense_parameters + OTHER_7B == 6_738_415_616
    assert Budget.of(LLAMA_13B).dense_parameters + OTHER_13B == 13_015_864_320


@pytest.mark.parametrize(
    ("shape", "ratio", "expected"),
    [
        (LLAMA_7B, 20, {"q": 1432, "k": 1432, "v": None, "o": 1632, "gate": 2384, "up": 2384, "down": 2384}),
        (LLAMA_7B, 30, {"q": 1120, "k": 1120, "v": None, "o": 1432, "gate": 2088, "up": 2088, "down": 2088}),
        (LLAMA_13B, 20, {"q": 1792, "k": 1792, "v": None, "o": 2048, "gate": 2984, "up": 2984, "down": 2984}),
        (LLAMA_13B, 30, {"q": 1408, "k": 1408, "v": None, "o": 1792, "gate": 2616, "up": 2616, "down": 2616}),
    ],
)
def test_lord_rounded_down_has_the_ranks_of_the_papers_comparison(
    shape: ModelShape, ratio: int, expected: dict[str, int | None]
) -> None:
    budget = Budget.of(shape)
    ranks = lord_ranks(budget, ratio, "down")
    assert {module.type.name: ranks[module.name] for module in budget.modules} == expected


@pytest.mark.parametrize("adds_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "ratio", "square", "mlp"),
    [(LLAMA_7B, 20, 1632, 2384), (LLAMA_7B, 30, 1432, 2088), (LLAMA_13B, 20, 2048, 2984), (LLAMA_13B, 30, 1792, 2616)],
)
def test_one_ratio_rounded_down_has_the_papers_ranks(
    shape: ModelShape, ratio: int, square: int, mlp: int, adds_bias: bool
) -> None:
    """What its comparison prints for o, gate, up and down; biases, which its authors do not count, change nothing."""
    budget = replace(Budget.of(shape), adds_bias=adds_bias)
    ranks = uniform_ranks(budget, ratio, (), "down")
    assert {ranks[m.name] for m in budget.modules if m.type.name in ("q", "k", "v", "o")} == {square}
    assert {ranks[m.name] for m in budget.modules if m.type.name in ("gate", "up", "down")} == {mlp}


def test_types_that_stay_dense_are_paid_for_before_rounding_down() -> None:
    budget = replace(Budget.of(ModelShape(**tiny.SMOLLM)), adds_bias=False)
    ranks = uniform_ranks(budget, 20, ("gate", "up"), "down")
    # 2 x 884,736 of 3,538,944 weights of a block are dense, so the others keep 60 %: 172.8, 86.4 and 251.3
    kept = {m.type.name: ranks[m.name] for m in budget.modules}
    assert kept == {"q": 168, "k": 80, "v": 80, "o": 168, "gate": None, "up": None, "down": 248}


@pytest.mark.parametrize("ratio", [50, 60])
def test_dense_types_can_leave_nothing_to_the_others(ratio: int) -> None:
    with pytest.raises(RankwiseError, match=f"removing {ratio} % is out of reach: with gate, up dense nothing would"):
        uniform_ranks(Budget.of(ModelShape(**tiny.SMOLLM)), ratio, ("gate", "up"), "down")


@given(m=st.integers(1, 5000), n=st.integers(1, 5000))
def test_the_largest_rank_saves_and_the_next_does_not(m: int, n: int) -> None:
    rank = largest_rank(m, n)
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)
    assert rank < break_even_rank(m, n)


@given(kept=st.floats(0.01, 1.2), m=st.integers(64, 4096), n=st.integers(64, 4096))
def test_a_rank_is_a_multiple_of_8_that_saves_or_the_layer_is_dense(kept: float, m: int, n: int) -> None:
    rank = rank_for(kept, m, n)
    if rank is None:
        assert kept * break_even_rank(m, n) > largest_rank(m, n) - 9
    else:
        assert rank % 8 == 0
        assert 8 <= rank <= largest_rank(m, n)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_that_compression_adds_are_counted(family: str) -> None:
    shape = LLAMA_7B.model_copy(update={"family": family, "layers": 1})
    budget = Budget.of(shape)
    for module in budget.modules:
        added = budget.cost(module, 8) - 8 * (module.out_features + module.in_features)
        native = family == "opt" or (family == "qwen2" and module.type.name in "qkv")
        assert added == (0 if native else module.out_features)


def test_biases_that_are_not_there_buy_rank() -> None:
    """SmolLM2-135M: those of all layers are as many parameters as half a rank in all of them."""
    counted = Budget.of(ModelShape(**tiny.SMOLLM))
    without = replace(counted, adds_bias=False)
    all_8 = {module.name: 8 for module in counted.modules}
    assert counted.parameters(all_8) - without.parameters(all_8) == 155_520
    for ratio in (10, 20, 30, 40):
        assert without.kept(uniform_ranks(without, ratio, ())) <= 1 - ratio / 100
        more, less = (sum(rank or 0 for rank in uniform_ranks(b, ratio, ()).values()) for b in (without, counted))
        assert more >= less


@given(parameters=st.integers(1, 10**12), ratio=st.integers(0, 90))
def test_what_may_stay_is_never_a_whole_parameter_less_or_more(parameters: int, ratio: int) -> None:
    assert math.floor(share_of(parameters, ratio)) == parameters * (100 - ratio) // 100


@pytest.mark.parametrize("way", ["zero-sum", "uniform", "predicted"])
def test_ranks_that_fit_exactly_fit(way: str) -> None:
    """Of 160 x 160 matrices rank 8 keeps a tenth, and (1 - 90 / 100) times all of them is a little less in floats."""
    shape = {**tiny.shape("opt"), "hidden": 160, "intermediate": 160, "heads": 4, "kv_heads": 4, "head_dim": 40}
    budget = replace(Budget.of(ModelShape(**shape)), adds_bias=False)
    losses = {module.name: np.ones(160) for module in budget.modules}
    all_8 = {module.name: 8 for module in budget.modules}
    assert budget.parameters(all_8) * 10 == budget.dense_parameters
    ranks = {
        "zero-sum": lambda: greedy_ranks(budget, 90, losses).ranks,
        "uniform": lambda: uniform_ranks(budget, 90, ()),
        "predicted": lambda: allocate(budget, 90, losses).ranks,
    }[way]()
    assert ranks == all_8


def test_uniform_ranks_meet_the_budget() -> None:
    budget = Budget.of(LLAMA_7B)
    kept = budget.kept(uniform_ranks(budget, 20, ()))
    assert 0.797 < kept <= 0.8


def test_lord_refuses_what_experts_without_tokens_leave_too_few_matrices_for() -> None:
    """Of the eight matrices of type up two can lose a fifth of all, and one cannot."""
    budget = Budget.of(ModelShape(**tiny.shape("mixtral")))
    up = [module.name for module in budget.modules if module.type.name == "up"]
    assert len(up) == 8
    assert lord_ranks(replace(budget, left_dense=frozenset(up[2:])), 20, "give-back")[up[0]] is not None
    with pytest.raises(RankwiseError, match="LoRD cannot remove 20 % of up: too few experts got enough tokens"):
        lord_ranks(replace(budget, left_dense=frozenset(up[1:])), 20, "give-back")


def test_lord_refuses_a_ratio_that_q_and_k_cannot_pay_for() -> None:
    with pytest.raises(RankwiseError, match="LoRD cannot remove 80 %"):
        lord_ranks(Budget.of(LLAMA_7B), 80, "down")

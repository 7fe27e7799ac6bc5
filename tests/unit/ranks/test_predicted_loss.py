"""The allocation by predicted loss, against trying everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Budget
from lowrank.ranks.curves import Curve, Group, choices_of
from lowrank.ranks.predicted_loss import _by_multiplier, allocate
from lowrank.ranks.reach import why_out_of_reach
from tests import tiny

KINDS = ("llama", "llama-gqa", "qwen2", "qwen3", "opt")


def budget_of(kind: str, identity_block: bool = False) -> Budget:
    shape = ModelShape.model_validate(tiny.shape(kind))
    return replace(Budget.of(shape), identity_block=identity_block)


def losses_of(budget: Budget, seed: int) -> dict[str, np.ndarray]:
    """Decreasing losses by direction, of sizes that differ between modules."""
    draw = np.random.default_rng(seed)
    sizes = {module.name: min(module.out_features, module.in_features) for module in budget.modules}
    return {name: np.sort(draw.exponential(draw.exponential(), size))[::-1] for name, size in sizes.items()}


@settings(deadline=None, max_examples=25)
@given(kind=st.sampled_from(KINDS), ratio=st.integers(1, 45), seed=st.integers(0, 99), identity_block=st.booleans())
def test_the_budget_is_met_and_hardly_missed(kind: str, ratio: int, seed: int, identity_block: bool) -> None:
    budget = budget_of(kind, identity_block)
    found = allocate(budget, ratio, losses_of(budget, seed))
    kept, allowed = budget.parameters(found.ranks), budget.allowed(ratio)
    assert kept <= allowed
    assert all(rank is None or rank % 8 == 0 for rank in found.ranks.values())
    for module in budget.modules:  # what is left does not pay for one more step anywhere
        rank = found.ranks[module.name]
        if rank is not None:
            bigger = choices_of(budget, module, losses_of(budget, seed)[module.name])
            index = bigger.ranks.index(rank) + 1
            assert kept + bigger.parameters[index] - budget.cost(module, rank) > allowed


def slow_steps(choices: Mapping[str, Curve], begun: Mapping[str, int], allowed: float) -> dict[str, int]:
    """Raise choices while the budget lasts; every step looks through all larger ones of all matrices."""
    picked = dict(begun)
    while True:
        left = allowed - sum(float(choice.parameters[picked[name]]) for name, choice in choices.items())
        steps = []
        for name, choice in choices.items():
            now = picked[name]
            for index in range(now + 1, len(choice.losses)):
                extra = choice.parameters[index] - choice.parameters[now]
                gain = (choice.losses[now] - choice.losses[index]) / extra
                if extra <= left and gain > 0:
                    steps.append((gain, name, index))
        if not steps:
            return picked
        _, name, index = max(steps)
        picked[name] = index


@pytest.mark.parametrize(("kind", "ratio"), [("llama", 5), ("llama-gqa", 20), ("opt", 40)])
def test_the_multiplier_is_halved_no_longer_than_it_changes(
    kind: str, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred halvings are three times as many as the 53 bits of a multiplier need, and find the same."""
    budget = budget_of(kind)
    choices = {m.name: choices_of(budget, m, losses_of(budget, ratio)[m.name]) for m in budget.modules}
    asked, plain = [], np.argmin

    def counted(values: np.ndarray) -> np.intp:
        asked.append(values)
        return plain(values)

    def pick(multiplier: float) -> dict[str, int]:
        return {name: int(plain(c.losses + multiplier * c.parameters)) for name, c in choices.items()}

    low, high = 0.0, 1.0  # losses here are so small that more is never needed
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(float(choices[name].parameters[index]) for name, index in pick(middle).items())
        low, high = (low, middle) if kept <= budget.allowed(ratio) else (middle, high)
    monkeypatch.setattr(np, "argmin", counted)
    assert _by_multiplier(choices, budget.allowed(ratio)) == pick(high)
    assert len(asked) < 100 * len(choices)


@pytest.mark.parametrize("kind", KINDS)
def test_what_rounding_leaves_goes_where_a_parameter_gains_most(kind: str) -> None:
    budget = budget_of(kind)
    for seed, ratio in enumerate((10, 20, 30, 40)):
        losses = losses_of(budget, seed)
        choices = {module.name: choices_of(budget, module, losses[module.name]) for module in budget.modules}
        picked = slow_steps(choices, _by_multiplier(choices, budget.allowed(ratio)), budget.allowed(ratio))
        expected = {name: choices[name].ranks[index] for name, index in picked.items()}
        assert allocate(budget, ratio, losses).ranks == expected


@pytest.mark.parametrize("ratio", [10, 25, 40])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_the_best_of_all_allocations_and_exact_for_its_own_budget(ratio: int, seed: int) -> None:
    """One block with three types free: small enough to try everything."""
    whole = budget_of("llama")
    names = [module.name for module in whole.modules if module.layer == 0][:4]
    budget = replace(whole, modules=tuple(module for module in whole.modules if module.name in names))
    losses = {name: values for name, values in losses_of(whole, seed).items() if name in names}
    choices = [choices_of(budget, module, losses[module.name]) for module in budget.modules]
    found = allocate(budget, ratio, losses)

    def best(limit: float) -> float:
        every = product(*(range(len(choice.ranks)) for choice in choices))
        sums = [
            (
                sum(c.parameters[i] for c, i in zip(choices, picked, strict=True)),
                sum(c.losses[i] for c, i in zip(choices, picked, strict=True)),
            )
            for picked in every
        ]
        return min(loss for parameters, loss in sums if parameters <= limit)

    assert found.loss >= best(budget.allowed(ratio)) - 1e-12
    largest_step = max(float(np.diff(choice.parameters).max()) for choice in choices)
    assert found.loss <= best(budget.allowed(ratio) - largest_step) + 1e-12


def test_a_matrix_that_nobody_needs_pays_for_the_others() -> None:
    budget = budget_of("llama")
    losses = {name: np.full(len(values), 1.0) for name, values in losses_of(budget, 0).items()}
    idle = budget.modules[-1].name
    losses[idle] = np.zeros_like(losses[idle])
    found = allocate(budget, 5, losses)
    assert found.ranks[idle] == 8


def test_types_that_stay_dense() -> None:
    budget = budget_of("llama-gqa")
    found = allocate(budget, 20, losses_of(budget, 0), uncompressed=("v",))
    assert all(found.ranks[module.name] is None for module in budget.modules if module.type.name == "v")
    assert budget.parameters(found.ranks) <= budget.allowed(20)


def test_the_identity_block_buys_rank() -> None:
    losses = losses_of(budget_of("llama"), 1)
    pair = allocate(budget_of("llama"), 30, losses)
    block = allocate(budget_of("llama", identity_block=True), 30, losses)
    assert block.loss < pair.loss


def test_out_of_reach_and_unknown_types_are_errors() -> None:
    budget = budget_of("llama")
    with pytest.raises(RankwiseError, match="removing 90 % is impossible: with q, k, v, o, gate dense"):
        allocate(budget, 90, losses_of(budget, 0), uncompressed=("q", "k", "v", "o", "gate"))
    with pytest.raises(RankwiseError, match="no linear layers of type fc1"):
        allocate(budget, 20, losses_of(budget, 0), uncompressed=("fc1",))


def test_groups_choose_beside_matrices_under_one_multiplier() -> None:
    """Each block's MLP is a group: near the best of everything there is, and its matrices have no rank of their own."""
    whole = budget_of("llama")
    budget = replace(whole, modules=tuple(module for module in whole.modules if module.layer == 0))
    draw = np.random.default_rng(3)
    losses = losses_of(budget, 3)
    mlp = tuple(module.name for module in budget.modules if module.type.name in ("gate", "up", "down"))
    parameters = np.arange(1, 21) * 8.0 * 3 * tiny.HIDDEN
    group = Group(parameters, np.append(np.sort(draw.exponential(size=19))[::-1] * 5, 0.0), mlp)
    alone = [module for module in budget.modules if module.name not in mlp]
    curves = [*(choices_of(budget, module, losses[module.name]) for module in alone), group]
    for ratio in (10, 30, 50):
        found = allocate(budget, ratio, losses, groups={"block": group})
        assert all(found.ranks[name] is None for name in mlp)
        spent = sum(budget.cost(module, found.ranks[module.name]) for module in alone)
        spent += parameters[found.picked["block"]]
        assert spent <= budget.allowed(ratio)
        largest_step = max(float(np.diff(curve.parameters).max()) for curve in curves)
        limit = budget.allowed(ratio) - largest_step
        # The best within `limit`, curve by curve: losses by parameters spent so far.
        reach = {0.0: 0.0}
        for curve in curves:
            further: dict[float, float] = {}
            for (before, lost), (size, loss) in product(
                reach.items(), zip(curve.parameters, curve.losses, strict=True)
            ):
                if before + size <= limit:
                    further[before + size] = min(lost + loss, further.get(before + size, np.inf))
            reach = further
        assert found.loss <= min(reach.values()) + 1e-12


def test_nothing_removed_leaves_groups_dense_and_too_much_is_an_error() -> None:
    budget = budget_of("llama")
    mlps = [module for module in budget.modules if module.type.name in ("gate", "up", "down")]
    group = Group(np.array([1e4, 2e4]), np.array([1.0, 0.0]), tuple(module.name for module in mlps))
    assert allocate(budget, 0, losses_of(budget, 0), groups={"mlp": group}).picked == {"mlp": 1}
    with pytest.raises(RankwiseError, match="ranks of at least 8 and the fewest neurons that may stay, "):
        allocate(budget, 95, losses_of(budget, 0), uncompressed=("q", "k"), groups={"mlp": group})


def test_what_experts_without_tokens_leave_is_said() -> None:
    shape = ModelShape.model_validate(tiny.shape("mixtral"))
    names = frozenset(module.name for module in Budget.of(shape).modules if ".experts." in module.name)
    budget = replace(Budget.of(shape), left_dense=names)
    with pytest.raises(
        RankwiseError, match=rf"impossible: .* {len(names)} of \d+ matrices stay dense, of experts that got"
    ):
        allocate(budget, 60, losses_of(budget, 0))
    assert "matrices stay dense" in str(why_out_of_reach(budget, 60, (), 0.1))
    assert "stay dense, of" not in str(why_out_of_reach(Budget.of(shape), 97, (), 0.1))

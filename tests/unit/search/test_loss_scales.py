"""The search over factors on predicted losses: it begins with the prediction, keeps the budget, and improves on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.presets import Search
from lowrank.errors import RankwiseError
from lowrank.ranks.predicted_loss import allocate
from lowrank.search.loss_scales import LossScaleSpace, predicted_losses
from lowrank.search.objective import Score
from lowrank.search.search import best_trial, objective_of, search_allocation
from lowrank.search.start import initial_points
from tests import tiny
from tests.unit.ranks.test_predicted_loss import budget_of, losses_of
from tests.unit.search.test_search import tiny_bases

SCALES = Search(variables="loss-scales", evaluations=12, initial=4, kl_weight=0)


def space_of(
    kind: str, ratio: int = 25, groups: int = 1, seed: int = 0, identity_block: bool = False
) -> LossScaleSpace:
    budget = budget_of(kind, identity_block)
    return LossScaleSpace(budget, ratio, groups, (), SCALES, losses_of(budget, seed))


@pytest.mark.parametrize("kind", ["llama", "llama-gqa", "qwen2", "opt"])
def test_factors_of_one_are_the_prediction(kind: str) -> None:
    space = space_of(kind)
    first = initial_points(space, SCALES, 0)[0]
    assert first.origin == "predicted"
    assert space.ranks(first.x) == allocate(space.budget, 25, losses_of(space.budget, 0)).ranks
    assert {name.split("/")[0] for name in space.names} == {module.type.tied for module in space.budget.modules}


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(["llama", "llama-gqa", "opt"]),
    ratio=st.integers(1, 45),
    groups=st.integers(1, tiny.LAYERS),
    identity_block=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_point_exceeds_the_budget(kind: str, ratio: int, groups: int, identity_block: bool, seed: int) -> None:
    space = space_of(kind, ratio, groups, seed, identity_block)
    points = np.concatenate(
        [space.sample(2, seed), space.around(space.predicted(), 2, np.random.default_rng(seed)), [space.upper * 9]]
    )
    for x in space.onto_budget(points):
        assert (x >= space.lower).all()
        assert (x <= space.upper).all()
        assert space.budget.parameters(space.ranks(x)) <= space.budget.allowed(ratio)


def test_a_larger_factor_keeps_more_of_a_type() -> None:
    space = space_of("llama")
    index = space.names.index("down/0")

    def kept(exponent: float) -> int:
        x = space.predicted()
        x[index] = exponent
        ranks = space.ranks(x)
        return sum(space.budget.cost(module, ranks[module.name]) for module in space.matrices["down/0"])

    sizes = [kept(exponent) for exponent in (-3.0, -1.0, 0.0, 1.0, 3.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_the_search_finds_factors_that_the_prediction_lacks(tmp_path: Path) -> None:
    """The true losses of two types are four times and a fourth of the predicted ones."""
    space = space_of("llama", ratio=35)
    wrong = {"down": 4.0, "qk": 0.25}
    true = {
        module.name: losses_of(space.budget, 0)[module.name] * wrong.get(module.type.tied, 1.0)
        for module in space.budget.modules
    }

    def evaluate(ranks: dict[str, int | None]) -> Score:
        lost = sum(true[name][rank:].sum() for name, rank in ranks.items() if rank is not None)
        return Score(float(lost), None, float(lost))

    trials = search_allocation(space, evaluate, SCALES, 0, tmp_path / "trials.csv")
    predicted = objective_of(trials, "predicted")
    ideal = evaluate(allocate(space.budget, 35, true).ranks).objective
    assert predicted is not None
    found = trials[best_trial(trials)].score.objective
    assert ideal <= found * 1.01
    assert found - ideal < (predicted - ideal) / 2
    again = search_allocation(space, evaluate, SCALES, 0, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "trials.csv").read_bytes()
    assert len(again) == 12


def test_bases_must_predict(tmp_path: Path) -> None:
    bases = tiny_bases("llama", tmp_path)
    with pytest.raises(RankwiseError, match=r"self_attn\.q_proj: its basis says nothing of the loss"):
        predicted_losses(bases, budget_of("llama"))


def test_uncompressed_types_have_no_factor_and_stay_dense() -> None:
    budget = replace(budget_of("llama"), identity_block=True)
    space = LossScaleSpace(budget, 20, 2, ("v",), SCALES, losses_of(budget, 1))
    assert not any(name.startswith("v/") for name in space.names)
    ranks = space.ranks(space.sample(1, 0)[0])
    assert all(ranks[module.name] is None for module in budget.modules if module.type.name == "v")


@pytest.mark.parametrize(
    ("key", "value"),
    [("start", ["lord"]), ("start_at", {"qk": 0.5}), ("lower", 0.1), ("upper", 0.9), ("band", 0.1)],
)
def test_keys_of_kept_ratios_say_nothing_to_loss_scales(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="loss-scales"):
        Search.model_validate({"variables": "loss-scales", key: value})
    with pytest.raises(ValueError, match="kept-ratios"):
        Search.model_validate({"largest_scale": 4})

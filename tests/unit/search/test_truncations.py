"""Measured truncations against whole models with one layer replaced, and how well they were predicted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.bases.principal import Bases
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import replace_modules
from lowrank.ranks.budget import Budget
from lowrank.search import truncations
from lowrank.search.sliced_model import SlicedModel
from lowrank.search.truncations import Truncation, choose_truncations, measure_truncations
from tests import tiny
from tests.unit.methods import rankwise_samples as samples
from tests.unit.model.factor_samples import CPU, shape_of

KEPT = [0.25, 0.5, 0.75]
WINDOWS = torch.randint(2, 400, (5, 16), generator=torch.Generator().manual_seed(8))


def budget_of(kind: str) -> Budget:
    return Budget.of(shape_of(kind))


def window_means(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean loss of each window in a plain pass."""
    logits = model(windows).logits[:, :-1].double()
    return torch.stack([functional.cross_entropy(one, ids[1:]) for one, ids in zip(logits, windows, strict=True)])


def test_the_choice_is_even_over_types_and_follows_the_seed() -> None:
    bases, budget = samples.fisher_bases("llama-gqa"), budget_of("llama-gqa")
    found = choose_truncations(budget, bases, 9, KEPT, seed=0)
    matrices = {truncation.module for truncation in found}
    assert len(matrices) == 9
    assert set(Counter(module.type.name for module in matrices).values()) == {1, 2}
    assert found == choose_truncations(budget, bases, 9, KEPT, seed=0)
    assert found != choose_truncations(budget, bases, 9, KEPT, seed=1)
    assert [truncation.module.layer for truncation in found] == sorted(t.module.layer for t in found)
    for truncation in found:
        k = min(truncation.module.out_features, truncation.module.in_features)
        assert truncation.rank % 8 == 0
        assert truncation.rank in [round(share * k / 8) * 8 for share in KEPT]
        losses = bases.losses(truncation.module.layer, truncation.module.type.name)
        assert losses is not None
        assert truncation.predicted == pytest.approx(sum(losses.tolist()[truncation.rank :]), rel=1e-6)
    everything = choose_truncations(budget, bases, 999, [0.5], seed=3)
    assert [truncation.module for truncation in everything] == list(budget.modules)


def test_bases_without_predictions_and_shares_that_truncate_nothing_are_refused() -> None:
    plain = samples.bases_of(tiny.model("opt"), "opt", WINDOWS, Covariance(estimator="naive"))
    with pytest.raises(RankwiseError, match=r"self_attn\.q_proj: its basis predicts no loss; its `covariance` needs"):
        choose_truncations(budget_of("opt"), plain, 99, KEPT, seed=0)
    with pytest.raises(RankwiseError, match="truncates any of the chosen matrices"):
        choose_truncations(budget_of("opt"), samples.fisher_bases("opt"), 5, [0.999], seed=0)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_measured_rise_is_that_of_the_model_with_one_layer_replaced(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncations, "TOKENS_PER_BATCH", 32)  # three batches
    bases, budget = samples.fisher_bases(kind, "predict"), budget_of(kind)
    chosen = choose_truncations(budget, bases, 8, [0.5], seed=2)
    sliced = SlicedModel(tiny.model(kind), budget, bases)
    result = measure_truncations(sliced, chosen, WINDOWS, CPU)
    dense = window_means(tiny.model(kind), WINDOWS)
    assert result["dense"] == pytest.approx(float(dense.mean()), rel=1e-6)
    assert result["predicted"] == "second order, on the calibration text"
    assert torch.allclose(window_means(sliced.model, WINDOWS), dense, atol=1e-6)  # it is left dense
    for truncation, record in zip(chosen, result["truncations"], strict=True):
        model, module = tiny.model(kind), truncation.module
        basis = bases.of(module.layer, module.type.name, model.get_submodule(module.name).weight)
        replace_modules(model, {module.name: basis.factors(truncation.rank)})
        rise = window_means(model, WINDOWS) - dense
        assert record["measured"] == pytest.approx(float(rise.mean()), abs=2e-6)
        assert record["stderr"] == pytest.approx(float(rise.std()) / 5**0.5, abs=2e-6)
        assert abs(record["measured"]) > 1e-5
        assert (record["module"], record["rank"]) == (module.name, truncation.rank)
        assert record["predicted"] == truncation.predicted


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).argsort().argsort().double()


@pytest.mark.parametrize("gradients", ["weigh", "predict"])
def test_on_a_trained_model_the_order_is_predicted(gradients: str) -> None:
    model, budget = samples.trained_model(), budget_of("llama")
    settings = Covariance.model_validate({"estimator": "naive", "gradients": gradients})
    bases: Bases = samples.bases_of(model, "llama", samples.rows_to_learn(64, 1001), settings)
    chosen = choose_truncations(budget, bases, 14, [0.2, 0.4, 0.6, 0.8], seed=0)
    unseen = samples.rows_to_learn(32, 1002)
    result = measure_truncations(SlicedModel(samples.trained_copy(), budget, bases), chosen, unseen, CPU)

    def correlation(records: list[dict[str, Any]]) -> float:
        both = [ranks([record[key] for record in records]) for key in ("predicted", "measured")]
        return float(torch.corrcoef(torch.stack(both))[0, 1])

    expected = correlation(result["truncations"])
    assert result["spearman"]["all"] == pytest.approx(expected, abs=1e-9)
    assert expected > 0.85
    assert set(result["spearman"]["by_type"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, value in result["spearman"]["by_type"].items():
        of_type = [record for record in result["truncations"] if record["type"] == name]
        assert value == pytest.approx(correlation(of_type), abs=1e-9), name


def test_one_window_has_no_error_and_one_trial_no_correlation() -> None:
    bases, budget = samples.fisher_bases("llama"), budget_of("llama")
    result = measure_truncations(
        SlicedModel(tiny.model("llama"), budget, bases),
        choose_truncations(budget, bases, 1, [0.5], seed=0),
        WINDOWS[:1],
        CPU,
    )
    assert result["truncations"][0]["stderr"] is None
    assert result["spearman"]["all"] is None


def test_a_loss_that_is_not_finite_is_named() -> None:
    bases, budget = samples.fisher_bases("llama"), budget_of("llama")
    sliced = SlicedModel(tiny.model("llama"), budget, bases)
    module = budget.modules[9]
    sliced.layers[module.name].directions[:] = float("nan")
    with pytest.raises(RankwiseError, match=rf"{module.name} at rank 16: its loss is not finite"):
        measure_truncations(sliced, [Truncation(module, 16, 0.1)], WINDOWS, CPU)

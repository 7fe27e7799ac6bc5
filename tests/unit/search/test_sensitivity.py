"""Sensitivities against models rebuilt with one type of matrix compressed, and full logits in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.model.checkpoint import replace_modules
from lowrank.model.families import FAMILIES
from lowrank.ranks.budget import Budget, Ranks, rank_for
from lowrank.search.allocation import sliced_factors
from lowrank.search.sensitivity import measure_sensitivity
from lowrank.search.sliced_model import SlicedModel
from tests.unit.model.test_families import CPU, VOCABULARY, a_model, a_shape, bases_of, some_tokens


def perplexity_of(model: PreTrainedModel, windows: torch.Tensor) -> tuple[float, float]:
    """Perplexity, and its standard error from those of the windows."""
    logits = model(windows).logits[:, :-1].double()
    nll = functional.cross_entropy(logits.reshape(-1, VOCABULARY), windows[:, 1:].reshape(-1), reduction="none")
    means = nll.view(len(windows), -1).mean(dim=1)
    perplexity = math.exp(means.mean())
    return perplexity, perplexity * float(means.std()) / len(windows) ** 0.5


@pytest.mark.parametrize("name", ["llama with grouped queries", "opt"])
def test_each_type_is_compressed_alone_in_all_layers(name: str, tmp_path: Path) -> None:
    bases = bases_of(a_model(name), some_tokens(6, seed=1), tmp_path)
    budget, windows = Budget.of(a_shape(name)), some_tokens(4, seed=2)
    report = measure_sensitivity(SlicedModel(a_model(name), budget, bases), budget, windows, [0.8, 0.4, 1.0], CPU)
    dense = perplexity_of(a_model(name), windows)
    assert (report["dense"]["perplexity"], report["dense"]["stderr"]) == pytest.approx(dense, rel=1e-4)
    assert list(report["types"]) == [linear.name for linear in FAMILIES[budget.dimensions.family].types]
    for kind, points in report["types"].items():
        assert [point["kept"] for point in points] == [0.4, 0.8, 1.0]
        for point in points:
            modules = [module for module in budget.modules if module.type.name == kind]
            ranks: Ranks = {m.name: rank_for(point["kept"], m.out_features, m.in_features) for m in modules}
            rebuilt = a_model(name)
            replace_modules(rebuilt, sliced_factors(bases, rebuilt, budget, ranks))
            expected = perplexity_of(rebuilt, windows)
            assert (point["perplexity"], point["stderr"]) == pytest.approx(expected, rel=1e-4), (kind, point["kept"])
            assert point["removed"] == pytest.approx(1 - budget.parameters(ranks) / budget.dense_parameters)
        assert points[-1]["perplexity"] == report["dense"]["perplexity"]
        assert points[-1]["removed"] == 0


def test_one_window_has_no_standard_error(tmp_path: Path) -> None:
    bases = bases_of(a_model("llama"), some_tokens(6, seed=1), tmp_path)
    budget = Budget.of(a_shape("llama"))
    sliced = SlicedModel(a_model("llama"), budget, bases)
    report = measure_sensitivity(sliced, budget, some_tokens(1, seed=2), [0.5], CPU)
    assert report["dense"]["stderr"] is None

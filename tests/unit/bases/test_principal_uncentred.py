"""Uncentred bases subtract no mean, so their pairs add no bias; a dense layer's own bias stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank.bases.fisher import fisher_basis
from lowrank.bases.principal import load_basis, principal_basis
from lowrank.config.presets import Covariance
from lowrank.model.families import has_native_bias
from lowrank.ranks.budget import Budget
from lowrank.search.sliced_model import open_sliced_model
from tests import tiny
from tests.unit.bases.test_principal import random_layer
from tests.unit.methods import rankwise_samples
from tests.unit.model import factor_samples as samples


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("weighed", [True, False])
def test_without_a_mean_the_bias_is_the_layers_own_or_none(own: bool, weighed: bool) -> None:
    w, b, x = random_layer(10, 14, 60, 1)
    bias, moment = (b if own else None), x @ x.T / 60
    found = [
        fisher_basis(w, bias, moment, mean, torch.eye(10).double(), 0.01, "layer")
        if weighed
        else principal_basis(w, bias, moment, mean, "layer")
        for mean in (None, torch.zeros(14, dtype=torch.double))
    ]
    pair, with_zeros = (basis.factors(3) for basis in found)
    assert torch.equal(pair.up @ pair.down, with_zeros.up @ with_zeros.down)
    assert (pair.bias is None) == (not own)
    assert pair.bias is None or torch.equal(pair.bias, b)
    stored = load_basis(found[0].tensors("gate"), "gate", w)
    assert stored.projected_mean is None
    assert (stored.mean is None) == (not own)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_stored_bases_say_whether_a_mean_was_subtracted(kind: str) -> None:
    uncentred, naive, model = samples.bases(kind, "uncentred"), samples.bases(kind, "naive"), tiny.model(kind)
    assert naive.centred
    assert not uncentred.centred
    for module in Budget.of(samples.shape_of(kind)).modules:
        layer = model.get_submodule(module.name)
        own, weight = layer.bias, layer.weight
        pair = uncentred.of(module.layer, module.type.name, weight).factors(4)
        assert (own is not None) == has_native_bias(samples.shape_of(kind), module)
        assert (pair.bias is None) == (own is None)
        assert own is None or torch.equal(pair.bias, own)
        assert naive.of(module.layer, module.type.name, weight).factors(4).bias is not None


@pytest.mark.parametrize(("estimator", "counts"), [("uncentred", False), ("naive", True)])
def test_searches_count_the_biases_that_their_bases_bring(estimator: str, counts: bool, tmp_path: Path) -> None:
    tiny.model("qwen2").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    folder = str(samples.bases("qwen2", estimator).files[0].parent)
    described = {"dtype": "float32", "shape": tiny.shape("qwen2")}
    opened = open_sliced_model(str(tmp_path / "model"), folder, described, 1)
    assert opened.budget.adds_bias == counts
    module = next(module for module in opened.budget.modules if module.type.name == "o")
    pair = 8 * (module.out_features + module.in_features)
    assert opened.budget.cost(module, 8) == pair + (module.out_features if counts else 0)


@pytest.mark.parametrize("kind", tiny.FEW)
@pytest.mark.parametrize("method", ["afm", "lord", "rankwise"])
def test_a_checkpoint_of_uncentred_bases_has_no_bias_to_count(method: str, kind: str) -> None:
    settings = Covariance(estimator="uncentred", gradients="predict")
    bases = rankwise_samples.bases_of(tiny.model(kind), kind, samples.TOKENS, settings)
    model, ranks = samples.compressed(method, kind, 25, given_bases=bases, covariance="uncentred")
    dense, kept = tiny.model(kind), 0
    for module in Budget.of(samples.shape_of(kind)).modules:
        layer, rank = model.get_submodule(module.name), ranks[module.name]
        own = dense.get_submodule(module.name).bias
        m, n = module.out_features, module.in_features
        block = (rank or 0) * ((rank or 0) - 1) if method == "rankwise" else 0
        kept += m * n if rank is None else rank * (m + n) - block
        if rank is not None:
            bias = layer.bias if method == "rankwise" else layer.up.bias
            assert (bias is None) == (own is None), module.name
    counts = samples.count_parameters(model, samples.shape_of(kind))
    assert counts["decoder_linears"] == kept <= 0.75 * counts["decoder_linears_dense"]

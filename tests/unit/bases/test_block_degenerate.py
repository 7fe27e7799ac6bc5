"""Inputs that statistics rarely meet: constant, rank-deficient, too few, huge, rounded; correct results or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lowrank.bases.block import bases_of_block
from lowrank.bases.principal import load_basis
from lowrank.calibration.moments import Moments
from lowrank.calibration.statistics import collect_statistics, load_moments
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of, replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.ranks.budget import Budget, largest_rank
from tests.unit.calibration.test_moments import NAIVE, UNCENTRED, accumulate, pooled
from tests.unit.model.test_families import CPU, POOLED, a_model, a_shape, calls_of, some_tokens

BLOCKS = 2


def factors_of(
    model: PreTrainedModel, tokens: torch.Tensor, covariance: Covariance, rank: int, folder: Path
) -> dict[str, LowRankFactors]:
    """Factors of all layers but v, each of the rank or of the largest that saves parameters."""
    family = family_of(model)
    factors = {}
    for layer, file in enumerate(collect_statistics(model, tokens, 1, folder, CPU)):
        where = f"{family.blocks}.{layer}"
        modules = {t.name: (t, model.get_submodule(f"{where}.{t.path}")) for t in family.types if t.name != "v"}
        linears = {name: (t.site, module.weight, module.bias) for name, (t, module) in modules.items()}
        stored = bases_of_block(linears, load_moments(file, family.sites), covariance, CPU, where)
        for name, (linear, module) in modules.items():
            kept = min(rank, largest_rank(*module.weight.shape))
            factors[f"{where}.{linear.path}"] = load_basis(stored, name, module.weight).factors(kept)
    return factors


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_fewer_tokens_than_dimensions_are_reproduced_exactly(name: str, tmp_path: Path) -> None:
    """Ten tokens vary in nine directions, so rank 9 loses nothing of them."""
    model = a_model(name)
    tokens = some_tokens(1, seed=0)[:, :10]
    dense = model(tokens).logits
    replace_modules(model, factors_of(model, tokens, NAIVE, 9, tmp_path))
    assert torch.allclose(model(tokens).logits, dense, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("covariance", [NAIVE, UNCENTRED, pooled(1)], ids=lambda c: c.estimator)
def test_one_window_is_enough(covariance: Covariance, tmp_path: Path) -> None:
    model = a_model("llama")
    tokens = some_tokens(1, seed=0)
    dense = model(tokens).logits
    replace_modules(model, factors_of(model, tokens, covariance, 8, tmp_path))
    assert bool(model(tokens).logits.isfinite().all())
    assert float((model(tokens).logits - dense).norm() / dense.norm()) < 0.9


def test_more_groups_than_windows_name_the_block_and_the_input(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"^model\.layers\.0, attention: .* over 2 groups needs as many windows"):
        factors_of(a_model("llama"), some_tokens(1, seed=0), pooled(2), 8, tmp_path)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_calibration_on_one_and_the_same_token_keeps_its_output(name: str, tmp_path: Path) -> None:
    """Every feature is constant (up to the position, in OPT): the mean alone says what the layers give."""
    model = a_model(name)
    if name == "opt":
        model.get_submodule("model.decoder.embed_positions").weight.zero_()
    tokens = torch.full((5, 24), 7)
    dense = model(tokens).logits
    replace_modules(model, factors_of(model, tokens, POOLED, 8, tmp_path))
    assert torch.allclose(model(tokens).logits, dense, atol=1e-4 * float(dense.abs().max()))


def test_dead_weights_give_dead_factors(tmp_path: Path) -> None:
    model = a_model("opt")
    dead = "model.decoder.layers.1.fc1"
    model.get_submodule(dead).weight.zero_()
    bias = model.get_submodule(dead).bias
    pair = factors_of(model, some_tokens(6, seed=0), POOLED, 8, tmp_path)[dead]
    assert torch.allclose(pair.up @ pair.down, torch.zeros(80, 48))
    assert torch.allclose(pair.bias, bias, atol=1e-6)
    assert torch.allclose(pair.up.T @ pair.up, torch.eye(8), atol=1e-6)


@pytest.mark.parametrize(("features", "allowed"), [(slice(5, 6), 1e-6), (slice(None), 0.01)], ids=["one", "all"])
@pytest.mark.parametrize(("m", "n"), [(128, 256), (320, 256)])
def test_a_token_of_ten_thousand_deviations_costs_one_direction(
    m: int, n: int, features: slice, allowed: float
) -> None:
    """Products in float32 and through a file, as for real models, and a token that is huge in one or all features."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(16, 256, n)) @ rng.normal(size=(n, n)) / n**0.5).astype(np.float32)
    x[3, 0, features] = 1e4
    w = rng.normal(size=(m, n)).astype(np.float32)
    moments = Moments.from_tensors(accumulate(x, 2).tensors("mlp"), "mlp")
    stored = bases_of_block({"gate": ("mlp", torch.tensor(w), None)}, {"mlp": moments}, NAIVE, CPU, "block")
    directions = load_basis(stored, "gate", torch.tensor(w)).factors(60).up.double().numpy()
    y = x.reshape(-1, n).astype(np.float64) @ w.T.astype(np.float64)
    ordinary = np.delete(y, 3 * 256, axis=0)

    def lost(outputs: np.ndarray) -> float:
        centred = outputs - outputs.mean(axis=0)
        return float(((centred - centred @ directions @ directions.T) ** 2).sum())

    def least(outputs: np.ndarray, rank: int) -> float:
        centred = outputs - outputs.mean(axis=0)
        return float(np.linalg.eigvalsh(centred.T @ centred)[:-rank].sum())

    assert least(y, 60) * (1 - 1e-9) <= lost(y) < least(y, 60) * (1 + allowed)
    assert lost(ordinary) < least(ordinary, 59) * (1 + allowed)


def test_a_bfloat16_model_is_compressed_as_its_float32_twin(tmp_path: Path) -> None:
    rounded = a_model("qwen2").bfloat16()
    exact = a_model("qwen2").bfloat16().float()
    calibration, tokens = some_tokens(12, seed=1), some_tokens(2, seed=2)
    for model, folder in ((rounded, "bfloat16"), (exact, "float32")):
        replace_modules(model, factors_of(model, calibration, POOLED, 16, tmp_path / folder))
    logits, expected = rounded(tokens).logits.float(), exact(tokens).logits
    dense = a_model("qwen2")(tokens).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.05
    assert float((expected - dense).norm() / expected.norm()) > 0.3  # what compression does is not of that size
    layer = rounded.get_submodule("model.layers.1.self_attn.q_proj")
    assert layer.up.weight.dtype == layer.up.bias.dtype == torch.bfloat16


def test_inputs_that_overflow_float16_name_the_layer(tmp_path: Path) -> None:
    model = a_model("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1e6)
    model.get_submodule("model.layers.1.mlp.gate_proj").weight.mul_(100)
    factors_of(model, some_tokens(2, seed=0), NAIVE, 8, tmp_path / "float32")
    with pytest.raises(RankwiseError, match=r"^model\.layers\.1\.mlp\.down_proj: inputs are not finite.*float32"):
        factors_of(model.half(), some_tokens(2, seed=0), NAIVE, 8, tmp_path / "float16")


def test_weights_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = a_model("llama")
    model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 4] = float("nan")
    with pytest.raises(RankwiseError, match=r"^model\.layers\.1: outputs are not finite.*weights are damaged"):
        factors_of(model, some_tokens(2, seed=0), NAIVE, 8, tmp_path)


def test_statistics_of_windows_of_one_token(tmp_path: Path) -> None:
    model = a_model("llama")
    tokens = some_tokens(3, seed=0).reshape(-1, 1)
    factors = factors_of(model, tokens, NAIVE, 8, tmp_path)
    seen = calls_of(model, list(factors), tokens)
    assert set(factors) == {m.name for m in Budget.of(a_shape("llama")).modules if m.type.name != "v"}
    for name, pair in factors.items():
        outputs = seen[name][1].reshape(len(tokens), -1)
        directions = np.linalg.eigh(np.cov(outputs.T))[1][:, -pair.rank :]
        projector = (pair.up @ pair.up.T).double().numpy()
        scatter = np.cov(outputs.T)
        lost = np.trace(scatter) - np.trace(projector @ scatter)
        best = np.trace(scatter) - np.trace(directions.T @ scatter @ directions)
        assert lost == pytest.approx(best, rel=1e-3, abs=1e-6 * np.trace(scatter))

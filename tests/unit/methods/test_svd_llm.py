"""SVD-LLM: whitening against numpy and against its other names, and the update against plain least squares."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lowrank.bases import whitening
from lowrank.bases.principal import principal_basis
from lowrank.bases.whitening import RIDGE, cholesky_factor, whitened_factors
from lowrank.compression import compressed_inputs
from lowrank.compression.least_squares_update import refit_up_factors
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.methods import svd_llm
from lowrank.model.checkpoint import replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.ranks.budget import Budget
from lowrank.ranks.by_type import uniform_ranks
from tests import tiny
from tests.unit.model import factor_samples as samples
from tests.unit.model.factor_samples import CPU, TOKENS


def layer_and_inputs(m: int, n: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight m x n, and correlated inputs n x tokens with a mean."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.double)
    x = mix @ torch.randn(n, tokens, generator=g, dtype=torch.double)
    return torch.randn(m, n, generator=g, dtype=torch.double), x + torch.randn(n, 1, generator=g, dtype=torch.double)


def whitened(w: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    """W' of this project."""
    pair = whitened_factors(w, cholesky_factor(x @ x.T / x.shape[1], "layer"), "layer").factors(rank, None)
    return pair.up @ pair.down


def drone(w: torch.Tensor, x: torch.Tensor, rank: int) -> torch.Tensor:
    """DRONE: decompose W and X, truncate the product of their cores, map back (pseudo-inverse of X's core)."""
    u_w, s_w, v_w = np.linalg.svd(w.numpy(), full_matrices=False)
    u_x, s_x, _ = np.linalg.svd(x.numpy(), full_matrices=False)
    keep = s_x > 1e-10 * s_x[0]
    u_x, s_x = u_x[:, keep], s_x[keep]
    core = (s_w[:, None] * v_w) @ (u_x * s_x)
    u, s, v = np.linalg.svd(core, full_matrices=False)
    return torch.from_numpy(u_w @ (u[:, :rank] * s[:rank]) @ (v[:rank] / s_x) @ u_x.T)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(6, 20), n=st.integers(6, 20), seed=st.integers(0, 999))
def test_whitening_uncentred_bases_and_drone_are_one_method(m: int, n: int, seed: int) -> None:
    w, x = layer_and_inputs(m, n, 80, seed)
    assume(float(torch.linalg.cond(x)) < 1e4)  # the textbook inverts a root of x x'
    basis = principal_basis(w, None, x @ x.T / 80, torch.zeros(n, dtype=torch.double), "layer")
    size = float(w.abs().max())
    for rank in range(1, basis.directions.shape[1] + 1):
        ours = whitened(w, x, rank)
        pair = basis.factors(rank)
        assert torch.allclose(ours, pair.up @ pair.down, rtol=0, atol=1e-10 * size)
        assert torch.allclose(ours, drone(w, x, rank), rtol=0, atol=1e-10 * size)
        root = np.linalg.cholesky((x @ x.T).numpy())
        textbook = samples.truncation(w @ torch.from_numpy(root), rank).numpy() @ np.linalg.inv(root)
        assert np.allclose(ours.numpy(), textbook, rtol=0, atol=1e-9 * size)
        values, vectors = np.linalg.eigh((x @ x.T).numpy())  # SVD-LLM-V2's square root
        other = torch.from_numpy(vectors * np.sqrt(values))
        by_eigenvectors = samples.truncation(w @ other, rank).numpy() @ np.linalg.inv(other.numpy())
        assert np.allclose(ours.numpy(), by_eigenvectors, rtol=0, atol=1e-9 * size)
        best = w @ x - samples.truncation(w @ x, rank)  # no matrix of this rank comes nearer to W X
        assert float((w @ x - ours @ x).norm()) == pytest.approx(float(best.norm()), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(6, 20), n=st.integers(8, 20), tokens=st.integers(3, 7), seed=st.integers(0, 999))
def test_with_fewer_tokens_than_features_the_optimum_is_reached_all_the_same(
    m: int, n: int, tokens: int, seed: int
) -> None:
    w, x = layer_and_inputs(m, n, tokens, seed)
    for rank in range(1, min(m, tokens) + 1):
        best = float((w @ x - samples.truncation(w @ x, rank)).norm())
        assert float((w @ x - drone(w, x, rank) @ x).norm()) == pytest.approx(best, rel=1e-9, abs=1e-9)
        ridge = 2e-3 * float((w @ x).norm())  # the root of the ridge, 1e-6 of the mean square
        assert float((w @ x - whitened(w, x, rank) @ x).norm()) <= best + ridge


def test_a_singular_second_moment_gets_the_documented_ridge() -> None:
    _, x = layer_and_inputs(4, 12, 5, 0)
    c = x @ x.T / 5
    c[3], c[:, 3] = 0, 0  # a dead feature too
    c -= 1e-9 * torch.eye(12, dtype=torch.double)
    lowest, mean = float(torch.linalg.eigvalsh(c)[0]), float(c.diagonal().mean())
    assert lowest < 0
    root = cholesky_factor(c, "layer")
    expected = c + (RIDGE * mean - lowest) * torch.eye(12, dtype=torch.double)
    assert torch.allclose(root @ root.T, expected, rtol=0, atol=1e-13 * mean)
    assert torch.equal(root, root.tril())
    regular = c + torch.eye(12, dtype=torch.double)
    root = cholesky_factor(regular, "layer")
    assert torch.allclose(root @ root.T, regular, rtol=0, atol=1e-13)


def test_inputs_that_say_nothing_name_the_layer() -> None:
    with pytest.raises(RankwiseError, match=r"block 1, input 'mlp': all its inputs are zero"):
        cholesky_factor(torch.zeros(4, 4), "block 1, input 'mlp'")
    with pytest.raises(RankwiseError, match=r"block 1, input 'mlp': .* not finite"):
        cholesky_factor(torch.full((4, 4), float("nan")), "block 1, input 'mlp'")
    with pytest.raises(RankwiseError, match=r"q: .* not finite"):
        whitened_factors(torch.full((4, 4), float("inf")), torch.eye(4, dtype=torch.double), "q")


@pytest.mark.parametrize("kind", tiny.FEW)
def test_every_layer_is_nearest_to_its_outputs(kind: str) -> None:
    dense = tiny.model(kind)
    inputs = samples.inputs_of_layers(dense)
    model, ranks = samples.compressed("svd-llm", kind, 30)
    assert ranks == uniform_ranks(replace(Budget.of(samples.shape_of(kind)), adds_bias=False), 30, ())
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer, x = dense.get_submodule(name), inputs[name]
        y = x @ layer.weight.double().T
        assert torch.allclose(
            x @ samples.product(model, name).T, samples.truncation(y, rank), atol=2e-4 * float(y.abs().max())
        )
        bias = model.get_submodule(name).up.bias
        assert (bias is None) == (layer.bias is None)
        assert bias is None or torch.equal(bias, layer.bias)


def pairs_of(kind: str, ratio: int) -> tuple[dict[str, LowRankFactors], Budget]:
    """The pairs of a tiny float64 model without an update."""
    model, ranks = samples.compressed("svd-llm", kind, ratio, model=tiny.model(kind).double())
    layers = {name: model.get_submodule(name) for name, rank in ranks.items() if rank is not None}
    pairs = {name: LowRankFactors(layer.down.weight, layer.up.weight, layer.up.bias) for name, layer in layers.items()}
    return pairs, Budget.of(samples.shape_of(kind))


@pytest.mark.parametrize("target", ["dense", "inputs"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_the_update_is_least_squares_on_the_inputs_in_the_compressed_model(kind: str, target: str) -> None:
    """Against plain passes through models rebuilt one site at a time, and numpy's least squares."""
    dense = tiny.model(kind).double()
    pairs, budget = pairs_of(kind, 40)
    got = refit_up_factors(dense, TOKENS, budget, pairs, CPU, target)
    assert got.keys() == pairs.keys()
    targets = samples.inputs_of_layers(dense)
    rebuilt = copy.deepcopy(dense)
    done: dict[tuple[int, str], dict[str, LowRankFactors]] = {}
    for module in budget.modules:
        if module.name in pairs:
            done.setdefault((module.layer, module.type.site), {})
    for layer, site in done:
        inputs = samples.inputs_of_layers(rebuilt)
        for module in budget.modules:
            if (module.layer, module.type.site) != (layer, site) or module.name not in pairs:
                continue
            weight, pair = dense.get_submodule(module.name).weight, pairs[module.name]
            read = inputs[module.name]
            z, y = read @ pair.down.T, (targets[module.name] if target == "dense" else read) @ weight.T
            up = np.linalg.lstsq(z.numpy(), y.numpy(), rcond=None)[0].T
            assert np.allclose(got[module.name].up.numpy(), up, atol=1e-8 * np.abs(up).max()), module.name
            assert torch.equal(got[module.name].down, pair.down)
            done[layer, site][module.name] = replace(pair, up=torch.from_numpy(up))
            before, after = (float((y - z @ u.T).norm()) for u in (pair.up, got[module.name].up))
            assert after <= before * (1 + 1e-9)
        replace_modules(rebuilt, done[layer, site])
    assert torch.equal(dense(TOKENS).logits, tiny.model(kind).double()(TOKENS).logits), "the model was changed"


def test_batches_do_not_change_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, budget = pairs_of("llama-gqa", 40)
    whole = refit_up_factors(tiny.model("llama-gqa").double(), TOKENS, budget, pairs, CPU, "dense")
    monkeypatch.setattr(compressed_inputs, "TOKENS_PER_BATCH", 3 * TOKENS.shape[1])
    parts = refit_up_factors(tiny.model("llama-gqa").double(), TOKENS, budget, pairs, CPU, "dense")
    for name, pair in whole.items():
        assert torch.allclose(pair.up, parts[name].up, atol=1e-9)


@pytest.mark.parametrize("target", ["dense", "inputs"])
def test_a_stopped_update_goes_on_after_the_last_block(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And decomposes no matrix of a finished block again."""
    more = {"update": True, "target": target}
    expected, ranks = samples.compressed("svd-llm", "llama-gqa", 30, **more)
    parts, decomposed = Parts(tmp_path), []
    save, decompose = parts.save, whitening.whitened_factors

    def run() -> dict[str, torch.Tensor]:
        model, same = samples.compressed("svd-llm", "llama-gqa", 30, finished_parts=parts, **more)
        assert same == ranks
        return model.state_dict()

    def counted(weight: torch.Tensor, root: torch.Tensor, where: str) -> Any:
        decomposed.append(where)
        return decompose(weight, root, where)

    def stop(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save(name, tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(whitening, "whitened_factors", counted)
    monkeypatch.setattr(parts, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [file.name for file in tmp_path.glob("block*")] == ["block_0.safetensors"]
    monkeypatch.setattr(parts, "save", save)
    again = run()
    assert decomposed == [name for name, rank in ranks.items() if rank is not None]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again[name], tensor), name
    kept = tmp_path / "block_0.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(RankwiseError, match=f"damaged.* Delete {tmp_path} and run the workflow again"):
        run()


def test_what_the_inputs_say_nothing_about_keeps_its_factor() -> None:
    """Four tokens for ranks of 8 to 32: the update fits them, and moves nothing that they do not show."""
    dense = tiny.model("llama").double()
    pairs, budget = pairs_of("llama", 40)
    tokens = TOKENS[:1, :4]
    got = refit_up_factors(dense, tokens, budget, pairs, CPU, "dense")
    name = next(iter(pairs))
    inputs = samples.inputs_of_layers(dense, tokens)[name]
    z, y = inputs @ pairs[name].down.T, inputs @ dense.get_submodule(name).weight.T
    seen = torch.linalg.qr(z.T).Q
    change = got[name].up - pairs[name].up
    assert float((y - z @ got[name].up.T).norm()) < 1e-2 * float((y - z @ pairs[name].up.T).norm())
    assert float((change - change @ seen @ seen.T).norm()) < 1e-6 * float(change.norm())


@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_the_update_to_dense_outputs_brings_the_model_nearer_to_the_dense_one(kind: str) -> None:
    dense = tiny.model(kind)(TOKENS).logits
    plain, ranks = samples.compressed("svd-llm", kind, 30)
    updated, same = samples.compressed("svd-llm", kind, 30, update=True, target="dense")
    assert ranks == same
    errors = [float((model(TOKENS).logits - dense).norm()) for model in (plain, updated)]
    assert errors[1] < errors[0]


def test_windows_limit_the_update_and_belong_to_it() -> None:
    few, _ = samples.compressed("svd-llm", "llama", 30, update=True, windows=2)
    same, _ = samples.compressed("svd-llm", "llama", 30, update=True, tokens=TOKENS[:2])
    assert torch.equal(few(TOKENS).logits, same(TOKENS).logits)
    with pytest.raises(ValidationError, match="is for `update: true` only"):
        svd_llm.Settings(kind="svd-llm", calibration="c", windows=2)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_ratio_of_zero_changes_nothing(kind: str, update: bool) -> None:
    samples.check_unchanged_at_ratio_zero("svd-llm", kind, update=update)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(list(tiny.FEW)), ratio=st.integers(5, 70), update=st.booleans())
def test_the_budget_holds(kind: str, ratio: int, update: bool) -> None:
    samples.check_budget("svd-llm", kind, ratio, update=update)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_checkpoint_is_the_model(kind: str, update: bool, tmp_path: Path) -> None:
    model, _ = samples.compressed("svd-llm", kind, 25, update=update)
    samples.check_round_trip(model, tmp_path)

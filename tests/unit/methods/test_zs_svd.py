"""ZS-SVD: losses of singular directions by autograd and numpy, the choice over all matrices, corrections, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.bases.first_order import loss_changes
from lowrank.bases.principal import principal_basis
from lowrank.compression import gradient_correction
from lowrank.compression.compress import compress_model
from lowrank.compression.gradient_correction import corrected_weight
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.methods import zs_svd
from lowrank.methods.zs_svd import Settings
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from lowrank.ranks.predicted_loss import allocate
from tests import tiny
from tests.unit.model import factor_samples as samples
from tests.unit.ranks.test_zero_sum import slow_rounding, slow_walk

TOKENS = samples.TOKENS


def loss_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, tokens[:, 1:].flatten())


def gradients(model: PreTrainedModel, names: Iterable[str], tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    """Of the mean loss, by autograd."""
    names = list(names)
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    found = torch.autograd.grad(loss_of(model, tokens), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip(names, found, strict=True))


def compressed(kind: str, ratio: int, **more: Any) -> tuple[PreTrainedModel, dict[str, int | None]]:
    """A tiny float64 model by the method."""
    model = tiny.model(kind).double()
    return samples.compressed("zs-svd", kind, ratio, model=model, moments=samples.statistics(kind, double=True), **more)


def by_the_book(w: np.ndarray, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors of W S, and -sigma_i u_i' g S^-T v_i, with S Cholesky's factor of E[x x']."""
    s = np.linalg.cholesky(x.T @ x / len(x))
    u, sigma, vh = np.linalg.svd(w @ s, full_matrices=False)
    h = g @ np.linalg.inv(s).T
    return u, np.array([-sigma[i] * (u[:, i] @ h @ vh[i]) for i in range(len(sigma))])


@settings(max_examples=30, deadline=None)
@given(m=st.integers(4, 20), n=st.integers(4, 20), seed=st.integers(0, 999))
def test_changes_are_singular_values_times_derivatives(m: int, n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((80, n)) @ draw.standard_normal((n, n)) + draw.standard_normal(n)
    w, g = draw.standard_normal((m, n)), draw.standard_normal((m, n))
    basis = principal_basis(
        torch.from_numpy(w), None, torch.from_numpy(x.T @ x / 80), None, "layer", all_directions=True
    )
    changes = loss_changes(basis, torch.from_numpy(g))
    _, expected = by_the_book(w, x, g)
    assert np.allclose(changes.numpy(), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    assert float(changes.sum()) == pytest.approx(-(w * g).sum(), rel=1e-9, abs=1e-9), "all of W leaves"


def test_a_change_is_the_slope_of_the_loss_on_the_way_to_leaving_the_direction_out() -> None:
    """By finite differences of the loss itself."""
    kind, name = "llama-gqa", "model.layers.0.mlp.up_proj"
    model = tiny.model(kind).double()
    layer, x = model.get_submodule(name), samples.inputs_of_layers(model)[name]
    weight = layer.weight.clone()
    basis = principal_basis(weight, None, x.T @ x / len(x), None, name, all_directions=True)
    changes = loss_changes(basis, gradients(model, [name])[name])
    step = 1e-2  # norms of the model are taken in float32
    for index in (0, 5, 40):
        term = torch.outer(basis.directions[:, index], basis.projection[index])
        losses = []
        for sign in (1, -1):
            layer.weight.data = weight - sign * step * term
            losses.append(float(loss_of(model, TOKENS)))
        assert float(changes[index]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-3)


@pytest.mark.parametrize("allocation", ["zero-sum", "smallest"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_model_is_that_of_a_slow_reference(kind: str, allocation: str) -> None:
    account: dict[str, Any] = {}
    model, ranks = compressed(kind, 30, allocation=allocation, account=account)
    dense = tiny.model(kind).double()
    budget = replace(Budget.of(samples.shape_of(kind)), adds_bias=False)
    inputs, slopes = samples.inputs_of_layers(dense), gradients(dense, ranks)
    directions, changes = {}, {}
    for name in ranks:
        layer = dense.get_submodule(name)
        directions[name], changes[name] = by_the_book(layer.weight.numpy(), inputs[name].numpy(), slopes[name].numpy())
    wanted = slow_walk(budget, 30, changes, (), allocation == "zero-sum")
    assert ranks == slow_rounding(budget, 30, wanted)
    assert any(ranks.values())
    assert len(set(ranks.values())) > 2, "one rank for all"
    left_out = sum(changes[name][rank:].sum() for name, rank in ranks.items() if rank)
    assert account["predicted_loss_change"]["nats_per_token"] == pytest.approx(left_out, rel=1e-3, abs=1e-8)
    for name, rank in ranks.items():
        layer, found = dense.get_submodule(name), model.get_submodule(name)
        if rank is None:
            assert torch.equal(found.weight, layer.weight)
            continue
        u = torch.from_numpy(directions[name][:, :rank])
        expected = u @ u.T @ layer.weight
        assert torch.allclose(samples.product(model, name), expected, atol=1e-5 * float(expected.abs().max())), name
        assert (found.up.bias is None) == (layer.bias is None)
        assert layer.bias is None or torch.equal(found.up.bias, layer.bias)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_second_order_allocates_the_same_directions_by_what_they_cost(kind: str) -> None:
    moments = samples.output_gradients(kind)
    model, ranks = compressed(kind, 30, allocation="predicted-loss", gradients=moments, tokens=None)
    dense = tiny.model(kind).double()
    budget = replace(Budget.of(samples.shape_of(kind)), adds_bias=False)
    inputs, losses, directions = samples.inputs_of_layers(dense), {}, {}
    for module in budget.modules:
        w, x = dense.get_submodule(module.name).weight.numpy(), inputs[module.name].numpy()
        u, sigma, _ = np.linalg.svd(w @ np.linalg.cholesky(x.T @ x / len(x)), full_matrices=False)
        g = moments.of(module.layer)[module.type.name].double().numpy()
        losses[module.name] = np.array([s**2 * (v @ g @ v) / 2 for s, v in zip(sigma, u.T, strict=True)])
        directions[module.name] = torch.from_numpy(u)
    assert ranks == allocate(budget, 30, losses).ranks
    assert ranks != compressed(kind, 30)[1]
    for name, rank in ranks.items():
        if rank is not None:
            u = directions[name][:, :rank]
            expected = u @ u.T @ dense.get_submodule(name).weight
            assert torch.allclose(samples.product(model, name), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_corrections_step_along_the_gradient_and_truncate_again(kind: str) -> None:
    rounds = 2
    plain, ranks = compressed(kind, 30)
    model, same = compressed(kind, 30, corrections=rounds)
    assert same == ranks
    dense = tiny.model(kind).double()
    inputs = samples.inputs_of_layers(dense)
    pairs = {name: rank for name, rank in ranks.items() if rank is not None}
    current = {name: samples.product(plain, name) for name in pairs}
    for _ in range(rounds):
        rebuilt = copy.deepcopy(dense)
        for name, weight in current.items():
            rebuilt.get_submodule(name).weight.data = weight
        slopes = gradients(rebuilt, pairs)
        for name, rank in pairs.items():
            w, g, x = dense.get_submodule(name).weight, slopes[name].flatten(), inputs[name]
            lost = (w - current[name]).flatten()
            moved = current[name] + (lost @ g / (g @ g) * g).view(w.shape)
            s = torch.from_numpy(np.linalg.cholesky((x.T @ x / len(x)).numpy()))
            current[name] = samples.truncation(moved @ s, rank) @ torch.linalg.inv(s)
    for name, expected in current.items():
        size = float(expected.abs().max())
        assert torch.allclose(samples.product(model, name), expected, atol=1e-4 * size), name
    assert any(not torch.allclose(samples.product(plain, name), current[name], atol=1e-3) for name in pairs)
    again = tiny.model(kind).double()
    assert torch.equal(dense(TOKENS).logits, again(TOKENS).logits)


@pytest.mark.parametrize("stopped", ["first truncation", "first block of a round", "round", "last block", "last round"])
@pytest.mark.parametrize("allocation", ["zero-sum", "predicted-loss"])
def test_stopped_corrections_go_on_after_the_last_block(
    allocation: str, stopped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, rounds = "llama-gqa", 2
    preset = {"kind": "zs-svd", "calibration": "c", "allocation": allocation, "corrections": rounds}
    parts, corrected, saved = Parts(tmp_path), [], []
    save, correct_one = parts.save, gradient_correction._corrected

    def run(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        model, account = tiny.model(kind).double(), dict[str, Any]()
        task: dict[str, Any] = {"model": model, "budget": Budget.of(samples.shape_of(kind)), "ratio": 30, "seed": 0}
        task |= {"tokens": TOKENS, "statistics": samples.statistics(kind, double=True), "account": account}
        task |= {"gradients": samples.output_gradients(kind), "parts": parts if folder == tmp_path else Parts(folder)}
        ranks = compress_model("zs-svd", preset, task)
        return model.state_dict(), account | ranks

    def counted(model: PreTrainedModel, module: Any, *more: Any) -> Any:
        corrected.append(module.name)
        return correct_one(model, module, *more)

    def stop(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save(name, tensors)
        saved.append((name, int(tensors["number"])))
        if (
            saved[-1]
            == {
                "first truncation": ("round", 0),
                "first block of a round": ("block_0", 2),
                "round": ("round", 1),
                "last block": (f"block_{tiny.LAYERS - 1}", 2),
                "last round": ("round", 2),
            }[stopped]
        ):
            raise KeyboardInterrupt

    def called(name: str, made: Any) -> Any:
        return lambda *arguments: calls.append(name) or made(*arguments)

    whole, told = run(tmp_path / "whole")
    calls: list[str] = []
    monkeypatch.setattr(zs_svd, "_truncate", called("truncation", zs_svd._truncate))
    monkeypatch.setattr(gradient_correction, "mean_gradients", called("gradients", gradient_correction.mean_gradients))
    monkeypatch.setattr(gradient_correction, "_corrected", counted)
    monkeypatch.setattr(parts, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(parts, "save", save)
    again, same = run(tmp_path)
    assert same == told
    assert len(corrected) == rounds * sum(1 for part in told.values() if isinstance(part, int)), "none is made twice"
    twice = stopped == "first block of a round"  # the gradients of the other blocks
    assert sorted(calls) == ["gradients"] * (rounds + twice) + ["truncation"]
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name
    kept = tmp_path / "round.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(RankwiseError, match=f"damaged.* Delete {tmp_path} and run the workflow again"):
        run(tmp_path)


def test_one_shot_keeps_nothing(tmp_path: Path) -> None:
    """It ends with the truncation; what is written then is the checkpoint."""
    task = {"model": tiny.model("llama"), "budget": Budget.of(samples.shape_of("llama")), "ratio": 30, "seed": 0}
    task |= {"tokens": TOKENS, "statistics": samples.statistics("llama"), "parts": Parts(tmp_path)}
    compress_model("zs-svd", {"kind": "zs-svd", "calibration": "c"}, task)
    assert not list(tmp_path.iterdir())


def test_a_corrected_weight_is_nearer_to_the_dense_one_and_stays_where_nothing_pulls() -> None:
    draw = torch.Generator().manual_seed(0)
    dense, truncated, gradient = (torch.randn(6, 9, generator=draw, dtype=torch.float64) for _ in range(3))
    corrected = corrected_weight(dense, truncated, gradient)
    assert float((dense - corrected).norm()) < float((dense - truncated).norm())
    assert float(((dense - corrected) * gradient).sum()) == pytest.approx(0, abs=1e-12)
    assert torch.equal(corrected_weight(dense, truncated, gradient * 0), truncated)
    assert torch.allclose(corrected_weight(dense, truncated, dense - truncated), dense)


def test_sequences_are_the_first_windows() -> None:
    for more in ({}, {"corrections": 1}):
        first, _ = compressed("llama-gqa", 25, sequences=3, **more)
        same, _ = compressed("llama-gqa", 25, tokens=TOKENS[:3], **more)
        every, _ = compressed("llama-gqa", 25, **more)
        assert torch.equal(first(TOKENS).logits, same(TOKENS).logits)
        assert not torch.allclose(first(TOKENS).logits, every(TOKENS).logits)


@pytest.mark.parametrize("corrections", [0, 1])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_ratio_of_zero_changes_nothing(kind: str, corrections: int) -> None:
    samples.check_unchanged_at_ratio_zero("zs-svd", kind, corrections=corrections)


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(list(tiny.FEW)),
    ratio=st.integers(5, 70),
    allocation=st.sampled_from(["zero-sum", "smallest", "predicted-loss"]),
)
def test_the_budget_holds(kind: str, ratio: int, allocation: str) -> None:
    more = {} if allocation == "predicted-loss" else {"sequences": 1}
    gradients = samples.output_gradients(kind)
    samples.check_budget("zs-svd", kind, ratio, allocation=allocation, gradients=gradients, **more)


def test_an_identity_block_counts_as_stored() -> None:
    model, ranks = compressed("llama", 30, identity_block=True)
    budget = replace(Budget.of(samples.shape_of("llama")), adds_bias=False)
    counted = replace(budget, identity_block=True).parameters(ranks)
    assert count_parameters(model, samples.shape_of("llama"))["decoder_linears"] == counted
    assert budget.parameters(ranks) > budget.allowed(30) >= counted, "as plain pairs the ranks would be too large"


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, _ = samples.compressed("zs-svd", kind, 25, corrections=1)
    samples.check_round_trip(model, tmp_path)


def test_types_that_stay_dense_pay_nothing() -> None:
    _, ranks = compressed("llama", 20, uncompressed=("v", "down"))
    assert not any(rank for name, rank in ranks.items() if "v_proj" in name or "down_proj" in name)
    with pytest.raises(RankwiseError, match="no linear layers of type fc1"):
        compressed("llama", 20, uncompressed=("fc1",))


def test_what_it_reads_and_refuses() -> None:
    preset = {"kind": "zs-svd", "calibration": "c"}
    assert Settings.model_validate(preset).needs == ("statistics", "tokens")
    second = preset | {"allocation": "predicted-loss"}
    assert Settings.model_validate(second).needs == ("statistics", "gradients")
    assert Settings.model_validate(second | {"corrections": 2}).needs == ("statistics", "gradients", "tokens")
    with pytest.raises(ValidationError, match="says nothing to `allocation: predicted-loss` without `corrections`"):
        Settings.model_validate(second | {"sequences": 4})
    with pytest.raises(ValidationError, match="read no covariance"):
        Settings.model_validate(preset | {"covariance": "v"})
    assert not Settings.model_validate(preset).is_random
    with pytest.raises(RankwiseError, match="has no calibration windows"):
        samples.compressed("zs-svd", "llama", 20, tokens=None)  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    model = tiny.model("llama-gqa")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(RankwiseError, match=r"model\.layers\.1\.mlp\.down_proj"):
        samples.compressed("zs-svd", "llama-gqa", 20, model=model)

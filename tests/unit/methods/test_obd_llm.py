"""OBD-LLM: the truncation whitened on both sides by numpy, IO-SVD's ranks by a slow walk, what it is with G = I."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedModel

from lowrank.calibration.output_gradients import OutputGradients
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, save_tensors
from lowrank.methods.obd_llm import Settings
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.by_type import uniform_ranks
from tests import tiny
from tests.unit.methods.test_zs_svd import gradients as slopes_of
from tests.unit.model import factor_samples as samples
from tests.unit.ranks.test_zero_sum import slow_rounding, slow_walk

TOKENS = samples.TOKENS
DAMPING = 0.01


def compressed(kind: str, ratio: int, **more: Any) -> tuple[PreTrainedModel, Ranks]:
    """A tiny float64 model by the method."""
    given = {"gradients": samples.output_gradients(kind), "moments": samples.statistics(kind, double=True), **more}
    return samples.compressed("obd-llm", kind, ratio, model=tiny.model(kind).double(), **given)


def budget_of(kind: str) -> Budget:
    return replace(Budget.of(samples.shape_of(kind)), adds_bias=False)


def roots(x: np.ndarray, g: np.ndarray, damping: float = DAMPING) -> tuple[np.ndarray, np.ndarray]:
    """S and M with S S' = E[x x'] and M M' = G + damping: lower triangular both."""
    damped = g + damping * np.diag(np.diag(g))
    return np.linalg.cholesky(x.T @ x / len(x)), np.linalg.cholesky(damped)


def terms(w: np.ndarray, x: np.ndarray, g: np.ndarray, damping: float = DAMPING) -> list[np.ndarray]:
    """W as a sum of matrices of rank one, in the order in which ranks grow."""
    s, m = roots(x, g, damping)
    u, sigma, vh = np.linalg.svd(m.T @ w @ s, full_matrices=False)
    left, right = np.linalg.inv(m.T) @ u, vh @ np.linalg.inv(s)
    return [sigma[i] * np.outer(left[:, i], right[i]) for i in range(len(sigma))]


def layers_of(kind: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Layer -> W, its inputs, G."""
    dense, moments = tiny.model(kind).double(), samples.output_gradients(kind)
    inputs = samples.inputs_of_layers(dense)
    found = {}
    for module in budget_of(kind).modules:
        weight = dense.get_submodule(module.name).weight.numpy()
        gradient = moments.of(module.layer)[module.type.name].double().numpy()
        found[module.name] = weight, inputs[module.name].numpy(), gradient
    return found


def check_layers(kind: str, model: PreTrainedModel, ranks: Ranks, damping: float = DAMPING) -> None:
    """Every pair is the sum of the first terms of its matrix."""
    dense, layers = tiny.model(kind).double(), layers_of(kind)
    for name, rank in ranks.items():
        if rank is None:
            continue
        expected = torch.from_numpy(np.sum(terms(*layers[name], damping)[:rank], axis=0))
        assert torch.allclose(samples.product(model, name), expected, atol=1e-4 * float(expected.abs().max())), name
        bias = dense.get_submodule(name).bias
        assert (model.get_submodule(name).up.bias is None) == (bias is None)
        assert bias is None or torch.equal(model.get_submodule(name).up.bias, bias)


@pytest.mark.parametrize(("kind", "damping"), [*((kind, DAMPING) for kind in tiny.FEW), ("opt", 0.3)])
def test_every_layer_is_the_truncation_whitened_on_both_sides(kind: str, damping: float) -> None:
    model, ranks = compressed(kind, 30, damping=damping)
    assert ranks == uniform_ranks(budget_of(kind), 30, ())
    assert any(ranks.values())
    check_layers(kind, model, ranks, damping)


def test_no_input_whitening_costs_as_little() -> None:
    """The cost tr(G E C E') of the difference E, against the truncation that whitens inputs alone."""
    model, ranks = compressed("llama-gqa", 30)
    plain, _ = samples.compressed("svd-llm", "llama-gqa", 30)
    for name, (w, x, g) in layers_of("llama-gqa").items():
        if ranks[name] is None:
            continue
        s, m = roots(x, g)
        ours, theirs = (np.linalg.norm(m.T @ (w - samples.product(one, name).numpy()) @ s) for one in (model, plain))
        assert ours < theirs * (1 - 1e-4), name


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_with_equal_gradients_everywhere_it_is_svd_llm(kind: str, tmp_path: Path) -> None:
    shape = samples.shape_of(kind)
    for layer in range(shape.layers):
        sizes = {module.type.name: module.out_features for module in budget_of(kind).modules if module.layer == layer}
        save_tensors(tmp_path / layer_name(layer), {name: 3e-5 * torch.eye(size) for name, size in sizes.items()})
    equal, ranks = compressed(kind, 30, gradients=OutputGradients(tmp_path, shape))
    plain, same = samples.compressed("svd-llm", kind, 30)
    assert ranks == same
    for name in [name for name, rank in ranks.items() if rank]:
        expected = samples.product(plain, name)
        assert torch.allclose(samples.product(equal, name), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", tiny.FEW)
def test_first_order_ranks_are_those_of_a_slow_walk(kind: str) -> None:
    account: dict[str, Any] = {}
    model, ranks = compressed(kind, 30, allocation="first-order", account=account)
    dense, changes = tiny.model(kind).double(), {}
    slopes = slopes_of(dense, ranks)
    for name, (w, x, g) in layers_of(kind).items():
        changes[name] = np.array([-(slopes[name].numpy() * term).sum() for term in terms(w, x, g)])
    wanted = slow_walk(budget_of(kind), 30, changes, (), balanced=False)
    assert ranks == slow_rounding(budget_of(kind), 30, wanted)
    assert ranks != uniform_ranks(budget_of(kind), 30, ())
    left_out = sum(changes[name][rank:].sum() for name, rank in ranks.items() if rank)
    assert account["predicted_loss_change"]["nats_per_token"] == pytest.approx(left_out, rel=1e-2, abs=1e-6)
    check_layers(kind, model, ranks)


@pytest.mark.parametrize("allocation", ["uniform", "first-order"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_ratio_of_zero_changes_nothing(kind: str, allocation: str) -> None:
    samples.check_unchanged_at_ratio_zero("obd-llm", kind, allocation=allocation)


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(list(tiny.FEW)),
    ratio=st.integers(5, 70),
    more=st.sampled_from([{}, {"allocation": "first-order", "sequences": 1}]),
)
def test_the_budget_holds(kind: str, ratio: int, more: dict[str, Any]) -> None:
    samples.check_budget("obd-llm", kind, ratio, gradients=samples.output_gradients(kind), **more)


def test_sequences_are_the_first_windows() -> None:
    first, _ = compressed("llama-gqa", 25, allocation="first-order", sequences=3)
    same, _ = compressed("llama-gqa", 25, allocation="first-order", tokens=TOKENS[:3])
    every, _ = compressed("llama-gqa", 25, allocation="first-order")
    assert torch.equal(first(TOKENS).logits, same(TOKENS).logits)
    assert not torch.allclose(first(TOKENS).logits, every(TOKENS).logits)


def test_types_are_left_dense_by_first_order_ranks_too() -> None:
    gradients = samples.output_gradients("llama")
    samples.check_left_dense("obd-llm", "llama", 30, allocation="first-order", gradients=gradients)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, _ = compressed(kind, 25)
    samples.check_round_trip(model, tmp_path)


def test_a_layer_that_the_loss_does_not_depend_on_is_named(tmp_path: Path) -> None:
    shape = samples.shape_of("llama")
    for layer in range(shape.layers):
        found = dict(samples.output_gradients("llama").of(layer))
        if layer == 1:
            found["k"] = torch.zeros_like(found["k"])
        save_tensors(tmp_path / layer_name(layer), found)
    with pytest.raises(RankwiseError, match=r"model\.layers\.1\.self_attn\.k_proj: the loss has no gradient"):
        compressed("llama", 30, gradients=OutputGradients(tmp_path, shape))


def test_what_it_reads_and_refuses() -> None:
    preset = {"kind": "obd-llm", "calibration": "c"}
    assert Settings.model_validate(preset).needs == ("statistics", "gradients")
    first = preset | {"allocation": "first-order"}
    assert Settings.model_validate(first).needs == ("statistics", "gradients", "tokens")
    with pytest.raises(ValidationError, match="is for `allocation: first-order` only"):
        Settings.model_validate(preset | {"sequences": 4})
    with pytest.raises(ValidationError, match="is for `allocation: uniform` only"):
        Settings.model_validate(first | {"rounding": "down"})
    with pytest.raises(ValidationError, match="read no covariance"):
        Settings.model_validate(preset | {"covariance": "v"})
    with pytest.raises(RankwiseError, match="has no gradients"):
        compressed("llama", 20, gradients=None)

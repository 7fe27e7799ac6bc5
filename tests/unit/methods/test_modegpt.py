"""MoDeGPT: against its formulas on the inputs of a plain pass, its budget, checkpoints, odd inputs, errors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedModel

from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression.compress import compress_model
from lowrank.compression.widths import Widths
from lowrank.errors import RankwiseError
from lowrank.methods.modegpt import Settings, leverage_scores, shares_of
from lowrank.model.checkpoint import family_of, load_checkpoint, recipe_of, save_checkpoint
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.model import factor_samples
from tests.unit.model.factor_samples import CPU, TOKENS, shape_of

PRESET: dict[str, Any] = {"kind": "modegpt", "calibration": "c"}
WITHOUT_QK = {"parts": ["mlp", "vo"]}
KINDS = tuple(tiny.FEW)


def compressed(kind: str, ratio: int, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    account: dict[str, Any] = {}
    options = (WITHOUT_QK if kind in tiny.FEW and kind not in tiny.PAIRS_GO else {}) | options
    model, ranks = factor_samples.compressed("modegpt", kind, ratio, account=account, **options)
    assert not any(ranks.values())
    return model, account


@cache
def inputs(kind: str) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in factor_samples.inputs_of_layers(tiny.model(kind)).items()}


def names_of(kind: str, layer: int) -> dict[str, str]:
    family = family_of(tiny.model(kind))
    return {linear.name: f"{family.blocks}.{layer}.{linear.path}" for linear in family.types}


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_0_changes_nothing(kind: str) -> None:
    model, _ = compressed(kind, 0)
    assert recipe_of(model) == {}
    assert torch.equal(model(TOKENS).logits, tiny.model(kind)(TOKENS).logits)


def best_neurons(h: np.ndarray, ridge: float, count: int) -> list[int]:
    c = h.T @ h / len(h)
    damped = c + ridge * np.trace(c) / len(c) * np.eye(len(c))
    return sorted(np.argsort(-np.diag(c @ np.linalg.inv(damped)))[:count].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_stay_by_leverage_and_the_last_matrix_is_regressed_on_them(kind: str) -> None:
    model, account = compressed(kind, 30, parts=["mlp"], ridge=0.05, damping=0.001)
    dense = tiny.model(kind)
    for layer, count in enumerate(account["widths"]["mlp"]):
        names = names_of(kind, layer)
        first, last = ("fc1", "fc2") if kind == "opt" else ("up", "down")
        h = inputs(kind)[names[last]]
        kept = best_neurons(h, 0.05, count)
        before, after = dense.get_submodule(names[first]), model.get_submodule(names[first])
        assert torch.equal(after.weight, before.weight[kept])
        assert after.bias is None or torch.equal(after.bias, before.bias[kept])
        size = np.sqrt((h**2).sum(axis=0))
        x = np.vstack([h, np.sqrt(0.001) * np.diag(size)])
        w = array(dense.get_submodule(names[last]).weight)
        expected = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)[0].T * size[kept]
        found = model.get_submodule(names[last])
        assert np.allclose(array(found.weight) * size[kept], expected, atol=2e-4 * np.abs(w * size).max())
        assert found.bias is None or torch.equal(found.bias, dense.get_submodule(names[last]).bias)
    assert not any("self_attn" in name for name in recipe_of(model))


@pytest.mark.parametrize("kind", tiny.PAIRS_GO)
def test_queries_and_keys_keep_what_is_largest_in_both(kind: str) -> None:
    model, account = compressed(kind, 5, parts=["qk"])
    dense, shape = tiny.model(kind), tiny.SHAPES[kind]
    halves = 1 if kind == "opt" else 2
    units, groups = tiny.HEAD_DIM // halves, shape["kv_heads"]
    narrow = 0
    for layer, width in enumerate(account["widths"]["qk"]):
        names = names_of(kind, layer)
        x, sizes = inputs(kind)[names["q"]], []
        for short in ("q", "k"):
            linear = dense.get_submodule(names[short])
            y = x @ array(linear.weight).T + (0 if linear.bias is None else array(linear.bias))
            energy = (y**2).mean(axis=0).reshape(groups, -1, halves, units)
            sizes.append(np.sqrt(energy.sum(axis=(1, 2))))
        narrow += width < tiny.HEAD_DIM
        for short in ("q", "k"):
            linear, found = dense.get_submodule(names[short]), model.get_submodule(names[short])
            heads, rows = linear.out_features // tiny.HEAD_DIM, []
            for head in range(heads):
                group = head * groups // heads
                best = sorted(np.argsort(-(sizes[0] * sizes[1])[group])[: width // halves].tolist())
                rows += [head * tiny.HEAD_DIM + half * units + unit for half in range(halves) for unit in best]
            assert torch.equal(found.weight, linear.weight[rows])
            assert found.bias is None or torch.equal(found.bias, linear.bias[rows])
    assert narrow


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_outputs_are_the_best_product_of_their_rank(kind: str) -> None:
    """The SVD of X W_v' [O_1' ... O_g'] on all samples; a bias of v as one more input, which is always 1."""
    model, account = compressed(kind, 5, parts=["vo"])
    dense, shape = tiny.model(kind), tiny.SHAPES[kind]
    groups, narrow = shape["kv_heads"], 0
    for layer, rank in enumerate(account["widths"]["vo"]):
        names = names_of(kind, layer)
        if rank == tiny.HEAD_DIM:
            continue
        narrow += 1
        x = inputs(kind)[names["v"]]

        def heads(source: PreTrainedModel, width: int, names: dict[str, str] = names, x: np.ndarray = x) -> np.ndarray:
            """What each query head adds to the block's output for a token's own value: heads x tokens x d."""
            v, o = source.get_submodule(names["v"]), source.get_submodule(names["o"])
            value = x @ array(v.weight).T + (0 if v.bias is None else array(v.bias))
            columns = array(o.weight).reshape(tiny.HIDDEN, shape["heads"], width)
            found = []
            for head in range(shape["heads"]):
                group = head * groups // shape["heads"]
                found.append(value[:, group * width : (group + 1) * width] @ columns[:, head].T)
            return np.array(found)

        before, after = heads(dense, tiny.HEAD_DIM), heads(model, rank)
        for group in range(groups):
            shared = shape["heads"] // groups
            product = np.concatenate(before[group * shared : (group + 1) * shared], axis=1)
            u, s, vt = np.linalg.svd(product, full_matrices=False)
            found = np.concatenate(after[group * shared : (group + 1) * shared], axis=1)
            assert np.allclose(found, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-3 * s[0] / np.sqrt(len(x)))
        bias = dense.get_submodule(names["o"]).bias
        assert bias is None or torch.equal(model.get_submodule(names["o"]).bias, bias)
    assert narrow


def test_shares_are_the_softmax_of_influence() -> None:
    influence = [0.9, 0.1, 0.3, 0.35]
    expected = np.exp(-np.array(influence) / 0.1)
    assert np.allclose(shares_of(influence, 0.1), expected / expected.sum())
    assert min(shares_of([0.0, 2.0], 0.01)) > 0
    _, account = compressed("llama", 40, temperature=1e6)
    assert len(set(account["widths"]["vo"])) == 1
    _, account = compressed("llama", 40)
    least, most = np.argsort(account["widths"]["block_influence"])
    assert account["widths"]["mlp"][least] < account["widths"]["mlp"][most]


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), ratio=st.integers(5, 60), multiple=st.sampled_from([2, 4, 8]))
def test_written_models_meet_the_budget(kind: str, ratio: int, multiple: int) -> None:
    model, account = compressed(kind, ratio, multiple=multiple)
    budget, told = Budget.of(shape_of(kind)), account["widths"]
    found = count_parameters(model, shape_of(kind))["decoder_linears"]
    blocks = [Widths(*widths) for widths in zip(told["mlp"], told["qk"], told["vo"], strict=True)]
    assert found == sum(widths.parameters(budget) for widths in blocks) <= budget.allowed(ratio)
    neurons = multiple * (2 if kind == "opt" else 3) * tiny.HIDDEN
    full = all(widths.mlp == tiny.INTERMEDIATE for widths in blocks)
    assert budget.allowed(ratio) - found < neurons or full


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_reads_back_and_generates_with_its_cache(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model, account = compressed(kind, 50)
    assert min(account["widths"]["vo"]) < tiny.HEAD_DIM
    kinds = {entry["kind"] for entry in recipe_of(model).values()}
    assert kinds == {"linear", "narrow_heads"}
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "narrow")
    again = load_checkpoint(tmp_path / "narrow", torch.float32)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    ids = TOKENS[:2, :8]
    cached, plain = (
        again.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_neurons_and_dimensions_without_energy_cost_nothing() -> None:
    """Half of the neurons, a pair of every head and half of v's dimensions are zero, in every block."""
    dense, model = tiny.model("llama"), tiny.model("llama")
    for each in (dense, model):
        for block in each.model.layers:
            block.mlp.up_proj.weight.data[::2] = 0
            block.self_attn.v_proj.weight.data.view(4, 16, 64)[:, ::2] = 0
            block.self_attn.k_proj.weight.data.view(4, 2, 8, 64)[:, :, ::2] = 0
    folder = Path(factor_samples._FOLDER.name) / "no-energy"
    folder.mkdir()
    collect_statistics(dense, TOKENS, 2, folder, CPU)
    task = {"model": model, "budget": Budget.of(shape_of("llama")), "ratio": 49, "seed": 0, "tokens": TOKENS}
    compress_model(
        "modegpt", PRESET | {"temperature": 1e6}, task | {"statistics": Statistics(folder, shape_of("llama"))}
    )
    assert any("self_attn" in name for name in recipe_of(model))
    assert torch.allclose(model(TOKENS).logits, dense(TOKENS).logits, atol=2e-3)


@pytest.mark.parametrize("tokens", [torch.tensor([[7]]), torch.full((5, 24), 7), TOKENS[:1, :10]], ids=str)
def test_odd_calibration_gives_finite_models(tokens: torch.Tensor, tmp_path: Path) -> None:
    """One token, one token again and again, fewer tokens than dimensions: what was seen comes out about as before."""
    model, dense = tiny.model("llama-gqa"), tiny.model("llama-gqa")
    collect_statistics(model, tokens, 2, tmp_path, CPU)
    task = {"model": model, "budget": Budget.of(shape_of("llama-gqa")), "ratio": 20, "seed": 0, "tokens": tokens}
    compress_model("modegpt", PRESET, task | {"statistics": Statistics(tmp_path, shape_of("llama-gqa"))})
    found, expected = model(tokens).logits, dense(tokens).logits
    assert bool(found.isfinite().all())
    assert float((found - expected).norm()) < 0.7 * float(expected.norm())


def test_leverage_of_inputs_that_are_zero() -> None:
    assert torch.equal(leverage_scores(torch.zeros(4, 4, dtype=torch.float64), 0.01, "down"), torch.zeros(4).double())


def test_what_is_not_defined_is_said() -> None:
    with pytest.raises(RankwiseError, match=r"`parts`: family 'qwen3' norms q and k head by head.*parts: \[mlp, vo\]"):
        compressed("qwen3", 20, parts=["mlp", "qk", "vo"])
    with pytest.raises(RankwiseError, match="`multiple`: steps of 16 leave no choice to `qk`, whose width is 16; take"):
        compressed("llama", 20, multiple=16)
    with pytest.raises(RankwiseError, match="removing 60 % is out of reach: blocks that lose 80 % of vo leave 88"):
        compressed("opt", 60, parts=["vo"])
    for wrong in ({"parts": []}, {"parts": ["qk", "qk"]}, {"parts": ["heads"]}, {"temperature": 0}, {"most": 1.0}):
        with pytest.raises(ValidationError):
            Settings(**PRESET | wrong)
    for key in ("ridge", "damping"):
        with pytest.raises(ValidationError, match="is about neurons, and `parts` has no mlp"):
            Settings(**PRESET | {"parts": ["qk", "vo"], key: 0.02})
    for change, key in (({"parts": ["mlp", "qk"]}, "parts"), ({"multiple": 160, "parts": ["mlp"]}, "multiple")):
        budget = Budget.of(shape_of("qwen3"))
        assert [place for place, _ in Settings(**PRESET | change).misfits(budget, 20, None)] == [key]
    budget = Budget.of(shape_of("llama"))
    with pytest.raises(RankwiseError, match="has no calibration windows"):
        compress_model("modegpt", PRESET, {"model": tiny.model("llama"), "budget": budget, "ratio": 20, "seed": 0})
    statistics = replace(factor_samples.statistics("llama"), folder="nowhere")
    task = {"model": tiny.model("llama"), "budget": budget, "ratio": 20, "seed": 0, "tokens": TOKENS}
    with pytest.raises(RankwiseError, match="nowhere"):
        compress_model("modegpt", PRESET, task | {"statistics": statistics})


def test_a_ridge_that_rounding_eats_is_an_error_with_the_layers_name() -> None:
    seen = torch.ones(6, 1, dtype=torch.float64)
    broken = seen @ seen.T - 0.1 * torch.eye(6, dtype=torch.float64)
    with pytest.raises(RankwiseError, match=r"layers\.3\.mlp\.down_proj: .* not positive with a `ridge` of 1e-12"):
        leverage_scores(broken, 1e-12, "layers.3.mlp.down_proj")

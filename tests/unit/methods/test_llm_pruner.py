"""LLM-Pruner: importance against autograd and loops over units, the published sizes, the budget, round trips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lowrank.compression.branches import Structure
from lowrank.compression.compress import compress_model
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.methods.llm_pruner import Settings, removal
from lowrank.model.checkpoint import load_checkpoint, recipe_of, save_checkpoint
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.compression.test_structured import LLAMA_3_8B, SHAPES, mask_channels
from tests.unit.ranks.test_budget import LLAMA_7B, LLAMA_13B, OTHER_7B, OTHER_13B

WITHOUT: dict[str, Any] = {"kind": "llm-pruner", "calibration": "c", "skip_first": 0, "skip_last": 0}
ALL_BLOCKS = WITHOUT | {"sequences": 4, "length": 12}
WITHOUT_WINDOWS = ("l1", "l2", "random")
IMPORTANCES = ("param_first", "param_second", "param_mix", "vectorize", *WITHOUT_WINDOWS)


def some_tokens(windows: int = 6, length: int = 20) -> torch.Tensor:
    return torch.randint(2, 400, (windows, length), generator=torch.Generator().manual_seed(8))


def pruned(
    kind: str, ratio: int = 25, seed: int = 0, tokens: torch.Tensor | None = None, **changes: Any
) -> PreTrainedModel:
    model = tiny.model(kind)
    task = {
        "model": model,
        "budget": Budget.of(ModelShape(**tiny.shape(kind))),
        "ratio": ratio,
        "seed": seed,
    }
    reads = changes.get("importance") not in WITHOUT_WINDOWS
    if reads:
        task["tokens"] = some_tokens() if tokens is None else tokens
    ranks = compress_model("llm-pruner", (ALL_BLOCKS if reads else WITHOUT) | changes, task)
    assert not any(ranks.values())
    return model


def structure_of(shape: ModelShape) -> Structure:
    return Structure.of(replace(Budget.of(shape), adds_bias=False))


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
def test_ratio_0_changes_nothing(kind: str) -> None:
    ids = some_tokens(2)
    for changes in ({}, {"own_ratio": 0.5}):
        assert torch.equal(pruned(kind, ratio=0, **changes)(ids).logits, tiny.model(kind)(ids).logits)


def importance_by_loops(kind: str, importance: str) -> dict[tuple[int, str], np.ndarray]:
    """One unit at a time, in float64, with the gradients of transformers' own loss on the windows that are used."""
    model, shape = tiny.model(kind).double(), ModelShape(**tiny.shape(kind))
    windows = some_tokens()[:4, :12]
    modules = Budget.of(shape).modules
    weights = {m.name: model.get_submodule(m.name).weight for m in modules}
    for weight in weights.values():
        weight.requires_grad_(True)
    per_window = [
        torch.autograd.grad(model(input_ids=ids[None], labels=ids[None]).loss, list(weights.values()))
        for ids in windows
    ]
    batched = torch.autograd.grad(model(input_ids=windows, labels=windows).loss, list(weights.values()))
    changes = {}
    for index, (name, weight) in enumerate(weights.items()):
        w, g = weight.detach().numpy(), batched[index].numpy()
        fisher = np.mean([gradients[index].numpy() ** 2 for gradients in per_window], axis=0)
        changes[name] = {
            "param_first": w * g,
            "vectorize": w * g,
            "param_second": w * fisher * w,
            "param_mix": w * g - 0.5 * w * fisher * w,
            "l1": w,
            "l2": w**2,
        }[importance]
    scores: dict[tuple[int, str], np.ndarray] = {}
    group, dim = shape.heads // shape.kv_heads, shape.head_dim
    for layer in range(shape.layers):
        mine = {m.type.name: changes[m.name] for m in modules if m.layer == layer}

        def one(channel: np.ndarray) -> float:
            return float(abs(channel.sum()) if importance == "vectorize" else np.abs(channel).sum())

        attention = np.zeros(shape.kv_heads)
        for kv in range(shape.kv_heads):
            for head in range(kv * group, (kv + 1) * group):
                for i in range(head * dim, (head + 1) * dim):
                    attention[kv] += one(mine["q"][i]) + one(mine["o"][:, i])
            for i in range(kv * dim, (kv + 1) * dim):
                attention[kv] += one(mine["k"][i]) + one(mine["v"][i])
        rows = [mine[name] for name in ("gate", "up", "fc1") if name in mine]
        down = mine["down" if "down" in mine else "fc2"]
        scores[layer, "attention"] = attention
        scores[layer, "mlp"] = np.array(
            [sum(one(row[i]) for row in rows) + one(down[:, i]) for i in range(shape.intermediate)]
        )
    return scores


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if name != "random"])
def test_the_least_important_units_go(kind: str, importance: str) -> None:
    shape = ModelShape(**tiny.shape(kind))
    structure = structure_of(shape)
    model = pruned(kind, ratio=40, importance=importance)
    counts = removal(structure, Settings(**ALL_BLOCKS), structure.budget.allowed(40))
    kept = {
        place: torch.tensor(np.sort(np.argsort(values, kind="stable")[counts[place] :]))
        for place, values in importance_by_loops(kind, importance).items()
    }
    assert all(counts.values())
    masked = tiny.model(kind)
    mask_channels(masked, structure, kept, None)
    ids = some_tokens(3)
    assert torch.allclose(model(ids).logits, masked(ids).logits, atol=1e-4)


def test_random_units_follow_the_seed() -> None:
    ids = some_tokens(2)
    one, same, other = (pruned("llama", importance="random", seed=seed)(ids).logits for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_only_the_windows_that_the_preset_names_are_used() -> None:
    ids, tokens = some_tokens(2), some_tokens()
    tokens[4:], tokens[:, 12:] = 7, 9
    assert torch.equal(pruned("llama-gqa", tokens=tokens)(ids).logits, pruned("llama-gqa")(ids).logits)
    tokens[3, 11] = 7
    for changes in ({"sequences": 7}, {"length": 21}):
        with pytest.raises(RankwiseError, match=r"more than the calibration 'c' has \(6 of 20 tokens\)"):
            pruned("llama-gqa", **changes)


@pytest.mark.parametrize(
    ("shape", "other", "skip_last", "p", "total"),
    [
        (LLAMA_7B, OTHER_7B, 2, 0.25, 5_422_977_024),
        (LLAMA_7B, OTHER_7B, 2, 0.37, 4_837_355_520),
        (LLAMA_13B, OTHER_13B, 4, 0.25, 10_478_310_400),
    ],
)
def test_the_original_convention_gives_the_published_sizes(
    shape: ModelShape, other: int, skip_last: int, p: float, total: int
) -> None:
    structure = structure_of(shape)
    counts = removal(structure, Settings(kind="llm-pruner", calibration="c", skip_last=skip_last, own_ratio=p), 0.0)
    assert {layer for layer, _ in counts} == set(range(4, shape.layers - skip_last))
    assert structure.remaining(counts) + other == total


def test_the_original_convention_removes_whole_groups() -> None:
    counts = removal(structure_of(LLAMA_3_8B), Settings(kind="llm-pruner", calibration="c", own_ratio=0.25), 0.0)
    assert counts[4, "attention"] == 2
    assert counts[4, "mlp"] == 3584
    with pytest.raises(RankwiseError, match="leaves 0 of 8 units of the attention branch; at least 1 must stay"):
        removal(structure_of(LLAMA_3_8B), Settings(kind="llm-pruner", calibration="c", own_ratio=0.9999), 0.0)


def test_the_original_convention_is_applied_to_a_model() -> None:
    model = pruned("llama-gqa", own_ratio=0.5)
    entry = recipe_of(model)
    assert entry["model.layers.1.self_attn"] == {"kind": "heads", "heads": 2, "kv_heads": 1}
    assert model.model.layers[0].mlp.up_proj.out_features == 80


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(SHAPES)), ratio=st.integers(1, 60))
def test_real_shapes_meet_the_budget_with_whole_first_and_last_blocks(name: str, ratio: int) -> None:
    structure = structure_of(SHAPES[name])
    allowed = structure.budget.allowed(ratio)
    preset = Settings(kind="llm-pruner", calibration="c")
    if SHAPES[name].layers == 12 and ratio > 48:  # six of twelve blocks stay whole, and a little of the others
        with pytest.raises(RankwiseError, match=f"removing {ratio} % is out of reach: pruning 6 of 12 blocks"):
            removal(structure, preset, allowed)
        return
    counts = removal(structure, preset, allowed)
    assert allowed - structure.mlp.cost < structure.remaining(counts) <= allowed
    assert {layer for layer, _ in counts} == set(range(4, SHAPES[name].layers - 2))


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(tiny.HEADS_GO)),
    ratio=st.integers(1, 75),
    importance=st.sampled_from(["param_first", "l2", "random"]),
)
def test_written_models_meet_the_budget(kind: str, ratio: int, importance: str) -> None:
    shape = ModelShape(**tiny.shape(kind))
    counts = count_parameters(pruned(kind, ratio, importance=importance), shape)
    allowed = Budget.of(shape).allowed(ratio)
    assert allowed - structure_of(shape).mlp.cost < counts["decoder_linears"] <= allowed
    assert counts["decoder_linears_dense"] - counts["decoder_linears"] <= counts["total_dense"] - counts["total"]


def test_blocks_that_are_skipped_stay_whole() -> None:
    model = pruned("opt", ratio=20, skip_first=1)
    assert all(name.startswith("model.decoder.layers.1") for name in recipe_of(model))
    with pytest.raises(RankwiseError, match="`skip_first: 4` and `skip_last: 2` leave none of 2 blocks"):
        pruned("opt", skip_first=4, skip_last=2)


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
def test_a_pruned_model_reads_back_and_generates_with_its_cache(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = pruned(kind, ratio=40)
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "pruned")
    again = load_checkpoint(tmp_path / "pruned", torch.float32)
    ids = some_tokens(2)
    assert torch.equal(again(ids).logits, model(ids).logits)
    cached, plain = (
        again.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert cached.shape[1] == ids.shape[1] + 6
    assert torch.equal(cached, plain)


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    task = {"model": model, "budget": Budget.of(ModelShape(**tiny.shape("llama"))), "ratio": 25, "seed": 0}
    with pytest.raises(RankwiseError, match="loss of a calibration window is not finite"):
        compress_model("llm-pruner", ALL_BLOCKS, task | {"tokens": some_tokens()})
    with pytest.raises(RankwiseError, match="has no calibration windows"):
        compress_model("llm-pruner", ALL_BLOCKS, task)

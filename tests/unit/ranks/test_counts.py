"""Counts from shapes and ranks against real models, printed test vectors and plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.evaluation.cost import count_macs
from lowrank.model.families import has_native_bias, linear_modules
from lowrank.model.modeling_rankwise import LowRankLinear
from lowrank.ranks.budget import Budget, lord_kept, rank_for
from lowrank.ranks.counts import count, module_ranks, other_parameters

LLAMA_7B = ModelShape(
    family="llama", layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128,
    vocabulary=32000, tied_embeddings=False,
)  # fmt: skip
LLAMA_13B = LLAMA_7B.model_copy(
    update={"layers": 40, "hidden": 5120, "intermediate": 13824, "heads": 40, "kv_heads": 40}
)
SMALL: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**{**SMALL, "hidden_size": 72}, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SMALL, tie_word_embeddings=False),
}


def small_shape(family: str, **changes: Any) -> ModelShape:
    config = FAMILIES[family]
    values = {
        "family": family,
        "layers": 3,
        "hidden": config.hidden_size,
        "intermediate": 72,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 12,
        "vocabulary": 90,
        "tied_embeddings": config.tie_word_embeddings,
    }
    return ModelShape(**(values | changes))


def small_model(family: str, ranks: dict[str, int | None]) -> PreTrainedModel:
    """Without weights; layers with a rank are pairs, with a bias where the layer had one."""
    shape = small_shape(family)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family])
        for module in linear_modules(shape):
            rank = ranks.get(module.name)
            if rank is not None:
                parent, _, child = module.name.rpartition(".")
                bias = has_native_bias(shape, module)
                pair = LowRankLinear(module.in_features, module.out_features, rank, bias=bias)
                setattr(model.get_submodule(parent), child, pair)
    return model


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_model(family: str, rank: int | None) -> None:
    shape = small_shape(family)
    ranks = {m.name: None if m.type.name == "v" else rank for m in linear_modules(shape)}
    model = small_model(family, ranks)
    counts = count(shape, ranks, tokens=9)
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert counts.parameters == sum(unique.values())
    assert counts.macs == count_macs(model, shape, 9)["total"]
    attention = {m.name: None if "attn" in m.name else ranks[m.name] for m in linear_modules(shape)}
    assert counts.macs_attention_dense == count_macs(small_model(family, attention), shape, 9)["total"]


def test_dense_models_of_the_paper() -> None:
    for shape, parameters, macs in ((LLAMA_7B, 6_738_415_616, 423.93), (LLAMA_13B, 13_015_864_320, 824.18)):
        counts = count(shape, {}, tokens=64)
        assert counts.parameters == parameters
        assert counts.kept == 1
        assert counts.macs / 1e9 == pytest.approx(macs, abs=0.005)
        assert counts.macs == counts.macs_attention_dense


@pytest.mark.parametrize(
    ("family", "numbers", "rounded"),
    [
        ("gemma3_text", (26, 1152, 6912, 4, 1, 256, 262144, True), 1.0),  # Gemma 3 1B
        ("phi3", (32, 3072, 8192, 32, 32, 96, 32064, False), 3.8),  # Phi-3 mini
        ("phi3", (40, 5120, 17920, 40, 10, 128, 100352, False), 14.7),  # Phi-4
        ("olmo2", (32, 4096, 11008, 32, 32, 128, 100352, False), 7.3),  # OLMo 2 7B
    ],
)
def test_sizes_of_large_models_are_those_of_transformers(family: str, numbers: tuple[int, ...], rounded: float) -> None:
    """And, rounded to a tenth of a billion, those that the models' cards state."""
    names = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary", "tied_embeddings")
    shape = ModelShape(family=family, **dict(zip(names, numbers, strict=True)))
    stock = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied_embeddings,
        "pad_token_id": 0,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **stock))
    parameters = count(shape, {}, 1).parameters
    assert parameters == sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values())
    assert round(parameters / 1e9, 1) == rounded


def test_published_ranks_of_llama_2_7b() -> None:
    printed = [{"group": 1.0, "qk": 744.0, "o": 1616.0, "gate": 2512.0, "up": 2408.0, "down": None}]
    counts = count(LLAMA_7B, module_ranks(printed, LLAMA_7B), tokens=64)
    assert counts.parameters == 5_433_790_464
    assert counts.kept == pytest.approx(0.79854, abs=5e-6)


@pytest.mark.parametrize(
    ("shape", "ratio", "ranks", "parameters"),
    [
        (LLAMA_7B, 20, (1432, 1632, 2384), 5.4346),
        (LLAMA_7B, 30, (1120, 1432, 2088), 4.7894),
        (LLAMA_13B, 20, (1792, 2048, 2984), 10.467),
        (LLAMA_13B, 30, (1408, 1792, 2616), 9.211),
    ],
)
def test_ranks_and_parameters_of_lord(
    shape: ModelShape, ratio: int, ranks: tuple[int, int, int], parameters: float
) -> None:
    budget = Budget.of(shape)
    kept = lord_kept(budget, ratio)
    found = {m.name: rank_for(kept[m.type.name], m.out_features, m.in_features) for m in budget.modules}
    by_type = {m.type.name: found[m.name] for m in budget.modules}
    assert by_type == dict(zip("qkv", (ranks[0], ranks[0], None), strict=True)) | {"o": ranks[1]} | dict.fromkeys(
        ("gate", "up", "down"), ranks[2]
    )
    assert count(shape, found, 64).parameters / 1e9 == pytest.approx(parameters, abs=5e-4)


def test_groups_are_consecutive_layers_and_units_are_shares_of_the_break_even_rank() -> None:
    printed = [{"group": float(i), "qk": 100.0 * i, "gate": None if i == 2 else 800.0} for i in (1, 2, 3, 4)]
    ranks = module_ranks(printed, LLAMA_13B, LLAMA_7B)
    for layer in range(40):
        group = layer // 10 + 1
        assert ranks[f"model.layers.{layer}.self_attn.q_proj"] == 125 * group, "2560 / 2048 of it"
        assert ranks[f"model.layers.{layer}.self_attn.k_proj"] == 125 * group
        # 13824 * 5120 / 18944 over 11008 * 4096 / 15104 is 1.25157
        assert ranks[f"model.layers.{layer}.mlp.gate_proj"] == (None if group == 2 else 1001)
        assert ranks[f"model.layers.{layer}.self_attn.v_proj"] is None
    assert module_ranks(printed, LLAMA_7B, LLAMA_7B) == module_ranks(printed, LLAMA_7B)


@settings(deadline=None)
@given(st.lists(st.integers(1, 2047), min_size=2, max_size=2).map(sorted), st.integers(1, 32))
def test_more_rank_costs_more_and_dense_attention_most(ranks: list[int], groups: int) -> None:
    low, high = (
        count(LLAMA_7B, module_ranks([{"qk": float(rank), "o": float(rank)}] * groups, LLAMA_7B), 64) for rank in ranks
    )
    assert low.parameters <= high.parameters < count(LLAMA_7B, {}, 64).parameters
    assert low.macs <= high.macs < high.macs_attention_dense == low.macs_attention_dense
    assert 0 < low.kept <= high.kept < 1


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ([{"fc1": 8.0}], "ranks of 'fc1', a type that family 'llama' does not have"),
        ([{"o": 8.0}] * 33, "33 groups of ranks for a model of 32 layers"),
    ],
)
def test_ranks_of_another_model_are_refused(printed: list[dict[str, float | None]], message: str) -> None:
    with pytest.raises(RankwiseError, match=message):
        module_ranks(printed, LLAMA_7B)


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(RankwiseError, match=r"rank 2048 of .*o_proj .* ranks 1 to 2047 only"):
        count(LLAMA_7B, module_ranks([{"o": 2048.0}], LLAMA_7B), 64)


def test_an_opt_has_parameters_that_its_shape_does_not_tell() -> None:
    shape = LLAMA_7B.model_copy(update={"family": "opt"})
    with pytest.raises(RankwiseError, match="position embeddings"):
        other_parameters(shape)

"""Every family of the adapter table, from statistics to a compressed model. A new entry needs a model here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank.bases import principal as bases_module
from lowrank.bases.block import bases_of_block, linears_of
from lowrank.bases.principal import Bases
from lowrank.calibration.routing import about_experts
from lowrank.calibration.statistics import collect_statistics, load_moments
from lowrank.cluster.sizes import Sizes
from lowrank.config.presets import Covariance, Selection
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, save_tensors
from lowrank.methods import bolaco
from lowrank.model import modeling_rankwise
from lowrank.model.checkpoint import family_of, replace_modules
from lowrank.model.families import BIAS_OPTIONS, FAMILIES, has_native_bias, linear_modules, unknown_family
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget, rank_for
from lowrank.ranks.counts import count
from lowrank.search.allocation import sliced_factors
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.sliced_model import SlicedModel
from tests import tiny
from tests.unit.calibration.test_moments import direct_pooled

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 48, 80, 2, 4, 90
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
POOLED = Covariance(estimator="pooled", groups=5)


@dataclass(frozen=True)
class Sample:
    """A small model of a family.

    Attributes:
        config: class of its transformers configuration.
        kv_heads: of key and value heads.
        head_dim: width of a head; HIDDEN / HEADS is 12.
        tied: whether head and embeddings are one matrix.
        more: further arguments of the configuration.
    """

    config: type
    kv_heads: int = HEADS
    head_dim: int = 12
    tied: bool = False
    more: dict[str, Any] = field(default_factory=dict)


SAMPLES = {
    "llama": Sample(transformers.LlamaConfig),
    "llama with grouped queries": Sample(transformers.LlamaConfig, kv_heads=2, tied=True),
    "llama with biases": Sample(transformers.LlamaConfig, kv_heads=2, more={"attention_bias": True, "mlp_bias": True}),
    "llama with scaled rotations": Sample(
        transformers.LlamaConfig,
        more={
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
            }
        },
    ),
    "mistral": Sample(transformers.MistralConfig, kv_heads=2, more={"sliding_window": 8}),
    "qwen2": Sample(transformers.Qwen2Config, kv_heads=2, tied=True),
    "qwen3": Sample(transformers.Qwen3Config, kv_heads=2, head_dim=20, tied=True),
    "olmo2": Sample(transformers.Olmo2Config, kv_heads=2, head_dim=20, more={"attention_bias": True}),
    "gemma3_text": Sample(
        transformers.Gemma3TextConfig,
        kv_heads=2,
        head_dim=20,
        tied=True,
        more=tiny.MORE["gemma3_text"] | {"attention_bias": True},
    ),
    "phi3": Sample(transformers.Phi3Config, kv_heads=2, more={"sliding_window": 8, "partial_rotary_factor": 0.5}),
    "phi3 with rotations for long texts": Sample(
        transformers.Phi3Config,
        more={
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
                **{"short_factor": [1.0] * 6, "long_factor": [3.0] * 6, "original_max_position_embeddings": 16},
            },
        },
    ),
    "qwen3_moe": Sample(
        transformers.Qwen3MoeConfig,
        kv_heads=2,
        head_dim=20,
        more={"moe_intermediate_size": INTERMEDIATE, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": Sample(transformers.MixtralConfig, kv_heads=2, more={"num_local_experts": 4, "sliding_window": 8}),
    "opt": Sample(transformers.OPTConfig, tied=True, more={"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}),
}
each_family = pytest.mark.parametrize("name", SAMPLES)
each_without_experts = pytest.mark.parametrize("name", [name for name in SAMPLES if name not in tiny.MIXTURES])


def family_name(name: str) -> str:
    return name.split()[0]


def a_model(name: str) -> PreTrainedModel:
    """Random weights, biases and gains of norms, large enough that all of them matter."""
    sample = SAMPLES[name]
    torch.manual_seed(0)
    widths = {"num_key_value_heads": sample.kv_heads, "head_dim": sample.head_dim, "intermediate_size": INTERMEDIATE}
    if name == "opt":
        widths = {}
    config = sample.config(**COMMON, **widths, tie_word_embeddings=sample.tied, **sample.more)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    modeling_rankwise.separate_projections(model)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.15)
        else:
            parameter.normal_(mean=0.0 if key.endswith("bias") else 1.0, std=0.2)
    return model


def a_shape(name: str) -> ModelShape:
    sample = SAMPLES[name]
    return ModelShape(
        family=family_name(name),
        layers=LAYERS,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        heads=HEADS,
        kv_heads=sample.kv_heads,
        head_dim=sample.head_dim,
        vocabulary=VOCABULARY,
        tied_embeddings=sample.tied,
        **{option: sample.more.get(option, False) for option in BIAS_OPTIONS},
        **({"experts": 4, "experts_per_token": 2} if name in tiny.MIXTURES else {}),
    )


def some_tokens(windows: int, seed: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (windows, 24), generator=torch.Generator().manual_seed(seed))


def bases_of(model: PreTrainedModel, tokens: torch.Tensor, folder: Path) -> Bases:
    """From one pass over the tokens to stored bases."""
    family = family_of(model)
    (folder / "bases").mkdir()
    for layer, file in enumerate(collect_statistics(model, tokens, 1, folder / "state", CPU, expert_tokens=30)):
        moments = load_moments(file, family.sites)
        linears = linears_of(model.get_submodule(f"{family.blocks}.{layer}"), family, moments)
        stored = bases_of_block(linears, moments, POOLED, CPU, f"{family.blocks}.{layer}")
        save_tensors(folder / "bases" / layer_name(layer), stored | about_experts(file, family))
    return Bases(folder / "bases", LAYERS)


def calls_of(model: PreTrainedModel, modules: list[str], tokens: torch.Tensor) -> dict[str, tuple[np.ndarray, ...]]:
    """Inputs and outputs of modules in one forward pass: two float64 arrays, windows x length x features, each."""
    seen: dict[str, tuple[np.ndarray, ...]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = tuple(t.double().reshape(*tokens.shape, -1).numpy() for t in (args[0], output))

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in modules]
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def test_every_entry_has_a_model_here_classes_for_its_checkpoints_and_a_name_in_configs() -> None:
    families = set(FAMILIES)
    assert {family_name(name) for name in SAMPLES} == families
    assert {name.split("-")[0] for name in tiny.ALL_SHAPES} == families
    assert set(modeling_rankwise.CONFIGS) == families
    assert set(get_args(ModelShape.model_fields["family"].annotation)) == families


@each_family
def test_the_table_names_every_linear_layer_of_the_blocks_with_its_shape_and_bias(name: str) -> None:
    model, shape = a_model(name), a_shape(name)
    blocks = FAMILIES[shape.family].blocks
    found = {
        key: (tuple(module.weight.shape), module.bias is not None)
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and key.startswith(f"{blocks}.")
    }
    table = {m.name: ((m.out_features, m.in_features), has_native_bias(shape, m)) for m in linear_modules(shape)}
    assert table == found
    assert isinstance(model.get_submodule(FAMILIES[shape.family].decoder), nn.Module)


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "opt"])  # whose positions no shape tells
def test_sizes_from_the_shape_are_those_that_transformers_counts(name: str) -> None:
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(a_model(name).config).num_parameters()
    assert count(a_shape(name), {}, tokens=1).parameters == expected
    assert Sizes(a_shape(name), "float32").parameters == expected


LONG = {"mistral": 8, "mixtral": 8, "gemma3_text": 8, "phi3": 8, "llama with scaled rotations": 16}
LONG |= {"phi3 with rotations for long texts": 16}


@pytest.mark.parametrize(("name", "crossed"), LONG.items())
def test_windows_are_longer_than_what_changes_with_length(name: str, crossed: int) -> None:
    """Tokens behind a sliding window and rotations for long texts matter here, so all other tests cross them."""
    model, tokens = a_model(name), some_tokens(1, seed=9)
    assert tokens.shape[1] > crossed
    logits = model(tokens).logits
    plain = a_model(name)
    if "rotations" in name:
        plain.model.rotary_emb = type(plain.model.rotary_emb)(a_model(name.split()[0]).config)
    for module in plain.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    plain.config.sliding_window = 64
    assert not torch.allclose(plain(tokens).logits[:, crossed:], logits[:, crossed:], atol=0.02)


@each_family
def test_the_full_basis_gives_the_dense_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases_module, "largest_rank", min)
    model, tokens = a_model(name), some_tokens(3, seed=9)
    logits = model(tokens).logits
    budget = Budget.of(a_shape(name))
    sliced = SlicedModel(model, budget, bases_of(model, some_tokens(20, seed=1), tmp_path))
    sliced.set_ranks({m.name: min(m.out_features, m.in_features) for m in budget.modules})
    scale = float(logits.abs().max())
    assert torch.allclose(model(tokens).logits, logits, atol=2e-5 * scale)
    sliced.set_ranks({m.name: 8 for m in budget.modules})
    assert not torch.allclose(model(tokens).logits, logits, atol=0.1 * scale)
    sliced.set_ranks({})
    assert torch.equal(model(tokens).logits, logits)


def test_a_rank_beyond_the_basis_is_refused(tmp_path: Path) -> None:
    model, budget = a_model("llama"), Budget.of(a_shape("llama"))
    sliced = SlicedModel(model, budget, bases_of(model, some_tokens(6, seed=1), tmp_path))
    with pytest.raises(RankwiseError, match="rank 24 is not within 1 to 23"):
        sliced.set_ranks({m.name: 24 for m in budget.modules})


@each_without_experts
def test_truncated_layers_equal_a_recomputation_in_float64(name: str, tmp_path: Path) -> None:
    dense, model = a_model(name), a_model(name)
    calibration, tokens = some_tokens(12, seed=1), some_tokens(2, seed=9)
    budget = Budget.of(a_shape(name))
    sliced = SlicedModel(model, budget, bases_of(dense, calibration, tmp_path))
    ranks = {m.name: 8 for m in budget.modules}
    sliced.set_ranks(ranks)
    names = [module.name for module in budget.modules]
    calibrated = calls_of(dense, names, calibration)
    for module, (x, y) in calls_of(model, names, tokens).items():
        outputs = calibrated[module][1]
        mean = outputs.mean(axis=(0, 1))
        directions = np.linalg.eigh(direct_pooled(outputs, 5))[1][:, -ranks[module] :]
        layer = dense.get_submodule(module)
        exact = x @ layer.weight.double().numpy().T + (0 if layer.bias is None else layer.bias.double().numpy())
        expected = mean + (exact - mean) @ directions @ directions.T
        assert np.allclose(y, expected, atol=2e-4 * np.abs(exact).max()), module
        assert not np.allclose(y, exact, atol=0.05 * np.abs(exact).max()), module


@each_family
def test_budgets_from_the_shape_equal_counted_parameters(name: str, tmp_path: Path) -> None:
    model, shape = a_model(name), a_shape(name)
    budget = Budget.of(shape)
    before = model.num_parameters()
    ranks = {
        m.name: None if m.type.name == "v" else rank_for(0.3 + 0.1 * m.layer, m.out_features, m.in_features)
        for m in budget.modules
    }
    bases = bases_of(model, some_tokens(6, seed=1), tmp_path)
    replace_modules(model, sliced_factors(bases, model, budget, ranks))
    counts = count_parameters(model, shape)
    assert counts["decoder_linears"] == budget.parameters(ranks)
    assert counts["decoder_linears_dense"] == budget.dense_parameters
    assert before - model.num_parameters() == budget.dense_parameters - budget.parameters(ranks)
    assert all(rank is None or rank % 8 == 0 for rank in ranks.values())


@each_family
def test_v_stays_dense_and_q_and_k_share_a_ratio(name: str) -> None:
    budget = Budget.of(a_shape(name))
    uncompressed = bolaco.Settings.model_fields["uncompressed"].default
    assert uncompressed == Selection.model_fields["uncompressed"].default == ("v",)
    space = SearchSpace(budget, 25, 1, uncompressed, lower=0.1)
    others = [linear.name for linear in FAMILIES[budget.dimensions.family].types if linear.name not in "qkv"]
    assert space.names == ["qk/0", *(f"{other}/0" for other in others)]
    ranks = space.ranks(space.uniform())
    assert all(ranks[m.name] is None for m in budget.modules if m.type.name == "v")
    tied = {unit.modules[0].type.name: unit.variable for unit in space.units}
    assert tied["q"] == tied["k"]


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        (transformers.Gemma2Config(**COMMON, intermediate_size=INTERMEDIATE), "gemma3_text"),
        (transformers.CohereConfig(**COMMON, intermediate_size=INTERMEDIATE), "opt"),
        (transformers.GPTNeoXConfig(**COMMON, intermediate_size=INTERMEDIATE), "opt"),
        (transformers.GraniteConfig(**COMMON, intermediate_size=INTERMEDIATE), "llama"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_family_without_an_entry_is_refused_with_those_that_have_one(
    config: Any, nearest: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    known = re.escape(", ".join(sorted(FAMILIES)))
    said = f"`model_type: {config.model_type}`.* is unknown here; the nearest family is {nearest}; .*{known}; docs/fam"
    with pytest.raises(RankwiseError, match=said):
        collect_statistics(model, some_tokens(2, seed=0), 1, tmp_path, CPU)
    with pytest.raises(ValidationError, match="family"):
        ModelShape(**a_shape("llama").plain() | {"family": config.model_type})


@pytest.mark.parametrize(("inner", "known"), [("gemma3_text", "of a known family"), ("x", "of no known family either")])
def test_the_text_model_of_a_larger_one_is_found_and_not_taken(inner: str, known: str) -> None:
    said = unknown_family({"model_type": "gemma3", "text_config": {"model_type": inner}, "vision_config": {}})
    assert f"`model_type: {inner}`), {known}, but is not taken" in said

"""Tiny models of every family with random weights, and a tokenizer that is trained here on a few words."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lowrank.model.families import BIAS_OPTIONS, FAMILIES
from lowrank.model.modeling_rankwise import separate_projections

WORDS = [
    *("river", "stone", "light", "house", "morning", "paper", "green", "window", "answer", "garden", "winter"),
    *("letter", "music", "bread", "city", "mountain", "question", "table", "water", "silver", "engine", "island"),
    *("copper", "valley", "teacher", "number", "forest", "market", "people", "story"),
]

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"heads": 4, "kv_heads": 4, "tied": False},
    "llama-gqa": {"heads": 4, "kv_heads": 2, "tied": True},
    "llama-biased": {"heads": 4, "kv_heads": 2, "tied": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"heads": 4, "kv_heads": 2, "tied": False},
    "qwen2": {"heads": 4, "kv_heads": 2, "tied": True},
    "qwen3": {"heads": 4, "kv_heads": 2, "tied": True},
    "olmo2": {"heads": 4, "kv_heads": 2, "tied": False},
    "gemma3_text": {"heads": 4, "kv_heads": 2, "tied": True},
    "phi3": {"heads": 4, "kv_heads": 2, "tied": False},
    "opt": {"heads": 4, "kv_heads": 4, "tied": True},
}
MIXTURES: dict[str, dict[str, Any]] = {  # whose blocks have experts, for which not all methods are defined
    "qwen3_moe": {"heads": 4, "kv_heads": 2, "tied": False, "experts": 4, "experts_per_token": 2},
    "mixtral": {"heads": 4, "kv_heads": 2, "tied": False, "experts": 4, "experts_per_token": 2},
}
ALL_SHAPES = SHAPES | MIXTURES
MORE: dict[str, dict[str, Any]] = {  # of a family's own
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 8.0,
    },
    "phi3": {"partial_rotary_factor": 0.75, "sliding_window": 9, "rms_norm_eps": 1e-6},
    "qwen3_moe": {"moe_intermediate_size": 160, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
FEW = ("llama-biased", "qwen3", "olmo2", "gemma3_text", "phi3", "opt")
"""One of each build: tests that would take long on all of `SHAPES` are made on these."""
_BUILDS = {kind: FAMILIES[kind.split("-")[0]] for kind in FEW}
HEADS_GO = tuple(kind for kind in FEW if _BUILDS[kind].normed != "projections")
PAIRS_GO = tuple(kind for kind in FEW if _BUILDS[kind].normed == "nothing" and _BUILDS[kind].rotary != "part")
ROTATED = tuple(kind for kind in FEW if _BUILDS[kind].plain_branches)
"""Of these: where single heads may go, where dimensions of q and k may, and whose stream may be rotated."""
SMOLLM = {  # SmolLM2-135M, a real shape with grouped queries
    "family": "llama",
    "layers": 30,
    "hidden": 576,
    "intermediate": 1536,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "vocabulary": 49152,
    "tied_embeddings": True,
}
LLAMA_2_7B = {
    "family": "llama",
    "layers": 32,
    "hidden": 4096,
    "intermediate": 11008,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "vocabulary": 32000,
    "tied_embeddings": False,
}
HIDDEN, INTERMEDIATE, LAYERS, HEAD_DIM = 64, 160, 2, 16


def text(seed: int, words: int) -> str:
    """Sentences of random words; the same seed gives the same text."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + ("." if draw.random() < 0.1 else "") for _ in range(words))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS and EOS, trained on the words above."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([text(seed, 200) for seed in range(5)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def model(kind: str, vocabulary: int = 400, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, with weights large enough that its layers matter."""
    shape = ALL_SHAPES[kind]
    torch.manual_seed(seed)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shape["heads"],
        "max_position_embeddings": 512,
        "tie_word_embeddings": shape["tied"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if kind == "opt":
        config = transformers.OPTConfig(
            **common, ffn_dim=INTERMEDIATE, word_embed_proj_dim=HIDDEN, dropout=0.0, init_std=0.1
        )
    else:
        classes = {
            "llama": transformers.LlamaConfig,
            "mistral": transformers.MistralConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
            "olmo2": transformers.Olmo2Config,
            "gemma3_text": transformers.Gemma3TextConfig,
            "phi3": transformers.Phi3Config,
            "qwen3_moe": transformers.Qwen3MoeConfig,
            "mixtral": transformers.MixtralConfig,
        }
        config = classes[kind.split("-")[0]](
            **common,
            **{option: shape[option] for option in BIAS_OPTIONS if option in shape},
            intermediate_size=INTERMEDIATE,
            num_key_value_heads=shape["kv_heads"],
            head_dim=HEAD_DIM,
            initializer_range=0.1,
            **MORE.get(kind, {}),
        )
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    separate_projections(made)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return made


def shape(kind: str, vocabulary: int = 400) -> dict[str, Any]:
    """The config's `shape` of such a model."""
    return {
        "family": kind.split("-")[0],
        "layers": LAYERS,
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "heads": ALL_SHAPES[kind]["heads"],
        "kv_heads": ALL_SHAPES[kind]["kv_heads"],
        "head_dim": HEAD_DIM,
        "vocabulary": vocabulary,
        "tied_embeddings": ALL_SHAPES[kind]["tied"],
        **{option: ALL_SHAPES[kind].get(option, False) for option in BIAS_OPTIONS},
        **{option: ALL_SHAPES[kind].get(option, 0) for option in ("experts", "experts_per_token")},
    }

"""The numbers of a model's shape, read from its `config.json` or from the metadata of a GGUF file, without torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.model.families import BIAS_OPTIONS, FAMILIES, unknown_family

_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "vocabulary": "vocab_size",
}
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts_per_tok": 8},
    "mixtral": {"num_key_value_heads": 8, "num_experts_per_tok": 2},
    "opt": {"tie_word_embeddings": True},
}
"""What transformers takes for a key that a config.json leaves out, where that does not follow from others."""

ADAPTER = "adapter_config.json"
"""By this file peft knows an adapter."""

INTERMEDIATE = {"opt": "ffn_dim", "qwen3_moe": "moe_intermediate_size"}
"""Families whose key of the MLP's width, or of that of an expert, is not `intermediate_size`."""
_EXPERTS = ("num_experts", "num_local_experts")
"""Keys of their number: transformers reads both, and writes one or the other by its version."""

_GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_GGUF_HEAD_DIM = {
    **dict.fromkeys(("llama", "mistral"), "rope.dimension_count"),
    **dict.fromkeys(("qwen3", "gemma3_text"), "attention.key_length"),
}
_GGUF_FAMILY = {"gemma3": "gemma3_text"}
"""Architectures of llama.cpp that transformers gives another name."""


def shape_numbers(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of `models.<name>.shape` from what a `config.json` holds, with the defaults of transformers.

    Raises:
        RankwiseError: an unknown architecture, a number is missing, or blocks of several kinds.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise RankwiseError(unknown_family(config))
    require_experts_everywhere(config)
    names = _KEYS | {"intermediate": INTERMEDIATE.get(family, "intermediate_size")}
    missing = [key for key in names.values() if config.get(key) is None]
    if FAMILIES[family].experts and all(config.get(key) is None for key in _EXPERTS):
        missing.append(_EXPERTS[0])
    if missing:
        raise RankwiseError(f"its config.json has no {', '.join(f'`{key}`' for key in missing)}.")
    found = _LEFT_OUT.get(family, {}) | config
    heads = found[names["heads"]]
    return {
        "family": family,
        **{key: found[name] for key, name in names.items()},
        "kv_heads": heads if family == "opt" else found.get("num_key_value_heads") or heads,
        "head_dim": found.get("head_dim") or found["hidden_size"] // heads,
        "tied_embeddings": found.get("tie_word_embeddings", False),
        **bias_options(family, found),
        **expert_numbers(family, found),
    }


def expert_numbers(family: str, config: dict[str, Any]) -> dict[str, int]:
    """How many experts a block has, and how many of them a token passes; none where there is one MLP for all."""
    if not FAMILIES[family].experts:
        return {"experts": 0, "experts_per_token": 0}
    stated = [config[key] for key in _EXPERTS if config.get(key) is not None]
    return {"experts": stated[0], "experts_per_token": config["num_experts_per_tok"]}


def intermediate_of(family: str, config: dict[str, Any]) -> int:
    """Neurons of a block's MLP, or of each of its experts."""
    width: int = config[INTERMEDIATE.get(family, "intermediate_size")]
    return width


def require_experts_everywhere(config: dict[str, Any]) -> None:
    """See that all blocks of a model have experts, or none.

    Raises:
        RankwiseError: some blocks have a plain MLP in their place.
    """
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise RankwiseError(
            "some of its blocks have experts and others one MLP (`mlp_only_layers`, `decoder_sparse_step`); only "
            "models all of whose blocks have experts are supported."
        )


def bias_options(family: str, config: dict[str, Any]) -> dict[str, bool]:
    """The options of a configuration about biases, false where the code of a family does not read them."""
    return {option: option in FAMILIES[family].bias_options and bool(config.get(option)) for option in BIAS_OPTIONS}


def model_config(files: list[Path]) -> dict[str, Any]:
    """What says how a model is built: its `config.json`, or the same keys from the metadata of a GGUF file.

    Args:
        files: the GGUF file, or the files of a checkpoint.

    Raises:
        RankwiseError: they are no model, cannot be read, or there is an adapter among them.
    """
    if len(files) == 1 and files[0].suffix == ".gguf":
        return gguf_config(files[0])
    configs = [file for file in files if file.name == "config.json"]
    if len(configs) != 1:
        raise RankwiseError(
            f"a model is a GGUF file or a folder with one `config.json`, and here are {len(configs)} of those."
        )
    require_no_adapter(configs[0], files)
    return read_record(configs[0])


def require_no_adapter(config: Path, files: list[Path]) -> None:
    """See that no adapter lies beside a model: where peft is installed, transformers loads it too, without being asked.

    Args:
        config: the model's `config.json`.
        files: all files of its source.

    Raises:
        RankwiseError: there is one.
    """
    if config.with_name(ADAPTER) in files:
        raise RankwiseError(
            f"an adapter (LoRA) lies beside its weights (`{ADAPTER}`), and would be loaded on top of them. Merge it "
            "(peft's `merge_and_unload`, then `save_pretrained` into another folder); or, if the weights are meant "
            "without it, give a copy of the folder that has no `adapter_*` files."
        )


def gguf_config(file: Path) -> dict[str, Any]:
    """The keys of a `config.json`, as transformers finds them in a GGUF file.

    Raises:
        RankwiseError: it cannot be read.
    """
    state = file.stat()
    return dict(_gguf_config(file, state.st_mtime_ns, state.st_size))


@cache
def _gguf_config(file: Path, changed: int, size: int) -> dict[str, Any]:
    """Read once, since the tokens of a vocabulary take seconds."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        names = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # the reader has no error type of its own: ValueError, IndexError, OSError, ...
        raise RankwiseError(f"{file}: truncated, or no GGUF file ({error}).") from error
    architecture = fields.get("general.architecture")
    # llama.cpp calls Mistral's architecture by that of Llama; transformers goes by the model's name.
    by_name = architecture == "llama" and fields.get("general.name") == "mistral"
    family = "mistral" if by_name else _GGUF_FAMILY.get(str(architecture), architecture)
    keys = _GGUF_KEYS | ({_GGUF_HEAD_DIM[family]: "head_dim"} if family in _GGUF_HEAD_DIM else {})
    found = {name: fields[f"{architecture}.{key}"] for key, name in keys.items() if f"{architecture}.{key}" in fields}
    vocabulary = {"vocab_size": len(tokens.data)} if tokens else {}
    return {"model_type": family, **vocabulary, **found, "tie_word_embeddings": "output.weight" not in names}

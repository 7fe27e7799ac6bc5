"""GGUF files of small models, written by llama.cpp's own library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch


def started(file: Path, architecture: str, head_dim: int) -> gguf.GGUFWriter:
    """A writer that has said how large the model is: two blocks of width 32, two key/value heads."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(head_dim)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    file: Path,
    original: Path,
    tensors: dict[str, torch.Tensor],
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """A small Llama with the tokenizer of a folder, in float32, and what else is to be in the file."""
    writer = started(file, "llama", head_dim=8)
    add(writer)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    backend = json.loads((original / "tokenizer.json").read_text())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_vocab_size(len(tensors["model.embed_tokens.weight"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(gguf_name(name), gguf_layout(name, tensor.float().numpy()))
    finish(writer)


def gguf_name(name: str) -> str:
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = mapping.get_name(name, try_suffixes=(".weight",))
    assert isinstance(found, str)
    return found


def gguf_layout(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp interleaves the two rotary halves of each head's rows."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))

"""GGUF files for llama.cpp, by its own library `gguf`: in the layouts of its converter and for its graphs.

Where all blocks have one shape, the file has the architecture that llama.cpp's converter gives the family. Where they
differ, Llama and Mistral become `deci`: the same graph as `llama`, and the one that reads heads and neurons block by
block (llama.cpp, `src/models/deci.cpp`; `llama` takes those of the first block for all). Qwen2 and Qwen3 have no such
relative, so their narrower blocks get zeros. Heads that lost dimensions get zeros in all families.

llama.cpp's graphs of `llama` and `deci` add a bias to every linear layer that has one; those of `qwen2` to q, k and v
only, that of `qwen3` to none (`src/models/*.cpp`). A bias that the graph would not read is an error here, since
llama.cpp would load the file and give other results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from lowrank.compression.branches import Structure
from lowrank.errors import RankwiseError
from lowrank.export.blocks import Block, Plain, base_shape, blocks_of, padded, structure_of
from lowrank.export.gguf_tokenizer import add_tokenizer
from lowrank.files import atomic_path

ALL = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a family.

    Attributes:
        name: of the graph if all blocks have one shape.
        by_block: of the graph that reads shapes block by block; None if there is none.
        interleaved: its rotation turns neighbouring dimensions, so that rows of q and k come in another order.
        biased: types whose biases it adds.
        rope_factors: whether it reads factors of the frequencies (Llama 3).
    """

    name: gguf.MODEL_ARCH
    by_block: gguf.MODEL_ARCH | None
    interleaved: bool
    biased: tuple[str, ...]
    rope_factors: bool


_LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.DECI, True, ALL, True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, None, False, ("q", "k", "v"), False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, None, False, (), False),
}
STORED = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
"""Vectors are in float32 in all of these, as the converter has it."""
STATIC_ROPE = ("default", "linear", "llama3")
"""Kinds of rotation whose frequencies do not depend on the text, so that factors say them."""


def write_gguf(model: PreTrainedModel, tokenizer: Path, target: Path) -> str:
    """Write a model as one GGUF file in its dtype; it appears when it is whole.

    Args:
        model: dense or compressed.
        tokenizer: folder of its tokenizer.
        target: the file to make.

    Returns:
        The architecture that the file names.

    Raises:
        RankwiseError: llama.cpp cannot run such a model, or a bias, a rotation or a tokenizer of it; it is named.
    """
    family = base_shape(model).family
    if family not in ARCHITECTURES:
        raise RankwiseError(f"no GGUF file is written of `{family}`; of the families here: {', '.join(ARCHITECTURES)}")
    structure = structure_of(model)
    way, blocks = ARCHITECTURES[family], blocks_of(model)
    _require_biases(way, structure, blocks)
    factors = _rope_factors(model, way)
    shapes = {(block.neurons, block.groups) for block in blocks}
    name = way.name
    if len(shapes) > 1 and way.by_block is not None:
        name = way.by_block
    else:
        blocks = _alike(structure, blocks, whole_heads=way.by_block is None)
    with atomic_path(target) as file:
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[name])
        _add_numbers(writer, model, structure, blocks, name)
        add_tokenizer(writer, tokenizer, model.config.vocab_size)
        names = gguf.get_tensor_name_map(name, len(blocks))
        for tensor_name, tensor in _tensors(model, structure, blocks, way):
            _add(writer, _gguf_name(names, tensor_name), tensor, model.dtype)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return str(gguf.MODEL_ARCH_NAMES[name])


def _alike(structure: Structure, blocks: list[Block], whole_heads: bool) -> list[Block]:
    """Blocks of one shape: that of the largest, with all heads if llama.cpp takes their number from the hidden size."""
    neurons = max(block.neurons for block in blocks)
    groups = structure.attention.units if whole_heads else max(block.groups for block in blocks)
    return [padded(block, structure, neurons, groups) for block in blocks]


def _require_biases(way: Architecture, structure: Structure, blocks: list[Block]) -> None:
    """See that the graph reads all biases.

    Raises:
        RankwiseError: one that it would not; the layer is named.
    """
    for layer, block in enumerate(blocks):
        for module in structure.budget.modules:
            name = module.type.name
            if module.layer == layer and block.layers[name].bias is not None and name not in way.biased:
                raise RankwiseError(
                    f"{module.name}: it has a bias, and llama.cpp's graph of "
                    f"`{gguf.MODEL_ARCH_NAMES[way.name]}` would leave it out. Compress without new biases "
                    "(`estimator: uncentred` in the preset of covariance)."
                )


def _rope_factors(model: PreTrainedModel, way: Architecture) -> torch.Tensor | None:
    """By what llama.cpp divides the frequencies `theta^(-2i/d)` (head_dim / 2); None if they are those.

    Raises:
        RankwiseError: the rotation changes with the text, or this graph reads no factors.
    """
    rope = model.config.rope_parameters
    frequencies = model.get_submodule("model.rotary_emb").inv_freq.detach().double().cpu()
    places = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors = float(rope["rope_theta"]) ** -places / frequencies
    plain = bool(torch.allclose(factors, torch.ones_like(factors), rtol=1e-5))
    if rope["rope_type"] not in STATIC_ROPE or not (plain or way.rope_factors):
        raise RankwiseError(
            f"its rotary embedding is scaled (`rope_type: {rope['rope_type']}`), which cannot be written for "
            f"llama.cpp's `{gguf.MODEL_ARCH_NAMES[way.name]}` here. Write `TO=dense`, and use its own converter."
        )
    return None if plain else factors.float()


def _add_numbers(
    writer: gguf.GGUFWriter, model: PreTrainedModel, structure: Structure, blocks: list[Block], name: gguf.MODEL_ARCH
) -> None:
    """What llama.cpp reads of a configuration. Shapes are lists of one number a block where it reads such."""
    config, shape = model.config, structure.budget.dimensions
    kinds: tuple[list[int], list[int], list[int]] = (
        [block.neurons for block in blocks],
        [block.groups * structure.heads_per_group for block in blocks],
        [block.groups for block in blocks],
    )
    neurons, heads, groups = (kind if name == gguf.MODEL_ARCH.DECI else kind[0] for kind in kinds)
    writer.add_file_type(STORED[model.dtype][1])
    writer.add_block_count(len(blocks))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _context(config: Any) -> int:
    """The longest text for which llama.cpp computes the same: its graphs of these families have no sliding window."""
    window = getattr(config, "sliding_window", None)
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _tensors(
    model: PreTrainedModel, structure: Structure, blocks: list[Block], way: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by their names in transformers, in the layout of the graph."""
    modules = {module.name: module for module in structure.budget.modules}
    prefixes = tuple(f"{name}." for name in modules)
    for name, tensor in model.state_dict().items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not name.startswith(prefixes) and not tied and not name.endswith(".self_attn.pairs"):
            yield name, tensor
    for name, module in modules.items():
        block = blocks[module.layer]
        plain = block.layers[module.type.name]
        heads = {"q": block.groups * structure.heads_per_group, "k": block.groups}.get(module.type.name)
        if way.interleaved and heads is not None:
            plain = _interleaved(plain, heads)
        yield f"{name}.weight", plain.weight
        if plain.bias is not None:
            yield f"{name}.bias", plain.bias


def _interleaved(plain: Plain, heads: int) -> Plain:
    """Rows of q or k such that both dimensions of a rotary pair are neighbours, head by head."""
    order = torch.arange(len(plain.weight)).view(heads, 2, -1).transpose(1, 2).flatten()
    return Plain(plain.weight[order], None if plain.bias is None else plain.bias[order])


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise RankwiseError(f"{name}: llama.cpp has no tensor for it")
    return str(found)


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Add a tensor, matrices in the model's dtype and vectors in float32."""
    stored = STORED[dtype][0] if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
    values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

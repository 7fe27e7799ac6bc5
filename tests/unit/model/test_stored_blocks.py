"""Blocks of a checkpoint, read one at a time: what the opened model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import write_json
from lowrank.manifest import checksums_of
from lowrank.model.checkpoint import load_checkpoint, save_checkpoint
from lowrank.model.stored_blocks import StoredBlocks
from tests import tiny


def saved(kind: str, folder: Path) -> Path:
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    save_checkpoint(tiny.model(kind), folder / "tokenizer", folder / "model")
    return folder / "model"


def shape(kind: str) -> ModelShape:
    return ModelShape(**tiny.shape(kind))


@pytest.mark.parametrize("kind", [*tiny.FEW, "llama-gqa", "qwen2", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_is_the_one_of_the_opened_model(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = saved(kind, tmp_path)
    model, stored = load_checkpoint(folder, dtype), StoredBlocks(folder, shape(kind), dtype)
    for layer in range(tiny.LAYERS):
        block = model.get_submodule(f"{stored.family.blocks}.{layer}")
        found = stored.of(layer)
        assert list(found) == list(stored.family.types)
        for linear, (weight, bias) in found.items():
            dense = block.get_submodule(linear.path)
            assert weight.dtype == dtype
            assert torch.equal(weight, dense.weight), linear.name
            assert (bias is None) == (dense.bias is None), linear.name
            assert bias is None or torch.equal(bias, dense.bias), linear.name


def test_several_files_and_names_without_a_prefix(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    expected = StoredBlocks(folder, shape("llama"), torch.float32).of(1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for part in range(3):
        save_file({name: short[name] for name in sorted(short)[part::3]}, folder / f"model-{part}.safetensors")
    for linear, (weight, _) in StoredBlocks(folder, shape("llama"), torch.float32).of(1).items():
        assert torch.equal(weight, expected[linear][0])


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    stored = StoredBlocks(folder, shape("llama"), torch.float32)
    with pytest.raises(RankwiseError, match=r"no tensor model\.layers\.2\.self_attn\.q_proj\.weight"):
        stored.of(2)
    write_json(tmp_path / "model.json", {"files": checksums_of(folder)})
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(RankwiseError, match=r"model\.safetensors"):
        StoredBlocks(folder, shape("llama"), torch.float32)
    (tmp_path / "model.json").unlink()
    file.write_bytes(bytes(content[:100]))
    with pytest.raises(RankwiseError, match="damaged weights"):
        StoredBlocks(folder, shape("llama"), torch.float32)
    file.unlink()
    with pytest.raises(RankwiseError, match="holds no weights"):
        StoredBlocks(folder, shape("llama"), torch.float32)

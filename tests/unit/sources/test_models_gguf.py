"""GGUF files become checked folders, too."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from lowrank.errors import RankwiseError
from lowrank.model.tokenizer import load_tokenizer
from lowrank.sources.gguf import _require_window
from tests.unit.model.gguf_samples import finish, started, write_gguf
from tests.unit.sources.model_samples import PARAMETERS, VOCABULARY, add_head, fetch, make_tokenizer, refused


def test_a_gguf_file_becomes_the_same_model(gguf_file: Path, original: Path, tmp_path: Path) -> None:
    manifest = fetch(gguf_file, tmp_path, dtype="float32")
    target = tmp_path / "models" / "tiny"
    assert manifest["parameters"] == PARAMETERS
    ours, theirs = load_file(target / "model.safetensors"), load_file(original / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, theirs[name].float()), name
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("the texts", add_special_tokens=False).input_ids == make_tokenizer()("the texts").input_ids


def test_a_gguf_file_is_stored_in_the_configs_dtype(gguf_file: Path, tmp_path: Path) -> None:
    fetch(gguf_file, tmp_path, dtype="bfloat16")
    tensors = load_file(tmp_path / "models" / "tiny" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_gguf_file_with_a_head_of_its_own_keeps_it(original: Path, tmp_path: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    add_head(tensors, 0.5)
    write_gguf(tmp_path / "untied.gguf", original, tensors)
    manifest = fetch(tmp_path / "untied.gguf", tmp_path, dtype="float32", shape={"tied_embeddings": False})
    assert manifest["parameters"] == PARAMETERS + VOCABULARY * 32
    stored = load_file(tmp_path / "models/tiny/model.safetensors")
    assert torch.equal(stored["lm_head.weight"], tensors["lm_head.weight"].float())
    refused(tmp_path / "untied.gguf", tmp_path / "again", "tied_embeddings: the config says True, the model has False")


@pytest.mark.parametrize("kept", [0, 10, 2000, -64])
def test_a_truncated_gguf_file(gguf_file: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "half.gguf").write_bytes(gguf_file.read_bytes()[:kept])
    refused(tmp_path / "half.gguf", tmp_path, r"half\.gguf: truncated, or no GGUF file.*Fetch it again")


def scaled(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


REFUSED = {
    "a part": (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts. Put them together"),
    "scaled": (scaled, r"its rotation of positions is scaled \(llama.rope.scaling.type\), which is not read"),
    "llama 3's": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
        r"its rotation of positions is scaled \(rope_freqs.weight\)",
    ),
    "a window": (
        lambda writer: writer.add_sliding_window(48),
        r"its tokens see 48 tokens back \(attention.sliding_window\), which is not read. Take the safetensors version",
    ),
    "biases": (
        lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)),
        f"it has {PARAMETERS + 32:,} weights, and the LlamaForCausalLM that .* makes of it {PARAMETERS:,}. Not all",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_gguf_file_of_which_a_part_would_be_left_out_is_refused(case: str, original: Path, tmp_path: Path) -> None:
    add, said = REFUSED[case]
    write_gguf(tmp_path / "more.gguf", original, load_file(original / "model.safetensors"), add)
    refused(tmp_path / "more.gguf", tmp_path / "out", said)


@pytest.mark.parametrize("window", [0, 64])
def test_a_window_as_wide_as_the_context_is_none(window: int, original: Path, tmp_path: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    write_gguf(tmp_path / "m.gguf", original, tensors, lambda writer: writer.add_sliding_window(window))
    assert fetch(tmp_path / "m.gguf", tmp_path)["parameters"] == PARAMETERS


@pytest.mark.parametrize(("family", "read"), [("gemma3_text", True), ("phi3", False)])
def test_windows_that_transformers_reads_are_taken(family: str, read: bool, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    writer = started(file, family.removesuffix("_text"), head_dim=8)
    writer.add_sliding_window(48)
    writer.add_vocab_size(3)
    finish(writer)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=str(file))
    assert config.model_type == family
    if read:
        _require_window(file, 48, config)
    else:
        with pytest.raises(RankwiseError, match="see 48 tokens back"):
            _require_window(file, 48, config)


def test_a_gguf_file_without_a_matrix_is_refused(original: Path, tmp_path: Path) -> None:
    """Which transformers would draw at random."""
    tensors = load_file(original / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "less.gguf", original, tensors)
    refused(tmp_path / "less.gguf", tmp_path / "out", r"model\.layers\.1\.mlp\.up_proj\.weight is not in it")


def test_a_gguf_file_of_the_same_name_where_the_job_runs_is_another(
    gguf_file: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(original / "model.safetensors").items()}
    write_gguf(tmp_path / gguf_file.name, original, tensors)
    monkeypatch.chdir(tmp_path)
    fetch(gguf_file, tmp_path, dtype="float32")
    assert load_file(tmp_path / "models/tiny/model.safetensors")["model.norm.weight"].all()


def test_an_adapter_beside_a_gguf_file_is_none_of_it(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/m.gguf").symlink_to(gguf_file)
    (tmp_path / "source/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "no/where"}))
    assert fetch(tmp_path / "source/m.gguf", tmp_path)["parameters"] == PARAMETERS


def test_a_tokenizer_beside_a_gguf_file_is_none_of_it(gguf_file: Path, tmp_path: Path) -> None:
    fetch(gguf_file, tmp_path / "alone")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/m.gguf").symlink_to(gguf_file)
    other = Tokenizer(models.WordLevel({"<s>": 0, "river": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=other, bos_token="<s>").save_pretrained(tmp_path / "source")
    fetch(tmp_path / "source/m.gguf", tmp_path)
    found, expected = (load_tokenizer(folder / "models/tiny") for folder in (tmp_path, tmp_path / "alone"))
    assert found.get_vocab() == expected.get_vocab()
    assert found("river stone")["input_ids"] == expected("river stone")["input_ids"]

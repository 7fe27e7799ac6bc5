"""GGUF files: llama.cpp's graphs, written out, compute the logits of the compressed model from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from lowrank.errors import RankwiseError
from lowrank.export import gguf as writer
from lowrank.export.gguf import write_gguf
from tests import tiny
from tests.unit.export.export_samples import ADD_BIAS, IDS, MAKES, Graph, cases, narrow, pruned

WITHOUT = ("opt", "olmo2", "gemma3_text", "phi3")
KINDS = tuple(kind for kind in tiny.SHAPES if kind not in WITHOUT)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def reads(make: str, kind: str) -> bool:
    return make not in ADD_BIAS or kind.split("-")[0] in ("llama", "mistral")


@pytest.mark.parametrize(("make", "kind"), [case for case in cases(WITHOUT) if reads(*case)])
def test_the_graph_computes_the_logits_of_the_model(make: str, kind: str, tokenizer: Path, tmp_path: Path) -> None:
    model = MAKES[make](kind)
    named = write_gguf(model, tokenizer, tmp_path / "model.gguf")
    graph = Graph(tmp_path / "model.gguf")
    assert graph.architecture == named
    assert (named == "deci") == (make == "own widths" and kind.split("-")[0] in ("llama", "mistral"))
    for text, expected in zip(IDS, model(IDS).logits, strict=True):
        assert torch.allclose(graph.logits(text), expected, atol=1e-4)


def test_widths_and_heads_stand_block_by_block(tokenizer: Path, tmp_path: Path) -> None:
    write_gguf(pruned("llama-gqa", (1, 2), (96, 40)), tokenizer, tmp_path / "model.gguf")
    graph = Graph(tmp_path / "model.gguf")
    assert graph.fields["deci.feed_forward_length"] == [96, 40]
    assert graph.fields["deci.attention.head_count"] == [2, 4]
    assert graph.fields["deci.attention.head_count_kv"] == [1, 2]
    assert graph.tensors["blk.1.ffn_up.weight"].shape == (40, tiny.HIDDEN)


@pytest.mark.parametrize(("make", "kind"), [case for case in cases(WITHOUT) if not reads(*case)])
def test_a_bias_that_the_graph_leaves_out_is_named(make: str, kind: str, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"layers\.0\.\S+: it has a bias, and llama.cpp's graph of `qwen"):
        write_gguf(MAKES[make](kind), tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama-gqa", "mistral", "qwen2"])
def test_transformers_reads_shapes_that_are_alike(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    model = pruned(kind, (4, 4), (96, 96))
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert again.config.model_type == ("qwen2" if kind == "qwen2" else "llama")
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)
    text = tiny.text(5, 30)
    spelled = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert spelled(text).input_ids == tiny.tokenizer()(text).input_ids
    assert (spelled.bos_token_id, spelled.eos_token_id) == (0, 1)


def test_the_frequencies_of_llama_3_are_factors(tokenizer: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    base = tiny.model("llama-gqa")
    config = LlamaConfig(**(base.config.to_dict() | {"rope_parameters": rope}))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(base.state_dict())
    assert not torch.allclose(model(IDS).logits, base(IDS).logits, atol=1e-3)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert torch.allclose(Graph(tmp_path / "model.gguf").logits(IDS[0]), model(IDS).logits[0], atol=1e-4)
    model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(RankwiseError, match="its rotary embedding is scaled"):
        write_gguf(model, tokenizer, tmp_path / "yarn.gguf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_keep_their_dtype_and_vectors_are_float32(dtype: torch.dtype, tokenizer: Path, tmp_path: Path) -> None:
    model = pruned("llama", (4, 4), (96, 96)).to(dtype)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    found = writer.gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in found.tensors}
    assert kinds["blk.0.ffn_up.weight"] == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["output_norm.weight"] == "F32"
    weight = Graph(tmp_path / "model.gguf").tensors["blk.0.ffn_up.weight"]
    assert torch.equal(weight.to(dtype), model.model.layers[0].mlp.up_proj.weight)


def test_a_window_bounds_the_context(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny.model("mistral")
    model.config.sliding_window = 100
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert Graph(tmp_path / "model.gguf").number("context_length") == 100


def test_what_llama_cpp_does_not_run_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="is written of `opt`"):
        write_gguf(tiny.model("opt"), tokenizer, tmp_path / "model.gguf")


def test_a_failed_write_leaves_nothing(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RankwiseError("no")

    monkeypatch.setattr(writer, "_add", fails)
    with pytest.raises(RankwiseError, match="no"):
        write_gguf(narrow("llama"), tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())

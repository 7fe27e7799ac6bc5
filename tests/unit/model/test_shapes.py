"""Shapes read from `config.json` and GGUF files are those that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.model.shapes import gguf_config, model_config, shape_numbers
from lowrank.sources.checks import model_numbers
from tests import tiny
from tests.unit.model.gguf_samples import finish, started

LEFT_OUT = ("num_key_value_heads", "head_dim", "tie_word_embeddings")


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_a_saved_model_has_the_shape_that_it_was_made_with(kind: str, tmp_path: Path) -> None:
    tiny.model(kind).config.save_pretrained(tmp_path)
    assert shape_numbers(model_config(sorted(tmp_path.iterdir()))) == tiny.shape(kind)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", LEFT_OUT)
def test_a_key_that_is_left_out_is_what_transformers_takes_it_for(family: str, gone: str, tmp_path: Path) -> None:
    given = {"hidden_size": 64, "intermediate_size": 96, "ffn_dim": 96, "num_hidden_layers": 2, "vocab_size": 50}
    given |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}
    given |= {"word_embed_proj_dim": 64} if family == "opt" else {}
    given |= {"num_experts": 4, "moe_intermediate_size": 24} if FAMILIES[family].experts else {}
    config: dict[str, Any] = {key: value for key, value in given.items() if key != gone} | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = model_numbers(AutoConfig.from_pretrained(tmp_path))
    if family == "opt":  # whose heads have no numbers of their own
        expected |= {"kv_heads": 32, "head_dim": 8 if gone != "head_dim" else 2}
    assert shape_numbers(config) == expected


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RankwiseError, match=r"`model_type: gpt2`\) is unknown here; .*opt; known families: gemma3_text, llama, "
    ):
        shape_numbers({"model_type": "gpt2"})
    given = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with pytest.raises(RankwiseError, match=r"its config\.json has no `num_hidden_layers`, `vocab_size`"):
        shape_numbers(given)
    with pytest.raises(RankwiseError, match="here are 0 of those"):
        model_config([tmp_path / "model.safetensors"])
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(RankwiseError, match=r"x\.gguf: truncated, or no GGUF file"):
        model_config([tmp_path / "x.gguf"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "architecture", "name"),
    [
        ("llama", "llama", "SmolLM"),
        ("mistral", "llama", "mistral"),
        ("qwen3", "qwen3", "x"),
        ("gemma3_text", "gemma3", "mistral"),
    ],
)
def test_metadata_of_a_gguf_file(family: str, architecture: str, name: str, tied: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    writer = started(file, architecture, head_dim=16)
    writer.add_name(name)
    writer.add_key_length(16)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), dtype=np.float32))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((3, 32), dtype=np.float32))
    finish(writer)
    found = gguf_config(file)
    assert found["max_position_embeddings"] == 64
    assert shape_numbers(found) == {
        "family": family,
        "layers": 2,
        "hidden": 32,
        "intermediate": 48,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocabulary": 3,
        "tied_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "experts": 0,
        "experts_per_token": 0,
    }

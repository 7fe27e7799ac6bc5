"""Small models to be fetched, and how tests fetch and spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank.config.sources import Model
from lowrank.errors import RankwiseError
from lowrank.sources.models import fetch_model

VOCABULARY = 300
SHAPE = {
    "family": "llama",
    "layers": 2,
    "hidden": 32,
    "intermediate": 48,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "vocabulary": VOCABULARY,
    "tied_embeddings": True,
}
PARAMETERS = 300 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32  # embedding, blocks, last norm


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a model learns the language of the texts that it reads in the night"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_llama(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **changes,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def section(path: Path, **changes: Any) -> Model:
    shape = {**SHAPE, **changes.pop("shape", {})}
    return Model.model_validate({"source": {"path": str(path)}, "shape": shape, "max_length": 64, **changes})


def fetch(path: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return fetch_model("tiny", section(path, **changes), tmp_path / "cache", tmp_path / "models" / "tiny")


def refused(path: Path, tmp_path: Path, expected: str, **changes: Any) -> str:
    """The message of a refusal that leaves nothing behind."""
    with pytest.raises(RankwiseError, match=expected) as caught:
        fetch(path, tmp_path, **changes)
    assert str(caught.value).startswith("models.tiny: ")
    models_folder = tmp_path / "models"
    assert not models_folder.exists() or not list(models_folder.iterdir())
    return str(caught.value)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_head(tensors: dict[str, torch.Tensor], change: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> None:
    """A stored output head, equal to the embedding but for its last number."""
    head = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
    head[-1, -1] += change
    tensors["lm_head.weight"] = head

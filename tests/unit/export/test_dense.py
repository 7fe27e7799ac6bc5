"""Checkpoints multiplied out: transformers opens them with its own classes, and their logits are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.export.dense import stock_model, write_stock
from lowrank.model.checkpoint import family_of
from tests import tiny
from tests.unit.export.export_samples import ADD_BIAS, IDS, MAKES, cases, pruned
from tests.unit.model.test_replacements import changed

PLACES = {  # types whose biases a family's classes can have
    "llama": "q k v o gate up down",
    "mistral": "",
    "qwen2": "q k v",
    "qwen3": "q k v o",
    "olmo2": "q k v o",
    "gemma3_text": "q k v o",
    "phi3": "",
    "opt": "q k v o fc1 fc2",
}


def opened(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    write_stock(stock_model(model), folder)
    found = AutoModelForCausalLM.from_pretrained(folder)
    package = family_of(model).model_type.removesuffix("_text")
    assert type(found).__module__ == f"transformers.models.{package}.modeling_{package}"
    return found


def holds(make: str, kind: str) -> bool:
    return make not in ADD_BIAS or {"down", "fc2"} & set(PLACES[kind.split("-")[0]].split()) != set()


@pytest.mark.parametrize(("make", "kind"), [case for case in cases() if holds(*case)])
def test_logits_are_those_of_the_compressed_model(make: str, kind: str, tmp_path: Path) -> None:
    model = MAKES[make](kind)
    stock = opened(model, tmp_path / "dense")
    assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)
    dense = tiny.model(kind)
    assert make == "dense" or not torch.allclose(stock(IDS).logits, dense(IDS).logits, atol=1e-2)


@pytest.mark.parametrize(("make", "kind"), [case for case in cases() if not holds(*case)])
def test_a_bias_without_a_place_is_named(make: str, kind: str) -> None:
    with pytest.raises(RankwiseError, match=r"layers\.0\.\S+: compression gave it a bias.*`estimator: uncentred`"):
        stock_model(MAKES[make](kind))


@pytest.mark.parametrize("kind", [kind for kind in tiny.SHAPES if kind != "olmo2"])  # whose heads cannot go
def test_one_width_costs_no_zeros_but_biases(kind: str, tmp_path: Path) -> None:
    model = pruned(kind, (4, 4), (96, 96))
    stock = stock_model(model)
    assert stock.zeros == 0
    assert stock.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert stock.config["ffn_dim" if kind == "opt" else "intermediate_size"] == 96
    assert opened(model, tmp_path / "dense").num_parameters() == stock.parameters


ROTATIONS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "qwen2": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_readers_of_other_versions_find_the_rotation(kind: str, tmp_path: Path) -> None:
    """Those of before transformers 5 look for other keys, and take 10,000 where there are none."""
    rope = ROTATIONS[kind]
    base = tiny.model(kind)
    model = type(base)(type(base.config)(**(base.config.to_dict() | {"rope_parameters": dict(rope)})))
    model.load_state_dict(base.state_dict())
    stock = opened(model, tmp_path / "dense")
    assert stock.config.rope_parameters == rope
    written = json.loads((tmp_path / "dense/config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"]
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert written["rope_scaling"] == (None if rope["rope_type"] == "default" else scaled)
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert torch.allclose(stock(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_rotation_of_a_part_is_found_by_readers_of_other_versions(tmp_path: Path) -> None:
    opened(tiny.model("phi3"), tmp_path / "dense")
    written = json.loads((tmp_path / "dense/config.json").read_text())
    assert written["partial_rotary_factor"] == tiny.MORE["phi3"]["partial_rotary_factor"] == 0.75
    assert written["rope_scaling"] is None


def test_two_rotations_are_found_by_readers_of_other_versions(tmp_path: Path) -> None:
    model = tiny.model("gemma3_text")
    stock = opened(model, tmp_path / "dense")
    written = json.loads((tmp_path / "dense/config.json").read_text())
    rope = model.config.rope_parameters
    assert stock.config.rope_parameters == rope
    assert written["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert written["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]


def test_zeros_are_counted() -> None:
    biased = stock_model(pruned("llama", (4, 4), (96, 96), bias=True))
    assert biased.zeros == tiny.LAYERS * 2 * 96  # gate and up get biases because down has one
    padded = stock_model(pruned("llama", (4, 4), (96, 40)))
    assert padded.zeros == 3 * 56 * tiny.HIDDEN
    heads = stock_model(pruned("llama-gqa", (1, 2), (96, 96)))
    assert heads.zeros == tiny.HIDDEN * tiny.HEAD_DIM * (2 + 2 + 1 + 1)  # two query heads, a key and a value head


def test_heads_stay_lost_where_the_configuration_can_say_so(tmp_path: Path) -> None:
    """Two of four heads, and the width of a head of its own; one head of three would not divide the hidden size."""
    stock = stock_model(pruned("llama-gqa", (1, 1), (96, 96)))
    assert (stock.config["num_attention_heads"], stock.config["num_key_value_heads"]) == (2, 1)
    assert stock.config["head_dim"] == tiny.HEAD_DIM
    three = stock_model(pruned("llama", (3, 3), (96, 96)))
    assert three.config["num_attention_heads"] == 4
    assert three.zeros == tiny.LAYERS * 4 * tiny.HIDDEN * tiny.HEAD_DIM
    assert stock_model(pruned("qwen2", (1, 1), (96, 96))).config["num_attention_heads"] == 4


def test_a_narrower_residual_stream_is_refused() -> None:
    with pytest.raises(RankwiseError, match=r"SliceGPT.*runs with its own code alone"):
        stock_model(changed("shortcuts", "llama"))


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    model = MAKES["identity blocks"]("llama-gqa").half()
    stock = opened(model, tmp_path / "dense")
    assert stock.dtype == torch.float16
    assert json.loads((tmp_path / "dense/config.json").read_text())["dtype"] == "float16"
    name = "model.layers.1.mlp.up_proj"
    pair, weight = model.get_submodule(name), stock.get_submodule(name).weight
    first = pair.down.weight.float()
    product = torch.cat([first, pair.rest.weight.float() @ first])[pair.places()]
    assert torch.equal(weight, product.half())

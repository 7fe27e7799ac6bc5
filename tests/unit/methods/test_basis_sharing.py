"""Basis Sharing: one basis for a type in neighbouring blocks, against numpy, its budget, its checkpoint, its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression.compress import compress_model
from lowrank.config.sources import ModelShape
from lowrank.files import load_tensors
from lowrank.methods.basis_sharing import Settings
from lowrank.model.checkpoint import load_checkpoint, recipe_of, save_checkpoint
from lowrank.model.modeling_rankwise import SharedDownLinear
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget, Ranks
from tests import tiny
from tests.unit.methods.test_skipcat import map_of, whitened_truncation
from tests.unit.model import factor_samples as samples
from tests.unit.model.factor_samples import TOKENS

PRESET = {"kind": "basis-sharing", "calibration": "c"}


def compressed(kind: str, ratio: int, **settings: Any) -> tuple[PreTrainedModel, Ranks]:
    moments = samples.statistics(kind, double=True)
    model = tiny.model(kind).double()
    return samples.compressed("basis-sharing", kind, ratio, model=model, moments=moments, **settings)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_two_blocks_share_what_is_best_for_the_inputs_of_both(kind: str) -> None:
    """Their matrices on top of each other, whitened by all tokens of both: x has twice as many rows."""
    dense = tiny.model(kind).double()
    inputs = samples.inputs_of_layers(dense)
    model, ranks = compressed(kind, 30)
    budget = Budget.of(samples.shape_of(kind))
    shared = [module for module in budget.modules if module.layer == 0 and module.type.input == "hidden"]
    assert {module.type.name for module in shared} in ({"q", "k", "v", "gate", "up"}, {"q", "k", "v", "fc1"})
    for module in shared:
        names = [module.name, module.name.replace("layers.0", "layers.1")]
        rank = ranks[names[0]]
        assert ranks[names[1]] == rank
        if rank is None:
            continue
        weight = torch.cat([dense.get_submodule(name).weight for name in names]).numpy()
        both = np.concatenate([inputs[name].numpy() for name in names])
        best = whitened_truncation(weight, both, rank)
        found = torch.cat([map_of(model, name, weight.shape[1]) for name in names])
        assert torch.allclose(found, torch.from_numpy(best), atol=3e-4)
        assert model.get_submodule(names[1]).down is model.get_submodule(names[0]).down
    for module in budget.modules:
        if module.type.input != "hidden" and (rank := ranks[module.name]):
            weight = dense.get_submodule(module.name).weight.numpy()
            best = whitened_truncation(weight, inputs[module.name].numpy(), rank)
            assert torch.allclose(map_of(model, module.name, weight.shape[1]), torch.from_numpy(best), atol=3e-4)


def deeper(layers: int) -> tuple[PreTrainedModel, ModelShape]:
    """A tiny Llama of more blocks."""
    config = tiny.model("llama").config
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model, ModelShape(**tiny.shape("llama") | {"layers": layers})


@pytest.mark.parametrize(("layers", "blocks"), [(5, 2), (5, 3), (4, 4)])
def test_blocks_that_are_left_share_among_fewer(layers: int, blocks: int, tmp_path: Path) -> None:
    model, shape = deeper(layers)
    collect_statistics(model, TOKENS, 2, tmp_path, samples.CPU)
    budget = Budget.of(shape)
    task = {"model": model, "budget": budget, "ratio": 25, "seed": 0, "statistics": Statistics(tmp_path, shape)}
    preset = PRESET | {"blocks": blocks}
    ranks = compress_model("basis-sharing", preset, task)
    owners = {name: entry.get("shares", name) for name, entry in recipe_of(model).items() if name.endswith("gate_proj")}
    assert owners == {
        f"model.layers.{layer}.mlp.gate_proj": f"model.layers.{layer // blocks * blocks}.mlp.gate_proj"
        for layer in range(layers)
    }
    counts = count_parameters(model, shape)
    by_hand = 0
    for module in budget.modules:
        m, n, rank = module.out_features, module.in_features, ranks[module.name]
        owns = module.type.input != "hidden" or module.layer % blocks == 0
        by_hand += m * n if rank is None else rank * (m + (n if owns else 0))
    assert counts["decoder_linears"] == by_hand <= 0.75 * counts["decoder_linears_dense"]
    assert by_hand > 0.72 * counts["decoder_linears_dense"]
    assert by_hand == Settings.model_validate(preset).kept_parameters(budget, 25)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_the_basis_is_in_the_file_once_and_the_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, ranks = compressed(kind, 30)
    model = model.float()
    samples.check_round_trip(model, tmp_path)
    keys = set(load_tensors(tmp_path / "checkpoint/model.safetensors"))
    for name, rank in ranks.items():
        if rank is not None:
            shares = isinstance(model.get_submodule(name), SharedDownLinear)
            assert (f"{name}.down.weight" in keys) != shares
            assert f"{name}.up.weight" in keys
    again = load_checkpoint(tmp_path / "checkpoint", torch.float32)
    save_checkpoint(again, tmp_path / "source", tmp_path / "again")
    assert set(load_tensors(tmp_path / "again/model.safetensors")) == keys
    assert torch.equal(load_checkpoint(tmp_path / "again", torch.float32)(TOKENS).logits, model(TOKENS).logits)


def test_a_ratio_of_zero_changes_nothing() -> None:
    samples.check_unchanged_at_ratio_zero("basis-sharing", "qwen3")


def test_what_it_refuses() -> None:
    budget = Budget.of(samples.shape_of("llama"))

    def problems(**more: Any) -> list[tuple[str, str]]:
        return list(Settings.model_validate(PRESET | more).misfits(budget, 20, None))

    assert problems() == []
    assert problems(blocks=3) == [("blocks", "3 blocks cannot share where there are 2; take fewer")]
    ((key, reason),) = problems(shared=["q", "fc1"])
    assert (key, "no linear layers of type fc1" in reason) == ("shared", True)
    ((key, reason),) = problems(shared=["q", "v"], uncompressed=["v"])
    assert (key, reason.startswith("v stay dense")) == ("shared", True)
    with pytest.raises(ValidationError, match="blocks"):
        Settings.model_validate(PRESET | {"blocks": 1})

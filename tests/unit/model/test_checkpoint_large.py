"""Checkpoints of models that fill the memory: never all new layers beside all old ones, and files of a limited size."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.compression.compress import with_identity_blocks
from lowrank.config.sources import ModelShape
from lowrank.model import checkpoint
from lowrank.model.checkpoint import load_checkpoint, replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.replacements import Deferred
from lowrank.ranks.budget import Budget
from tests import tiny

MODULES = {module.name: module for module in Budget.of(ModelShape(**tiny.shape("llama"))).modules}


def pair(name: str) -> LowRankFactors:
    module, draw = MODULES[name], torch.Generator().manual_seed(len(name))
    up, down = torch.randn(module.out_features, 8, generator=draw), torch.randn(8, module.in_features, generator=draw)
    return LowRankFactors(down.double(), up.double())


@pytest.mark.parametrize("identity", [False, True])
def test_new_layers_are_made_one_at_a_time_and_are_those_of_all_at_once(identity: bool) -> None:
    live: list[weakref.ref[Any]] = []
    most = [0]

    def made(name: str) -> LowRankFactors:
        found = pair(name)
        live.append(weakref.ref(found.up))
        most[0] = max(most[0], sum(ref() is not None for ref in live))
        return found

    one, all_at_once = tiny.model("llama"), tiny.model("llama")
    deferred = Deferred(MODULES, made)
    ranks = replace_modules(one, with_identity_blocks(deferred) if identity else deferred)
    together = {name: pair(name) for name in MODULES}
    assert replace_modules(all_at_once, with_identity_blocks(together) if identity else together) == ranks
    assert ranks == dict.fromkeys(MODULES, 8)
    assert len(live) == len(MODULES)
    assert most[0] <= 2
    for (name, ours), (_, theirs) in zip(one.named_parameters(), all_at_once.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_deferred_replacements_are_a_mapping() -> None:
    deferred = Deferred(["a", "b"], lambda name: pair(next(iter(MODULES))))
    assert list(deferred) == ["a", "b"]
    assert len(deferred) == 2
    assert "c" not in deferred
    with pytest.raises(KeyError):
        deferred["c"]


def test_groups_are_made_once_each_and_only_the_last_is_held() -> None:
    live: list[weakref.ref[Any]] = []
    asked, most = [], [0]

    def made(layer: int) -> dict[str, LowRankFactors]:
        asked.append(layer)
        found = {name: pair(name) for name, module in MODULES.items() if module.layer == layer}
        live.extend(weakref.ref(each.up) for each in found.values())
        most[0] = max(most[0], sum(ref() is not None for ref in live))
        return found

    layers = sorted({module.layer for module in MODULES.values()})
    groups = [(layer, [name for name, module in MODULES.items() if module.layer == layer]) for layer in layers]
    one, all_at_once = tiny.model("llama"), tiny.model("llama")
    ranks = replace_modules(one, Deferred.of_groups(groups, made))
    assert ranks == replace_modules(all_at_once, {name: pair(name) for name in MODULES})
    assert asked == layers
    assert len(layers) > 1
    assert most[0] <= 2 * len(MODULES) // len(layers)
    for (name, ours), (_, theirs) in zip(one.named_parameters(), all_at_once.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_large_checkpoints_are_written_in_parts_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LARGEST_FILE", "100KB")
    model = tiny.model("llama")
    replace_modules(model, Deferred(MODULES, pair))
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    sums = save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "model")
    parts = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) < 120_000
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert set(index["weight_map"].values()) == {part.name for part in parts} <= set(sums)
    opened = load_checkpoint(tmp_path / "model", torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(opened.get_parameter(name), parameter), name

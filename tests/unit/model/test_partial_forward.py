"""Passes that begin at a block equal whole passes bit for bit, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch

from lowrank.model.checkpoint import family_of
from lowrank.model.losses import last_hidden
from lowrank.model.partial_forward import block_input, exchanged, input_of, last_hidden_from, on_devices
from tests import tiny
from tests.unit.model.factor_samples import CPU, TOKENS


@pytest.mark.parametrize("kind", tiny.SHAPES)
def test_a_pass_from_any_block_equals_a_whole_one(kind: str) -> None:
    model = tiny.model(kind)
    family = family_of(model)
    seen: dict[str, torch.Tensor] = {}
    paths = [linear.path for linear in family.types]
    handles = []
    for layer in range(tiny.LAYERS):
        for path in ["", *paths]:
            name = f"{family.blocks}.{layer}.{path}".rstrip(".")

            def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[name] = args[0].clone()

            handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.inference_mode():
        whole = last_hidden(model, TOKENS)
        for handle in handles:
            handle.remove()
        assert torch.equal(block_input(model, TOKENS), seen[f"{family.blocks}.0"])
        for layer in range(tiny.LAYERS):
            entering = seen[f"{family.blocks}.{layer}"]
            assert torch.equal(last_hidden_from(model, TOKENS, layer, entering), whole)
            for later in range(layer, tiny.LAYERS):
                for path in paths:
                    name = f"{family.blocks}.{later}.{path}"
                    assert torch.equal(input_of(model, name, TOKENS, layer, entering), seen[name])
        assert torch.equal(last_hidden(model, TOKENS), whole)
        other = last_hidden_from(model, TOKENS, 1, seen[f"{family.blocks}.1"] * 2)
        assert not torch.allclose(other, whole), "the hidden states that are given are not read"


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = tiny.model("qwen3")
    before = model(TOKENS).logits
    name = "model.layers.1.mlp.up_proj"
    dense = model.get_submodule(name)
    hidden = torch.zeros(*TOKENS.shape, tiny.HIDDEN)
    with pytest.raises(RuntimeError, match="shapes"), exchanged(model, {name: torch.nn.Linear(3, 5)}):
        last_hidden_from(model, TOKENS, 1, hidden)
    assert model.get_submodule(name) is dense
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(TOKENS).logits, before)


def test_a_model_comes_back_from_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    moves: list[torch.device] = []
    monkeypatch.setattr(model, "to", moves.append)
    with on_devices(model, torch.device("cuda", 1)):
        assert moves == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="stop"), on_devices(model, torch.device("cuda", 0)):
        raise ValueError("stop")
    assert moves[1::2] == [CPU, CPU]

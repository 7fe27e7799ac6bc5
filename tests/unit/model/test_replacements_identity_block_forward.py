"""What a forward pass of a pair with an identity block does: its operations, its compilation, and when it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lowrank.model.checkpoint import load_checkpoint, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import IdentityBlockLinear, _may_write
from lowrank.model.replacements import IdentityBlockFactors
from lowrank.post_training.subspace import second_factor
from tests import tiny
from tests.unit.model.test_replacements import probe
from tests.unit.model.test_replacements_identity_block import random_factors, with_identity_blocks

VIEWS = {"view", "_unsafe_view", "reshape", "slice", "t", "expand", "alias", "detach", "transpose"}
DEPENDS_ON_DATA = {"nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "is_nonzero", "equal"}


class Operations(TorchDispatchMode):
    """The names of the operations that run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def a_layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> IdentityBlockLinear:
    layer = IdentityBlockFactors.of(random_factors(24, 16, 8, 0, bias), "layer").as_module(dtype)
    assert isinstance(layer, IdentityBlockLinear)
    return layer


def by_hand(layer: IdentityBlockLinear, x: torch.Tensor) -> np.ndarray:
    """The outputs by the stored tensors alone, in numpy and float64."""
    state = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    weight, rows = np.zeros((layer.out_features, layer.in_features)), state["rows"].astype(int)
    weight[rows] = state["down.weight"]
    weight[np.setdiff1d(np.arange(layer.out_features), rows)] = state["rest.weight"] @ state["down.weight"]
    return x.double().numpy() @ weight.T + state.get("bias", 0.0)


def operations(layer: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.no_grad(), Operations() as seen:
        layer(x)
    return seen.names


@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 16), (2, 3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_both_paths_are_what_the_stored_tensors_say(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = a_layer(bias=bias), torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        written = layer._written(x)
    assert written.shape == layer(x).shape == (*shape[:-1], 24)
    for found in (written, layer(x)):
        np.testing.assert_allclose(found.numpy(), by_hand(layer, x), rtol=0, atol=1e-9)


def test_a_pass_without_gradients_is_two_products_and_one_pass_over_their_buffer() -> None:
    x = torch.randn(2, 3, 16, dtype=torch.float64, device="meta")  # stands for any accelerator
    products = ["new_empty", "mm", "mm", "index_select"]
    assert operations(a_layer(bias=False).to("meta"), x) == products
    assert operations(a_layer().to("meta"), x) == [*products, "add"]


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_has_no_operation_that_depends_on_data(strict: bool) -> None:
    layer, x = a_layer().eval(), torch.randn(2, 3, 16, dtype=torch.float64)
    program = torch.export.export(layer, (x,), strict=strict)
    names = {node.target.overloadpacket.__name__ for node in program.graph.nodes if node.op == "call_function"}
    assert {"linear", "gather"} <= names
    assert not names & DEPENDS_ON_DATA
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_compiles_to_one_graph_whatever_came_before(grad: bool) -> None:
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    for prepared in (True, False):
        layer = a_layer()
        if not prepared:
            layer._placed = None
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        np.testing.assert_allclose(compiled.numpy(), by_hand(layer, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_model_compiles_to_one_graph(pairs: bool) -> None:
    model = with_identity_blocks("llama-gqa")
    if pairs:  # in half of its layers
        for name, layer in list(model.named_modules()):
            if isinstance(layer, IdentityBlockLinear) and name.endswith(("q_proj", "up_proj", "down_proj")):
                pair = LowRankFactors(layer.down.weight, second_factor(layer), layer.bias)
                model.set_submodule(name, pair.as_module(torch.float32))
    with torch.no_grad():
        expected = model(probe(), use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(probe(), use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-4)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    save_checkpoint(model, folder / "tokenizer", folder / "checkpoint")
    return folder / "checkpoint"


def test_an_opened_model_knows_its_order_before_any_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(saved(with_identity_blocks("llama"), tmp_path), torch.float32)

    def counts_again(*_: object) -> torch.Tensor:
        raise AssertionError("the order is computed in a forward pass")

    monkeypatch.setattr(IdentityBlockLinear, "_places", counts_again)
    with torch.inference_mode():
        model(probe())
    model.double().eval()(probe())
    model(probe())


def test_the_stored_form_is_the_recipe_s_and_a_dense_model_of_the_same_products_agrees(tmp_path: Path) -> None:
    """Checkpoints that were written before open to the same outputs: names, types and meaning are what they were."""
    folder = saved(with_identity_blocks("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    recipe = config["recipe"]
    with_features = load_checkpoint(folder, torch.float32)
    for name, entry in recipe.items():  # recipes that were written before do not say the features
        layer = with_features.get_submodule(name)
        assert (entry.pop("in_features"), entry.pop("out_features")) == (layer.in_features, layer.out_features)
    assert set(map(json.dumps, recipe.values())) == {'{"kind": "identity_block", "rank": 24, "bias": true}'}
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    model, dense = load_checkpoint(folder, torch.float32), tiny.model("llama").double()
    for name in recipe:
        parts = {key.removeprefix(f"{name}."): key for key in stored if key.startswith(f"{name}.")}
        assert set(parts) == {"bias", "rows", "down.weight", "rest.weight"}
        rows, down, rest = (stored[parts[part]] for part in ("rows", "down.weight", "rest.weight"))
        assert rows.dtype == torch.int32
        layer = dense.get_submodule(name)
        others = [row for row in range(layer.out_features) if row not in rows.tolist()]
        layer.weight.data[rows.long()] = down.double()
        layer.weight.data[others] = rest.double() @ down.double()
        layer.bias = nn.Parameter(stored[parts["bias"]].double())
    with torch.no_grad():
        torch.testing.assert_close(model(probe()).logits.double(), dense(probe()).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(probe()).logits, with_features(probe()).logits, rtol=0, atol=0)


class Doubled(nn.Module):
    """Stands for an adapter around a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = 2 * self.inner(x)
        return result


def test_products_are_written_only_where_nothing_else_is_wanted() -> None:
    x = torch.randn(3, 16, dtype=torch.float64)

    def may_write(change: Callable[[IdentityBlockLinear], object] = lambda layer: None) -> bool:
        layer = a_layer(bias=False)
        change(layer)
        return _may_write(x, layer.down, layer.rest)

    assert not may_write()  # gradients
    with torch.no_grad():
        assert may_write()
        assert not may_write(lambda layer: layer.down.register_forward_hook(lambda *_: None))
        assert not may_write(lambda layer: layer.rest.register_forward_pre_hook(lambda *_: None))
        assert not may_write(lambda layer: setattr(layer.down, "forward", layer.down.forward))
        assert not may_write(lambda layer: setattr(layer, "rest", Doubled(layer.rest)))
        assert not may_write(lambda layer: layer.float())
        assert not may_write(lambda layer: layer.down.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not may_write()


def test_adapters_are_run_and_autocast_is_obeyed() -> None:
    layer, x = a_layer(torch.float32, bias=False), torch.randn(3, 16)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.down = Doubled(layer.down)
        assert torch.allclose(layer(x), 2 * plain, rtol=0, atol=1e-4)


def test_gradients_reach_inputs_and_both_factors() -> None:
    layer, x = a_layer().requires_grad_(True), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_memory_that_waits_for_its_rows_is_left_alone() -> None:
    with torch.device("meta"):
        layer = IdentityBlockLinear(16, 24, 8, bias=False)
    layer = layer.to_empty(device="cpu").double()
    layer.rows.fill_(2**30)
    layer.eval()
    source = a_layer(bias=False)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(layer(x), source(x))

"""Summed gradients against autograd on the weights themselves, one sequence at a time; the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from lowrank.calibration.gradients import sum_gradients
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model import losses, partial_forward
from lowrank.model.checkpoint import replace_modules
from lowrank.model.devices import Devices
from lowrank.model.factors import LowRankFactors
from lowrank.ranks.budget import Budget
from tests import tiny

CPU = torch.device("cpu")


def names_of(kind: str) -> list[str]:
    return [module.name for module in Budget.of(ModelShape(**tiny.shape(kind))).modules]


def some_tokens(sequences: int = 5, length: int = 9) -> torch.Tensor:
    return torch.randint(2, 400, (sequences, length), generator=torch.Generator().manual_seed(3))


def by_autograd(model: PreTrainedModel, tokens: torch.Tensor, names: list[str]) -> list[dict[str, torch.Tensor]]:
    """The gradients of each sequence's loss, as transformers computes it."""
    weights = {name: model.get_submodule(name).weight for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = []
    for ids in tokens:
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        gradients.append(dict(zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    model.requires_grad_(False)
    return gradients


@pytest.mark.parametrize("kind", tiny.SHAPES)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_sums_equal_those_of_autograd(kind: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, names = tiny.model(kind).double(), some_tokens(), names_of(kind)
    expected = by_autograd(model, tokens, names)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 3)  # several chunks a sequence, and some across two of them
    plain = sum_gradients(model, tokens, names, CPU, batch_size=batch_size)
    squares = sum_gradients(model, tokens, iter(names), CPU, squared=True, batch_size=batch_size)
    assert list(plain) == list(squares) == names
    for name in names:
        first = sum(one[name] for one in expected)
        second = sum(one[name] ** 2 for one in expected)
        assert float(first.abs().max()) > 0
        assert torch.allclose(plain[name], first, rtol=1e-4, atol=1e-5 * float(first.abs().max())), name
        assert torch.allclose(squares[name], second, rtol=1e-4, atol=1e-5 * float(second.max())), name


def test_sums_of_a_narrow_model_are_float32_and_near() -> None:
    tokens, names = some_tokens(), names_of("llama-gqa")
    wide = sum_gradients(tiny.model("llama-gqa"), tokens, names, CPU)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = sum_gradients(tiny.model("llama-gqa").to(dtype), tokens, names, CPU)
        for name in names:
            assert narrow[name].dtype == torch.float32
            assert torch.linalg.norm(narrow[name] - wide[name]) < 0.1 * torch.linalg.norm(wide[name])


def test_blocks_are_placed_with_room_for_the_sums_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    spread = partial_forward.spread

    def record(model: PreTrainedModel, path: str, devices: Devices, beside: float = 0) -> PreTrainedModel:
        told.append(beside)
        return spread(model, path, devices, beside)

    monkeypatch.setattr(partial_forward, "spread", record)
    model, names = tiny.model("llama-gqa").to(torch.bfloat16), names_of("llama-gqa")
    sums = sum_gradients(model, some_tokens(), names, CPU)
    blocks = len(model.model.layers)
    assert told[0] == sum(4 * total.numel() for total in sums.values()) / blocks  # float32 beside 16 bits


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model("llama-gqa")
    model.train()
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].mlp.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    tokens = some_tokens()
    with torch.no_grad():
        sum_gradients(model, tokens, names_of("llama-gqa"), CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(RankwiseError, match="the loss of a calibration window is not finite"):
        sum_gradients(model, tokens, ["model.layers.0.mlp.up_proj"], CPU)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_outputs_that_are_not_finite_name_the_first_layer_that_has_them() -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[:] = float("nan")
    with pytest.raises(RankwiseError, match=r"^model\.layers\.1\.mlp\.up_proj: outputs are not finite"):
        sum_gradients(model, some_tokens(), names_of("llama"), CPU)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_gradient_that_is_not_finite_names_the_layer_where_it_begins() -> None:
    model, names = tiny.model("llama"), names_of("llama")

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    layer = model.get_submodule("model.layers.0.mlp")
    handle = layer.register_forward_hook(lambda module, args, output: Poison.apply(output))
    with pytest.raises(RankwiseError, match=r"model\.layers\.0\.mlp\.down_proj: its gradient is not finite"):
        sum_gradients(model, some_tokens(), names, CPU)
    handle.remove()


def test_what_has_no_gradient_is_refused() -> None:
    model, tokens = tiny.model("llama"), some_tokens()
    with pytest.raises(RankwiseError, match=r"model\.layers\.9\.mlp\.up_proj: the model has no such layer"):
        sum_gradients(model, tokens, ["model.layers.9.mlp.up_proj"], CPU)
    with pytest.raises(RankwiseError, match="one sequence of two tokens"):
        sum_gradients(model, tokens[:, :1], names_of("llama"), CPU)
    name = "model.layers.1.mlp.up_proj"
    replace_modules(model, {name: LowRankFactors(torch.zeros(4, tiny.HIDDEN), torch.zeros(tiny.INTERMEDIATE, 4))})
    with pytest.raises(RankwiseError, match=rf"{name}: gradients are taken of dense linear layers, not of LowRank"):
        sum_gradients(model, tokens, [name], CPU)

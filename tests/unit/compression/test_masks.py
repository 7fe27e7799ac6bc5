"""Masks: how they are drawn, what gradient goes through, and the distance that is trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.compression import masks
from lowrank.compression.masks import MaskedLinear, MaskTraining
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.model.factor_samples import CPU, TOKENS


def a_layer(k: int) -> MaskedLinear:
    return MaskedLinear(torch.zeros(k, 2), torch.zeros(3, k), None)


@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0])
def test_a_mask_is_one_as_often_as_the_logit_says(temperature: float) -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(20_000)
    layer = a_layer(len(logits))
    masks._draw_masks({"a": layer}, logits, [len(logits)], temperature, torch.Generator().manual_seed(0))
    assert set(layer.mask.unique().tolist()) == {0.0, 1.0}
    means = layer.mask.view(3, -1).mean(1)
    assert torch.allclose(means, 1 - torch.exp(-torch.exp(torch.tensor([-2.0, 0.0, 1.0]))), atol=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.floats(0.1, 2))
def test_the_gradient_is_that_of_the_sigmoid_at_the_noise(seed: int, temperature: float) -> None:
    """p (1 - p) / t with p the sigmoid that is cut at a half; each layer has its own part."""
    logits = torch.linspace(-3, 3, 7, requires_grad=True)
    layers = {"a": a_layer(3), "b": a_layer(4)}
    masks._draw_masks(layers, logits, [3, 4], temperature, torch.Generator().manual_seed(seed))
    uniform = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    noise = -torch.log(-torch.log(uniform))
    p = 1 / (1 + torch.exp(-(logits.detach() + noise) / temperature))
    found = torch.cat([layer.mask for layer in layers.values()])
    assert torch.equal(found.detach().round(), (logits.detach() + noise > 0).float())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.allclose(gradient, p * (1 - p) / temperature, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_the_distance_is_of_the_states_that_transformers_shows(kind: str) -> None:
    model, family = tiny.model(kind).double(), FAMILIES[kind.split("-")[0]]
    name = f"{family.blocks}.0.{family.types[0].path}"
    dense: Any = model.get_submodule(name)
    u, s, vh = torch.linalg.svd(dense.weight, full_matrices=False)
    layer = MaskedLinear(vh, u * s, dense.bias)
    assert float(masks._distance(model, TOKENS[:3], {name: layer})) < 1e-20
    layer.mask = (torch.arange(len(s)) % 2).double()
    found = float(masks._distance(model, TOKENS[:3], {name: layer}))
    right = model(TOKENS[:3], output_hidden_states=True).hidden_states
    dense.weight.data = (u * s * layer.mask) @ vh
    wrong = model(TOKENS[:3], output_hidden_states=True).hidden_states
    middle, last = (tiny.LAYERS - 1) // 2 + 1, tiny.LAYERS
    by_hand = sum(
        float(((wrong[i] - right[i]).norm(dim=-1) / right[i].norm(dim=-1)).square().mean()) for i in (middle, last)
    )
    assert found == pytest.approx(by_hand, rel=1e-5)
    assert found > 0


def test_a_token_with_huge_states_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token's states are a thousand times as large as others: a share of all would see nothing else."""
    right = torch.ones(1, 4, 8)
    right[:, 0] *= 1000
    wrong = right.clone()
    wrong[:, 1:] += 0.5
    states = iter([[right, right], [wrong, wrong]])
    monkeypatch.setattr(masks, "_states", lambda model, ids: next(states))
    assert float(masks._distance(tiny.model("llama"), TOKENS[:1], {})) == pytest.approx(2 * 0.25 * 3 / 4)


def test_when_the_budget_is_met_pressure_acts_only_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that draws all logits up again, those that met the budget last are taken."""
    model = tiny.model("llama")
    name = "model.layers.0.self_attn.q_proj"
    layer = MaskedLinear(torch.randn(8, tiny.HIDDEN), torch.randn(tiny.HIDDEN, 8), None)
    pressures: list[float] = []
    asked: list[bool] = []

    def pressure(training: MaskTraining, step: int) -> float:
        pressures.append(step)
        return 100.0

    def enough(counts: dict[str, int]) -> bool:
        asked.append(counts[name] <= 4)
        return asked[-1]

    monkeypatch.setattr(masks, "_pressure", pressure)
    pull = torch.linspace(3, 5, 8)
    monkeypatch.setattr(masks, "_distance", lambda model, ids, layers: (pull - layers[name].mask).square().sum())
    training = MaskTraining(400, 1, 0.2, 0.4, 0.1, 0.01, 20, 0)
    monkeypatch.setattr(masks, "FIRST_LOGIT", 2.0)
    monkeypatch.setattr(masks, "LAST_LOGIT", -1.0)
    monkeypatch.setattr(masks, "_draw_masks", _as_they_are)
    found = masks.trained_masks(model, TOKENS[:2], {name: layer}, enough, training, CPU)[name]
    met = asked.index(True)
    assert len(asked) == met + 20 + 1
    assert int((found > 0).sum()) <= 4
    assert not all(asked[met:])
    assert pressures == [*range(met), *[met] * asked[met:-1].count(False)]


def _as_they_are(layers: Any, logits: torch.Tensor, sizes: Any, temperature: float, generator: Any) -> None:
    """Logits in the place of masks, so that a loss may pull them."""
    with torch.enable_grad():
        for layer, part in zip(layers.values(), torch.split(logits, sizes), strict=True):
            layer.mask = part * 1.0


def with_large_states(dtype: torch.dtype) -> tuple[Any, dict[str, MaskedLinear]]:
    """A model whose hidden states are thousands of times as large as before, and masks for its matrices."""
    model = tiny.model("llama")
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data *= 10_000
    model.model.norm.weight.data *= 3000
    model.to(dtype)
    layers = {}
    for module in Budget.of(ModelShape(**tiny.shape("llama"))).modules:
        weight = model.get_submodule(module.name).weight
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        layers[module.name] = MaskedLinear((s.sqrt()[:, None] * vh).to(dtype), (u * s.sqrt()).to(dtype), None)
    return model, layers


def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Of logits by the distance: as it is, and by way of a scale; and that scale."""
    model, layers = with_large_states(dtype)
    sizes = [len(layer.down) for layer in layers.values()]
    logits = torch.zeros(sum(sizes), requires_grad=True)
    masks._draw_masks(layers, logits, sizes, 0.4, torch.Generator().manual_seed(0))
    course = masks._Course()
    with torch.enable_grad():
        loss = masks._distance(model, TOKENS.repeat(8, 1), layers)
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return plain, masks._gradient(loss, logits, course), course.scale


def test_half_precision_holds_the_gradient_of_many_tokens_with_large_states() -> None:
    expected, same, unchanged = gradients(torch.float32)
    assert torch.equal(expected, same)
    assert unchanged == masks.FIRST_SCALE
    lost, found, scale = gradients(torch.float16)
    assert not lost.any()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999
    assert float((found - expected).norm()) < 0.03 * float(expected.norm())
    assert 1 < scale < masks.FIRST_SCALE, "at the first one, gradients overflow"


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    logits = torch.zeros(3, requires_grad=True)
    with torch.enable_grad():
        loss = logits.sum() * float("nan")
    with pytest.raises(RankwiseError, match="the loss of step 7 is not finite; set `dtype: float32`"):
        masks._gradient(loss, logits, masks._Course(7))


def test_a_gradient_that_is_not_finite_at_any_scale_is_an_error() -> None:
    logits = torch.zeros(3, requires_grad=True)
    with torch.enable_grad():
        loss = logits.abs().sqrt().sum()
    with pytest.raises(RankwiseError, match="the gradient of step 7 is not finite; set `dtype: float32`"):
        masks._gradient(loss, logits, masks._Course(7))


def test_a_pressure_that_outgrows_numbers_says_what_to_lower() -> None:
    training = MaskTraining(10_000, 1, 0.1, 0.4, 1e-3, 0.2, 0, 0)
    assert masks._pressure(training, 100) == pytest.approx(1e-3 * 1.2**100)
    with pytest.raises(RankwiseError, match=r"by step 9000 .* lower `growth`"):
        masks._pressure(training, 9000)

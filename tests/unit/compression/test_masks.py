"""Masks: how they are drawn, what gradient goes through, and the distance that is trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.compression import masks
from lowrank.compression.masks import MaskedLinear, MaskTraining
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from tests import tiny
from tests.unit.model.factor_samples import TOKENS


def a_layer(k: int) -> MaskedLinear:
    return MaskedLinear(torch.zeros(k, 2), torch.zeros(3, k), None)


@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0])
def test_a_mask_is_one_as_often_as_the_logit_says(temperature: float) -> None:
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat_interleave(20_000)
    layer = a_layer(len(logits))
    masks._draw_masks({"a": layer}, logits, [len(logits)], temperature, torch.Generator().manual_seed(0))
    assert set(layer.mask.unique().tolist()) == {0.0, 1.0}
    means = layer.mask.view(3, -1).mean(1)
    assert torch.allclose(means, torch.sigmoid(torch.tensor([-2.0, 0.0, 1.0])), atol=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.floats(0.1, 2))
def test_the_gradient_is_that_of_the_sigmoid_at_the_noise(seed: int, temperature: float) -> None:
    """p (1 - p) / t with p the sigmoid that is cut at a half; each layer has its own part."""
    logits = torch.linspace(-3, 3, 7, requires_grad=True)
    layers = {"a": a_layer(3), "b": a_layer(4)}
    masks._draw_masks(layers, logits, [3, 4], temperature, torch.Generator().manual_seed(seed))
    uniform = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    noise = torch.log(uniform) - torch.log1p(-uniform)
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
    by_hand = sum(float((wrong[i] - right[i]).square().mean() / right[i].square().mean()) for i in (middle, last))
    assert found == pytest.approx(by_hand, rel=1e-5)
    assert found > 0


def test_a_pressure_that_outgrows_numbers_says_what_to_lower() -> None:
    training = MaskTraining(10_000, 1, 0.1, 0.4, 1e-3, 0.2, 0)
    assert masks._pressure(training, 100) == pytest.approx(1e-3 * 1.2**100)
    with pytest.raises(RankwiseError, match=r"by step 9000 .* lower `growth`"):
        masks._pressure(training, 9000)

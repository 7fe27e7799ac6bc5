"""The loss of feature distillation, and training one block by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lowrank.config.tuning import FeatureDistillation
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import replace_modules
from lowrank.model.factors import IdentityColumnsFactors, LowRankFactors, SharedDownFactors
from lowrank.model.partial_forward import block_input, output_of
from lowrank.model.replacements import IdentityBlockFactors
from lowrank.post_training.distillation import Features, distil_block, factor_weights, feature_loss
from tests import tiny

BLOCK = "model.layers.1"


def slow_loss(outputs: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """The paper's loss token by token, less what it is for equal states."""
    total = 0.0
    for a, y in zip(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1, targets.shape[-1]), strict=True):
        distance = sum(abs(p - q) for p, q in zip(a, y, strict=True)) / len(a)
        cosine = sum(p * q for p, q in zip(a, y, strict=True)) / math.sqrt(sum(a * a) * sum(y * y))
        total += distance - math.log(1 / (1 + math.exp(-cosine))) + math.log(1 / (1 + math.exp(-1)))
    return total / outputs[..., 0].size


def states(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.floats(0.01, 100))
def test_the_loss_is_the_formula(seed: int, windows: int, length: int, width: int, scale: float) -> None:
    a, y = scale * states(seed, windows, length, width), states(seed + 1, windows, length, width)
    assert float(feature_loss(a, y)) == pytest.approx(slow_loss(a.numpy(), y.numpy()), rel=1e-9, abs=1e-12)


@given(st.integers(0, 10**6))
def test_equal_states_lose_nothing_and_others_something(seed: int) -> None:
    y = states(seed, 2, 3, 5)
    assert float(feature_loss(y, y)) == pytest.approx(0, abs=1e-12)
    assert float(feature_loss(y + 0.01 * states(seed + 1, 2, 3, 5), y)) > 0
    # A larger state of the same direction differs in size alone
    assert float(feature_loss(2 * y, y)) == pytest.approx(float(y.abs().mean()), rel=1e-9)


def test_its_gradient_is_that_of_finite_differences() -> None:
    y = states(0, 2, 3, 5)
    a = states(1, 2, 3, 5).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a: feature_loss(a, y), (a,))


# --- one block ---


def preset(**changes: Any) -> FeatureDistillation:
    values = {
        "kind": "feature-distillation", "calibration": "c", "learning_rate": 0.001, "epochs": 6, "batch_size": 8,
        "validation_windows": 4, "evaluate_every": 10,
    } | changes  # fmt: skip
    return FeatureDistillation.model_validate(values)


def halves(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's truncated SVD: up, m x rank, and down, rank x n."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def identity_columns(weight: torch.Tensor, rank: int) -> IdentityColumnsFactors:
    up, down = halves(weight, rank)
    bias = torch.full((len(up),), 0.01)
    inner = torch.linalg.solve(down[:, :rank], down[:, rank:])
    return IdentityColumnsFactors(torch.arange(down.shape[1], dtype=torch.int32), inner, up @ down[:, :rank], bias)


def replaced(model: PreTrainedModel, rank: int = 24) -> dict[str, Any]:
    """Every form of a pair in one block: plain, identity in the second factor, in the first, and shared ones.

    The first factor that `model.layers.1.self_attn.q_proj` has is stored in the block before.
    """
    weights = {name: module.weight.detach() for name, module in model.named_modules() if hasattr(module, "weight")}
    q0 = halves(weights["model.layers.0.self_attn.q_proj"], rank)
    gate, down_proj = (f"{BLOCK}.mlp.{name}" for name in ("gate_proj", "down_proj"))
    shared = halves(torch.cat([weights[gate], weights[f"{BLOCK}.mlp.up_proj"]]), rank)
    up, down = halves(weights[down_proj], rank)
    return {
        "model.layers.0.self_attn.q_proj": LowRankFactors(q0[1], q0[0]),
        f"{BLOCK}.self_attn.q_proj": SharedDownFactors(
            "model.layers.0.self_attn.q_proj", weights[f"{BLOCK}.self_attn.q_proj"].double() @ q0[1].T
        ),
        f"{BLOCK}.self_attn.o_proj": identity_columns(weights[f"{BLOCK}.self_attn.o_proj"], rank),
        gate: LowRankFactors(shared[1], shared[0][: len(weights[gate])]),
        f"{BLOCK}.mlp.up_proj": SharedDownFactors(gate, shared[0][len(weights[gate]) :]),
        down_proj: IdentityBlockFactors.of(LowRankFactors(down, up), down_proj),
    }


def features(model: PreTrainedModel, dense: PreTrainedModel, windows: int = 68, layer: int = 1) -> Features:
    """What the block reads in both models, and what it puts out in the dense one."""
    ids = torch.randint(2, 400, (windows, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        read = [block_input(each, ids) for each in (dense, model)]
        for before in range(layer):
            read = [output_of(each, ids, before, hidden) for each, hidden in zip((dense, model), read, strict=True)]
        return Features(ids, tuple(read), output_of(dense, ids, layer, read[0]))


def pair_of_models(dtype: torch.dtype = torch.float32, rank: int = 24) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model, compressed and dense."""
    model, dense = (tiny.model("llama").to(dtype) for _ in range(2))
    replace_modules(model, replaced(dense, rank))
    return model, dense


FACTORS = {
    f"{BLOCK}.{name}.weight"
    for name in (
        *("self_attn.q_proj.up", "self_attn.o_proj.down.rest", "self_attn.o_proj.up"),
        *("mlp.gate_proj.down", "mlp.gate_proj.up", "mlp.up_proj.up", "mlp.down_proj.down", "mlp.down_proj.rest"),
    )
}


def test_the_factors_of_a_block_are_those_that_it_stores() -> None:
    model, dense = pair_of_models()
    assert set(factor_weights(model, 1)) == FACTORS
    assert set(factor_weights(model, 0)) == {
        f"model.layers.0.self_attn.q_proj.{part}.weight" for part in ("down", "up")
    }
    assert factor_weights(dense, 1) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_alone_are_trained_and_the_block_comes_closer(dtype: torch.dtype) -> None:
    """The factor that q borrows from the block before stays too: that block is finished."""
    model, dense = pair_of_models(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = distil_block(model, 1, features(model, dense), preset(), seed=0)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == FACTORS
    assert {tensor.dtype for tensor in after.values() if tensor.is_floating_point()} == {dtype}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert set(block.weights) == FACTORS
    assert all(torch.equal(after[name], weight) for name, weight in block.weights.items())
    assert [step for step, _ in block.loss] == list(range(1, 49)), "64 windows, 8 a step, 6 times"
    assert [step for step, _ in block.validation] == [0, 10, 20, 30, 40, 48]
    validation = dict(block.validation)
    assert validation[block.best] == min(validation.values())
    assert validation[block.best] < 0.95 * validation[0]


def leaving(model: PreTrainedModel, ids: torch.Tensor, first: PreTrainedModel | None = None) -> NDArray[np.float64]:
    """What leaves block 1 in a whole pass, seen by a hook; with the first block of another model, if one is given."""
    caught: list[torch.Tensor] = []
    blocks: Any = model.get_submodule("model.layers")
    other: Any = first.get_submodule("model.layers") if first is not None else blocks
    own, blocks[0] = blocks[0], other[0]
    handle = blocks[1].register_forward_hook(lambda *a: caught.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    blocks[0] = own
    found: NDArray[np.float64] = caught[0].numpy()
    return found


@pytest.mark.parametrize("inputs", [["dense", "compressed"], ["dense"], ["compressed"]])
def test_the_loss_of_a_block_is_that_of_whole_passes(inputs: list[str]) -> None:
    """The compressed block on what the dense one reads, and on what the compressed one before it puts out."""
    model, dense = pair_of_models(torch.float64)
    all_of_both = features(model, dense)
    entering = tuple(all_of_both.entering[["dense", "compressed"].index(name)] for name in inputs)
    ids, right = all_of_both.ids[-4:], leaving(dense, all_of_both.ids[-4:])
    # q of the second block borrows the factor of the first, wherever that stands
    outputs = {"dense": leaving(model, ids, first=dense), "compressed": leaving(model, ids)}
    expected = sum(slow_loss(outputs[name], right) for name in inputs)
    block = distil_block(model, 1, Features(all_of_both.ids, entering, all_of_both.leaving), preset(), seed=0)
    assert block.validation[0] == (0, pytest.approx(expected, rel=1e-9))


def test_the_first_step_goes_against_the_finite_differences_of_the_loss() -> None:
    """AdamW's first step moves each number by the rate, against its derivative's sign."""
    model, dense = pair_of_models(torch.float64)
    both, rate = features(model, dense, windows=12), 1e-6
    right = leaving(dense, both.ids[:-4])

    def loss() -> float:
        return slow_loss(leaving(model, both.ids[:-4], first=dense), right) + slow_loss(
            leaving(model, both.ids[:-4]), right
        )

    picked: dict[tuple[str, int], float] = {}
    for name in sorted(FACTORS):
        flat = model.get_parameter(name).data.view(-1)
        for index in (0, len(flat) // 2):
            value, step = float(flat[index]), 1e-5
            flat[index] = value + step
            above = loss()
            flat[index] = value - step
            picked[name, index] = (above - loss()) / (2 * step)
            flat[index] = value
    before = {name: model.get_parameter(name).detach().clone().view(-1) for name in FACTORS}
    once = preset(learning_rate=rate, weight_decay=0.0, epochs=1, batch_size=64)
    block = distil_block(model, 1, both, once, seed=0)
    assert block.loss == [(1, pytest.approx(loss_before(model, before, loss), rel=1e-9))]
    assert block.best == 1
    for (name, index), slope in picked.items():
        moved = float(model.get_parameter(name).detach().view(-1)[index] - before[name][index])
        assert moved == pytest.approx(-rate * math.copysign(1, slope), rel=1e-2), (name, index)


def loss_before(model: PreTrainedModel, before: dict[str, torch.Tensor], loss: Any) -> float:
    """The loss with other factors, which are put back."""
    now = {name: model.get_parameter(name).detach().clone() for name in before}
    for name, flat in before.items():
        model.get_parameter(name).data.view(-1).copy_(flat)
    value = float(loss())
    for name, weight in now.items():
        model.get_parameter(name).data.copy_(weight)
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_factors_lose_nothing_and_stay(dtype: torch.dtype) -> None:
    dense, model = tiny.model("llama").to(dtype), tiny.model("llama").to(dtype)
    names = [name for name, _ in dense.named_modules() if name.startswith("model.layers") and name.endswith("_proj")]
    whole = {name: halves(dense.get_submodule(name).get_parameter("weight"), tiny.HIDDEN) for name in names}
    replace_modules(model, {name: LowRankFactors(down, up) for name, (up, down) in whole.items()})
    before = {name: weight.detach().clone() for name, weight in factor_weights(model, 1).items()}
    block = distil_block(model, 1, features(model, dense), preset(), seed=0)
    assert len(before) == 14
    assert block.validation[0][1] == pytest.approx(0, abs=1e-5 if dtype == torch.float32 else 1e-12)
    assert block.validation[-1][1] > block.validation[0][1], "steps along rounding errors made it worse"
    assert block.best == 0
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


def test_a_training_that_helps_nothing_leaves_the_factors_as_they_were() -> None:
    model, dense = pair_of_models()
    before = {name: weight.detach().clone() for name, weight in factor_weights(model, 1).items()}
    block = distil_block(model, 1, features(model, dense), preset(learning_rate=3.0), seed=0)
    assert block.best == 0
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


def test_the_same_seed_gives_the_same_factors_and_another_does_not() -> None:
    def learnt(seed: int) -> torch.Tensor:
        model, dense = pair_of_models()
        weights = distil_block(model, 1, features(model, dense), preset(epochs=1), seed).weights
        return weights[f"{BLOCK}.mlp.gate_proj.up.weight"]

    assert torch.equal(learnt(0), learnt(0))
    assert not torch.equal(learnt(0), learnt(1))


def test_what_cannot_be_trained_is_said() -> None:
    model, dense = pair_of_models()
    with pytest.raises(RankwiseError, match=r"`validation_windows: 4` of this tuning leaves none of the 4 calibration"):
        distil_block(model, 1, features(model, dense, windows=4), preset(), seed=0)
    with pytest.raises(RankwiseError, match=r"^model\.layers\.1: the .*loss.* is not finite; lower `learning_rate`"):
        distil_block(model, 1, features(model, dense), preset(learning_rate=1e30), seed=0)

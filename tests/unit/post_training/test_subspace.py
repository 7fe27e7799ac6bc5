"""The trained layer of Equation 9 and its merge, against the equation written out with plain matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank.bases.principal import principal_basis
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import recipe_of
from lowrank.model.modeling_rankwise import LowRankLinear
from lowrank.post_training.subspace import (
    ScaledSubspaceLinear,
    Strategy,
    SubspaceVectors,
    attach_subspaces,
    choose_indices,
    merge_subspaces,
    pack_vectors,
    unpack_vectors,
)
from tests import tiny
from tests.unit.model import factor_samples
from tests.unit.post_training import test_lora
from tests.unit.post_training.post_training_samples import LAYERS, tiny_model

STRATEGIES: tuple[Strategy, ...] = ("random", "top", "bottom")


def a_layer(n: int, m: int, rank: int, bias: bool, dtype: torch.dtype = torch.float64) -> LowRankLinear:
    layer = LowRankLinear(n, m, rank, bias).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def trained(layer: LowRankLinear, count: int, strategy: Strategy, seed: int) -> ScaledSubspaceLinear:
    """A wrapper whose vectors are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    wrapper = ScaledSubspaceLinear(layer, choose_indices(layer.rank, count, strategy, generator))
    for vector in (wrapper.inner, wrapper.outer):
        nn.init.normal_(vector)
    return wrapper


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 9), rank=st.integers(1, 7), count=st.integers(1, 9), bias=st.booleans(),
    strategy=st.sampled_from(STRATEGIES), seed=st.integers(0, 99),
)  # fmt: skip
def test_forward_is_equation_9_and_the_merge_is_exact(
    n: int, m: int, rank: int, count: int, bias: bool, strategy: Strategy, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = a_layer(n, m, rank, bias)
    wrapper = trained(layer, count, strategy, seed)
    assert len(wrapper.inner) == min(count, rank)
    x = torch.randn(3, 5, n, dtype=torch.float64)
    a, b, chosen = layer.down.weight, layer.up.weight, wrapper.indices
    expected = x @ (b @ a).T + (layer.up.bias if bias else 0)
    middle = torch.diag(wrapper.outer) @ b[:, chosen] @ torch.diag(wrapper.inner) @ a[chosen]
    expected = expected + x @ middle.T
    unmerged = wrapper(x)
    # Rounding is measured against the size of the sums' terms, which may cancel.
    terms = x.abs() @ a.abs().T @ b.abs().T + x.abs() @ middle.abs().T + 1
    assert bool(((unmerged - expected).abs() <= 1e-13 * terms).all())

    model = nn.Sequential(layer)
    merge_subspaces(model, {"0": SubspaceVectors(chosen, wrapper.inner.detach(), wrapper.outer.detach())})
    assert bool(((model(x) - unmerged).abs() <= 1e-13 * terms).all())
    assert layer.rank == rank
    assert layer.up.weight.shape == (m, rank)
    assert layer.down.weight.shape == (rank, n)


def test_training_starts_at_the_compressed_model_and_both_vectors_can_move() -> None:
    torch.manual_seed(0)
    layer = a_layer(6, 5, 4, bias=True, dtype=torch.float32)
    wrapper = ScaledSubspaceLinear(layer, torch.tensor([1, 3]))
    x = torch.randn(2, 6)
    assert torch.equal(wrapper(x), layer(x))
    assert wrapper.inner.tolist() == pytest.approx([0.1, 0.1])
    assert not wrapper.outer.any()
    wrapper(x).square().sum().backward()
    assert wrapper.outer.grad is not None
    assert wrapper.outer.grad.abs().min() > 0
    assert layer.up.weight.grad is None
    assert layer.down.weight.grad is None


def test_vectors_are_float32_on_a_bfloat16_layer() -> None:
    layer = a_layer(6, 5, 4, bias=False, dtype=torch.bfloat16)
    wrapper = ScaledSubspaceLinear(layer, torch.tensor([0, 2]))
    assert wrapper.inner.dtype == wrapper.outer.dtype == torch.float32
    assert wrapper(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_choice_of_indices() -> None:
    generator = torch.Generator().manual_seed(3)
    assert choose_indices(6, 2, "top", generator).tolist() == [0, 1]
    assert choose_indices(6, 2, "bottom", generator).tolist() == [4, 5]
    assert choose_indices(3, 256, "bottom", generator).tolist() == [0, 1, 2]
    first = choose_indices(1000, 10, "random", torch.Generator().manual_seed(3))
    assert first.tolist() == sorted(set(first.tolist()))
    assert len(first) == 10
    assert torch.equal(first, choose_indices(1000, 10, "random", torch.Generator().manual_seed(3)))
    assert not torch.equal(first, choose_indices(1000, 10, "random", torch.Generator().manual_seed(4)))


def test_top_and_bottom_are_the_directions_of_largest_and_smallest_variance() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 20, generator=g, dtype=torch.double) @ torch.randn(20, 300, generator=g, dtype=torch.double)
    w = torch.randn(16, 20, generator=g, dtype=torch.double)
    layer = principal_basis(w, None, torch.cov(x), x.mean(1), "layer").factors(8).as_module(torch.float64)
    variances = layer.down(x.T).var(dim=0)
    order = variances.argsort(descending=True)
    assert set(choose_indices(8, 3, "top", g).tolist()) == set(order[:3].tolist())
    assert set(choose_indices(8, 3, "bottom", g).tolist()) == set(order[-3:].tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dense_layers_and_v_are_left_alone(strategy: Strategy) -> None:
    """In the sample k, v and gate are dense; the other layers have rank 6."""
    model = tiny_model()
    compressed = {f"model.layers.{layer}.{path}" for layer in range(2) for path in LAYERS}
    assert set(recipe_of(model)) == compressed
    wrapped = attach_subspaces(model, 256, strategy, seed=0)
    assert set(wrapped) == compressed
    assert all(wrapper.indices.tolist() == list(range(6)) for wrapper in wrapped.values())  # r' > rank: all of them
    trainable = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == compressed
    for path in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
        assert type(model.get_submodule(f"model.layers.1.{path}")) is nn.Linear


@pytest.mark.parametrize("method", ["skipcat", "basis-sharing"])
def test_layers_that_share_a_factor_learn_vectors_of_their_own(method: str) -> None:
    model, _ = factor_samples.compressed(method, "llama-gqa", 30, model=tiny.model("llama-gqa").double())
    plain = copy.deepcopy(model)
    wrapped = attach_subspaces(model, 4, "random", seed=0)
    torch.manual_seed(1)
    for wrapper in wrapped.values():
        for vector in (wrapper.inner, wrapper.outer):
            nn.init.normal_(vector, std=0.3)
    merge_subspaces(plain, {n: SubspaceVectors(w.indices, w.inner, w.outer) for n, w in wrapped.items()})
    ids = factor_samples.TOKENS[:2]
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-9)
    if method == "skipcat":
        with pytest.raises(RankwiseError, match="no order of variance"):
            attach_subspaces(plain, 4, "top", seed=0)


def test_the_random_subspaces_of_layers_differ_and_follow_the_seed() -> None:
    one, same, other = (attach_subspaces(tiny_model(), 3, "random", seed) for seed in (1, 1, 2))
    chosen = [[tuple(wrapper.indices.tolist()) for wrapper in model.values()] for model in (one, same, other)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) > 1


def test_attach_freezes_all_but_the_vectors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), a_layer(4, 4, 3, True, torch.float32), a_layer(4, 6, 3, True, torch.float32))
    wrapped = attach_subspaces(model, 2, "random", seed=0)
    assert list(wrapped) == ["1", "2"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "1.inner", "1.outer", "2.inner", "2.outer",
    }  # fmt: skip


def test_a_dense_model_is_an_error() -> None:
    with pytest.raises(RankwiseError, match=r"no low-rank layer.*tuning: none"):
        attach_subspaces(nn.Sequential(nn.Linear(2, 2)), 2, "top", seed=0)


def test_vectors_survive_packing() -> None:
    vectors = {name: SubspaceVectors(torch.arange(2), torch.randn(2), torch.randn(5)) for name in ("model.a.b", "c")}
    again = unpack_vectors(pack_vectors(vectors))
    assert again.keys() == vectors.keys()
    assert all(torch.equal(vars(again[n])[f], t) for n, v in vectors.items() for f, t in vars(v).items())


@pytest.mark.parametrize("kind", [*tiny.FEW, *tiny.MIXTURES])
def test_logits_of_every_family_with_trained_vectors_are_those_after_the_merge(kind: str) -> None:
    model, merged = test_lora.a_model(kind), test_lora.a_model(kind)
    before = model(test_lora.IDS).logits
    wrapped = attach_subspaces(model, 3, "random", seed=0)
    for layer in wrapped.values():
        layer.outer.data += 0.5
    trained = model(test_lora.IDS).logits
    assert (trained - before).abs().max() > 0.01
    vectors = {name: SubspaceVectors(w.indices, w.inner.detach(), w.outer.detach()) for name, w in wrapped.items()}
    merge_subspaces(merged, vectors)
    torch.testing.assert_close(merged(test_lora.IDS).logits, trained, rtol=0, atol=1e-4)

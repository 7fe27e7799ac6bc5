"""The trained layer of Equation 9 and its merge, against the equation written out with plain matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank.errors import RankwiseError
from lowrank.modeling.modeling_rankwise import LowRankLinear
from lowrank.post_training.subspace import (
    ScaledSubspaceLinear,
    SubspaceVectors,
    attach_subspaces,
    choose_indices,
    merge_subspaces,
    pack_vectors,
    unpack_vectors,
)


def a_layer(n: int, m: int, rank: int, bias: bool, dtype: torch.dtype = torch.float64) -> LowRankLinear:
    layer = LowRankLinear(n, m, rank, bias).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def trained(layer: LowRankLinear, count: int, seed: int) -> ScaledSubspaceLinear:
    """A wrapper whose vectors are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    wrapper = ScaledSubspaceLinear(layer, choose_indices(layer.rank, count, "random", generator))
    for vector in (wrapper.inner, wrapper.outer):
        nn.init.normal_(vector)
    return wrapper


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 9), rank=st.integers(1, 7), count=st.integers(1, 9), bias=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_forward_is_equation_9_and_the_merge_is_exact(
    n: int, m: int, rank: int, count: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = a_layer(n, m, rank, bias)
    wrapper = trained(layer, count, seed)
    x = torch.randn(3, 5, n, dtype=torch.float64)
    a, b, chosen = layer.down.weight, layer.up.weight, wrapper.indices
    expected = x @ (b @ a).T + (layer.up.bias if bias else 0)
    middle = torch.diag(wrapper.outer) @ b[:, chosen] @ torch.diag(wrapper.inner) @ a[chosen]
    expected = expected + x @ middle.T
    unmerged = wrapper(x)
    torch.testing.assert_close(unmerged, expected, rtol=1e-12, atol=1e-12)

    model = nn.Sequential(layer)
    merge_subspaces(model, {"0": SubspaceVectors(chosen, wrapper.inner.detach(), wrapper.outer.detach())})
    torch.testing.assert_close(model(x), unmerged, rtol=1e-12, atol=1e-12)
    assert layer.rank == rank
    assert layer.up.weight.shape == (m, rank)


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

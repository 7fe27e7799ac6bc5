"""Sliced layers: any rank is the pair of its basis, and a slice is a prefix of whole rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank.bases.principal import Bases, PrincipalBasis
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, load_tensors, save_tensors
from lowrank.model.checkpoint import replace_modules
from lowrank.ranks.budget import Budget
from lowrank.search.allocation import sliced_factors
from lowrank.search.sliced_model import SlicedLinear, SlicedModel
from tests import tiny
from tests.unit.model.factor_samples import TOKENS, bases, shape_of


def a_basis(m: int, n: int, k: int, mean: bool, seed: int) -> PrincipalBasis:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"directions": (m, k), "projection": (k, n), "eigenvalues": (min(m, n),)}
    if mean:
        sizes |= {"mean": (m,), "projected_mean": (k,)}
    drawn = {field: torch.randn(*size, generator=draw, dtype=torch.float64) for field, size in sizes.items()}
    means = {field: drawn[field].float() if mean else None for field in ("mean", "projected_mean")}  # as stored
    return PrincipalBasis(**(drawn | means))


def dense_layer(m: int, n: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(n, m, dtype=dtype).requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), share=st.floats(0, 1), mean=st.booleans(), seed=st.integers(0, 99))
def test_every_rank_is_the_pair_of_the_basis(m: int, n: int, share: float, mean: bool, seed: int) -> None:
    k = min(m, n)
    rank = 1 + int(share * (k - 1))
    basis = a_basis(m, n, k, mean, seed)
    layer = SlicedLinear(dense_layer(m, n), basis)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    layer.set_rank(rank)
    up, down = basis.directions.numpy()[:, :rank], basis.projection.numpy()[:rank]
    expected = x.numpy() @ down.T @ up.T
    if basis.mean is not None and basis.projected_mean is not None:
        expected = expected + basis.mean.numpy() - up @ basis.projected_mean.numpy()[:rank]
    scale = 1 + np.abs(expected).max()  # biases are summed in float32
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=0, atol=(1e-5 if mean else 1e-12) * scale)
    layer.set_rank(None)
    assert torch.equal(layer(x), layer.dense(x))


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("meta", torch.float32), ("meta", torch.bfloat16)]
)
def test_a_rank_is_a_contiguous_prefix_of_rows_of_the_layer_s_own_widths(device: str, dtype: torch.dtype) -> None:
    """On any device but a CPU, which "meta" stands for, in any precision."""
    layer = SlicedLinear(dense_layer(32, 48, dtype).to(device), a_basis(32, 48, 19, True, 0))
    for factor, width in ((layer.directions, 32), (layer.projection, 48)):
        assert factor.shape == (19, width)
        for rank in (1, 7, 19):
            part = factor[:rank]
            assert part.is_contiguous()
            assert part.stride() == (width, 1)
            assert part.storage_offset() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_slices_on_a_cpu_lie_by_columns_and_give_the_same(dtype: torch.dtype) -> None:
    basis = a_basis(32, 48, 19, True, 0)
    layer, exact = SlicedLinear(dense_layer(32, 48, dtype), basis), SlicedLinear(dense_layer(32, 48), basis)
    assert layer.directions.stride() == (1, 19)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for rank in (1, 7, 19):
        layer.set_rank(rank)
        exact.set_rank(rank)
        expected = exact(x.double())
        error = (layer(x).double() - expected).abs().max()
        assert float(error) < 8 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("kind", tuple(tiny.FEW))
def test_logits_are_those_of_the_compressed_model_in_float64(kind: str) -> None:
    budget, found = Budget.of(shape_of(kind)), bases(kind, "naive")
    ranks = {module.name: 8 + index % 3 for index, module in enumerate(budget.modules) if index % 4}
    sliced = SlicedModel(tiny.model(kind), budget, found)
    sliced.set_ranks(ranks)
    rebuilt = tiny.model(kind).double()
    replace_modules(rebuilt, sliced_factors(found, rebuilt, budget, {name: ranks.get(name) for name in sliced.layers}))
    expected = rebuilt(TOKENS).logits
    torch.testing.assert_close(sliced.model(TOKENS).logits.double(), expected, rtol=0, atol=2e-4)
    assert not torch.allclose(tiny.model(kind)(TOKENS).logits.double(), expected, atol=1e-2)


def test_a_basis_of_another_shape_is_refused_by_name() -> None:
    basis = a_basis(8, 6, 3, False, 0)
    for wrong in (
        replace(basis, directions=basis.directions.T),
        replace(basis, projection=basis.projection.T),
        replace(basis, projection=basis.projection[:2]),
    ):
        with pytest.raises(RankwiseError, match=r"layers\.3, up: its weight is 8 x 6, and the directions .* Delete"):
            SlicedLinear(dense_layer(8, 6), wrong, "layers.3, up")


def test_a_file_with_factors_the_other_way_round_or_cut_off_is_refused(tmp_path: Path) -> None:
    kind, budget = "llama", Budget.of(shape_of("llama"))
    for layer, file in enumerate(bases(kind, "naive").files):
        (tmp_path / layer_name(layer)).write_bytes(file.read_bytes())
    stored = load_tensors(tmp_path / layer_name(0))
    block = {name: tensor.T.contiguous() if "directions" in name else tensor for name, tensor in stored.items()}
    save_tensors(tmp_path / layer_name(0), block)
    said = r"layer_000\.safetensors: its basis of 'q' has directions of 31 numbers and 64 .* weight is 64 x 64"
    with pytest.raises(RankwiseError, match=said):
        SlicedModel(tiny.model(kind), budget, Bases(tmp_path, tiny.LAYERS))
    path = tmp_path / layer_name(0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RankwiseError, match=path.name):
        SlicedModel(tiny.model(kind), budget, Bases(tmp_path, tiny.LAYERS))


def test_ranks_beyond_the_basis_are_refused() -> None:
    layer = SlicedLinear(dense_layer(8, 6), a_basis(8, 6, 3, False, 0))
    for rank in (0, 4):
        with pytest.raises(RankwiseError, match=f"rank {rank} is not within 1 to 3"):
            layer.set_rank(rank)

"""Principal bases: optimal, nested, and equal to the textbook computation in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.bases import PrincipalBasis, fix_signs, principal_basis
from lowrank.budget import largest_rank
from lowrank.errors import RankwiseError


def random_layer(m: int, n: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias, and inputs (n x tokens) with a mean and correlated features."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.double)
    x = mix @ torch.randn(n, tokens, generator=g, dtype=torch.double) + torch.randn(
        n, 1, generator=g, dtype=torch.double
    )
    w = torch.randn(m, n, generator=g, dtype=torch.double)
    return w, torch.randn(m, generator=g, dtype=torch.double), x


def basis_of(w: torch.Tensor, b: torch.Tensor | None, x: torch.Tensor, centred: bool = True) -> PrincipalBasis:
    mean = x.mean(1) if centred else torch.zeros(x.shape[0], dtype=torch.double)
    covariance = torch.cov(x, correction=0) if centred else x @ x.T / x.shape[1]
    return principal_basis(w, b, covariance, mean, "layer")


def error(basis: PrincipalBasis, rank: int, w: torch.Tensor, b: torch.Tensor | None, x: torch.Tensor) -> float:
    pair = basis.factors(rank)
    assert pair.bias is not None
    offset = 0 if b is None else b[:, None]
    return float(((w @ x + offset) - (pair.up @ (pair.down @ x) + pair.bias[:, None])).pow(2).sum())


@settings(max_examples=25, deadline=None)
@given(m=st.integers(4, 24), n=st.integers(4, 24), seed=st.integers(0, 999), bias=st.booleans())
def test_centred_bases_equal_pca_of_the_outputs(m: int, n: int, seed: int, bias: bool) -> None:
    w, b, x = random_layer(m, n, 60, seed)
    basis = basis_of(w, b if bias else None, x)
    y = (w @ x + (b[:, None] if bias else 0)).numpy()
    centred = y - y.mean(1, keepdims=True)
    left, sigma, _ = np.linalg.svd(centred, full_matrices=False)
    for rank in range(1, largest_rank(m, n) + 1):
        expected = y.mean(1, keepdims=True) + left[:, :rank] @ (left[:, :rank].T @ centred)
        pair = basis.factors(rank)
        got = (pair.up @ (pair.down @ x) + pair.bias[:, None]).numpy()
        assert np.allclose(got, expected, atol=1e-6 * np.abs(y).max())
    assert np.allclose(basis.eigenvalues.numpy()[:m], (sigma**2 / x.shape[1])[: min(m, n)], rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(m=st.integers(6, 20), n=st.integers(6, 20), seed=st.integers(0, 999))
def test_uncentred_bases_equal_cholesky_whitened_svd(m: int, n: int, seed: int) -> None:
    w, _, x = random_layer(m, n, 80, seed)
    basis = basis_of(w, None, x, centred=False)
    s = torch.linalg.cholesky(x @ x.T)
    u, sigma, vh = torch.linalg.svd(w @ s, full_matrices=False)
    for rank in (1, largest_rank(m, n)):
        whitened = (u[:, :rank] * sigma[:rank]) @ torch.linalg.solve_triangular(s, vh[:rank], upper=False, left=False)
        pair = basis.factors(rank)
        assert torch.allclose(pair.up @ pair.down, whitened, atol=1e-7 * float(w.abs().max()))
        assert pair.bias is not None
        assert float(pair.bias.abs().max()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(m=st.integers(6, 20), n=st.integers(6, 20), seed=st.integers(0, 999))
def test_centring_with_the_bias_is_never_worse_and_without_it_is(m: int, n: int, seed: int) -> None:
    w, _, x = random_layer(m, n, 80, seed)
    x = x + 3
    rank = largest_rank(m, n)
    centred, uncentred = basis_of(w, None, x), basis_of(w, None, x, centred=False)
    assert error(centred, rank, w, None, x) <= error(uncentred, rank, w, None, x) * (1 + 1e-9)
    pair = centred.factors(rank)
    dropped = float((w @ x - pair.up @ (pair.down @ x)).pow(2).sum())
    assert dropped >= error(centred, rank, w, None, x)


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30)])
def test_rank_deficient_inputs_still_give_an_orthonormal_basis(m: int, n: int) -> None:
    w, b, x = random_layer(m, n, 3, 5)  # three tokens: the covariance has rank two
    basis = basis_of(w, b, x)
    k = basis.directions.shape[1]
    assert torch.allclose(basis.directions.T @ basis.directions, torch.eye(k, dtype=torch.double), atol=1e-9)
    assert error(basis, 2, w, b, x) < 1e-12 * float((w @ x).pow(2).sum())


def test_constant_features_need_no_rank_at_all() -> None:
    w, b, x = random_layer(10, 10, 1, 6)
    basis = principal_basis(w, b, torch.zeros(10, 10, dtype=torch.double), x[:, 0], "layer")
    assert error(basis, 1, w, b, x) < 1e-20


def test_signs_do_not_depend_on_the_solver() -> None:
    vectors = torch.linalg.qr(torch.randn(6, 4, dtype=torch.double))[0]
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.double)
    assert torch.equal(fix_signs(vectors), fix_signs(vectors * flips))


def test_a_rank_beyond_the_stored_one_is_refused() -> None:
    w, b, x = random_layer(8, 8, 20, 7)
    with pytest.raises(RankwiseError, match="rank 4 is not within 1 to 3"):
        basis_of(w, b, x).factors(4)


def test_a_damaged_covariance_names_the_layer() -> None:
    w, b, _ = random_layer(8, 8, 20, 8)
    with pytest.raises(RankwiseError, match=r"layers\.3, gate"):
        principal_basis(w, b, torch.full((8, 8), float("nan")), torch.zeros(8), "layers.3, gate")

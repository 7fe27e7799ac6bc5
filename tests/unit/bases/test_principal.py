"""Principal bases: optimal, nested, and equal to the textbook computation in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank.bases import principal as bases
from lowrank.bases.block import bases_of_block
from lowrank.bases.fisher import fisher_basis
from lowrank.bases.principal import (
    PrincipalBasis,
    fix_signs,
    left_singular_vectors,
    load_basis,
    principal_basis,
)
from lowrank.bases.weighted_svd import weigh_columns, weigh_columns_randomised
from lowrank.bases.whitening import cholesky_factor
from lowrank.compression.neurons import Neurons
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import largest_rank
from tests.unit.calibration.test_moments import accumulate, direct_pooled, drifting, pooled


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


sizes = {"m": st.integers(6, 24), "n": st.integers(6, 24), "seed": st.integers(0, 999)}


@settings(max_examples=25, deadline=None)
@given(**sizes, bias=st.booleans())
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
        assert np.allclose(got, expected, atol=1e-9 * np.abs(y).max())
    assert np.allclose(basis.eigenvalues.numpy()[:m], (sigma**2 / x.shape[1])[: min(m, n)], rtol=1e-6, atol=1e-9)


def affine_rivals(y: np.ndarray, directions: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Linear parts (m x m, of the same rank) of affine maps of the outputs: random, regressions, and near the basis."""
    m, rank = directions.shape
    rivals = []
    for _ in range(5):
        left, right = rng.normal(size=(m, rank)), rng.normal(size=(rank, m))
        rivals.append(left @ right / m)
        coded = right @ y  # the best decoder of random codes
        rivals.append(y @ coded.T @ np.linalg.pinv(coded @ coded.T) @ right)
        random_subspace = np.linalg.qr(left)[0]
        rivals.append(random_subspace @ random_subspace.T)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(5):
            turned = np.linalg.qr(directions + size * rng.normal(size=directions.shape))[0]
            rivals.append(turned @ turned.T)
            rivals.append(directions @ directions.T @ (np.eye(m) + size * rng.normal(size=(m, m))))
    return rivals


@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_no_other_affine_map_of_the_rank_is_closer_to_the_outputs(m: int, n: int, seed: int) -> None:
    w, b, x = random_layer(m, n, 60, seed)
    basis = basis_of(w, b, x)
    y = (w @ x + b[:, None]).numpy()
    centred = y - y.mean(1, keepdims=True)  # every rival gets the offset that is best for it
    for rank in {1, largest_rank(m, n)}:
        best = error(basis, rank, w, b, x)
        assert best == pytest.approx(60 * float(basis.eigenvalues[rank:].sum()), rel=1e-9)
        for rival in affine_rivals(centred, basis.directions[:, :rank].numpy(), np.random.default_rng(seed)):
            assert ((centred - rival @ centred) ** 2).sum() > best * (1 - 1e-12)


@settings(max_examples=15, deadline=None)
@given(m=st.integers(4, 20), n=st.integers(4, 20), seed=st.integers(0, 999), groups=st.integers(1, 7))
def test_pooled_bases_equal_eigh_of_the_directly_computed_covariance(m: int, n: int, seed: int, groups: int) -> None:
    x = drifting(7, 12, n, seed)
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(m, n)), rng.normal(size=m)
    values, vectors = np.linalg.eigh(direct_pooled(x @ w.T + b, groups))
    covariance, mean = accumulate(x, 3).estimate(pooled(groups))
    basis = principal_basis(torch.tensor(w), torch.tensor(b), covariance, mean, "layer")
    assert np.allclose(basis.mean, (x @ w.T + b).mean(axis=(0, 1)), rtol=1e-10)
    assert np.allclose(basis.eigenvalues, values[::-1][: min(m, n)], atol=1e-10 * values.max())
    kept = basis.directions.numpy()
    for rank in range(1, kept.shape[1] + 1):
        gap = (values[-rank] - values[-rank - 1]) / values.max()
        expected = vectors[:, -rank:] @ vectors[:, -rank:].T
        assert np.allclose(kept[:, :rank] @ kept[:, :rank].T, expected, atol=1e-12 / gap)


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_uncentred_bases_equal_cholesky_whitened_svd(m: int, n: int, seed: int) -> None:
    w, b, x = random_layer(m, n, 80, seed)
    assume(float(torch.linalg.cond(x)) < 1e4)  # the formula inverts a root of x x'
    basis = basis_of(w, b, x, centred=False)
    s = torch.linalg.cholesky(x @ x.T)
    u, sigma, vh = torch.linalg.svd(w @ s, full_matrices=False)
    for rank in range(1, largest_rank(m, n) + 1):
        whitened = (u[:, :rank] * sigma[:rank]) @ torch.linalg.solve_triangular(s, vh[:rank], upper=False, left=False)
        pair = basis.factors(rank)
        assert torch.allclose(pair.up @ pair.down, whitened, rtol=0, atol=1e-10)
        assert torch.equal(pair.bias, b)  # the layer's own bias, and nothing for a mean


@settings(max_examples=40, deadline=None)
@given(**sizes, shift=st.floats(0, 10))
def test_centring_with_the_bias_is_never_worse_and_without_it_is_the_worst(
    m: int, n: int, seed: int, shift: float
) -> None:
    w, _, x = random_layer(m, n, 80, seed)
    x = x + shift
    centred, uncentred = basis_of(w, None, x), basis_of(w, None, x, centred=False)
    for rank in range(1, largest_rank(m, n) + 1):
        with_bias, without_centring = error(centred, rank, w, None, x), error(uncentred, rank, w, None, x)
        pair = centred.factors(rank)
        without_bias = float((w @ x - pair.up @ (pair.down @ x)).pow(2).sum())
        assert with_bias <= without_centring * (1 + 1e-9)
        assert without_centring <= without_bias * (1 + 1e-9)


def test_the_three_differ_where_the_mean_is_large() -> None:
    w, _, x = random_layer(12, 12, 80, 0)
    x = x + 3
    rank = 4
    centred, uncentred = basis_of(w, None, x), basis_of(w, None, x, centred=False)
    pair = centred.factors(rank)
    without_bias = float((w @ x - pair.up @ (pair.down @ x)).pow(2).sum())
    assert 1.05 * error(centred, rank, w, None, x) < error(uncentred, rank, w, None, x) < without_bias / 1.05


@pytest.mark.parametrize("rank_of_inputs", [8, 3])
def test_wide_outputs_give_the_eigenvectors_of_the_large_covariance(rank_of_inputs: int) -> None:
    """m x m is never formed for m > n; the subspaces are those of the m x m covariance all the same."""
    w, _, x = random_layer(40, 8, 60, 11)
    x[rank_of_inputs:] = 0
    covariance = torch.cov(x)
    values, vectors = np.linalg.eigh((w @ covariance @ w.T).numpy())
    u, eigenvalues = left_singular_vectors(w @ torch.linalg.svd(covariance)[0] * torch.linalg.svd(covariance)[1].sqrt())
    assert np.allclose(eigenvalues, values[::-1][:8], atol=1e-12 * values.max())
    basis = principal_basis(w, None, covariance, x.mean(1), "layer")
    for rank in range(1, min(rank_of_inputs, basis.directions.shape[1]) + 1):
        expected = vectors[:, -rank:] @ vectors[:, -rank:].T
        for found in (u[:, :rank], basis.directions[:, :rank]):
            assert np.allclose(found @ found.T, expected, atol=1e-12)


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


def test_a_solver_that_fails_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("did not converge")

    w, b, x = random_layer(8, 8, 20, 9)
    monkeypatch.setattr(bases, "_narrow", fails)
    with pytest.raises(RankwiseError, match="layer: the eigendecomposition of its output covariance failed: did not"):
        basis_of(w, b, x)


EYE = torch.eye(8, dtype=torch.double)
DECOMPOSE: dict[str, Callable[[], Any]] = {
    "principal": lambda: principal_basis(EYE, None, EYE, None, "layer"),
    "fisher": lambda: fisher_basis(EYE, None, EYE, None, EYE, 0.1, "layer"),
    "columns": lambda: weigh_columns(EYE, EYE[0] + 1, "layer"),
    "columns, randomised": lambda: weigh_columns_randomised(EYE, EYE[0] + 1, 2, 0, "layer"),
    "whitening": lambda: cholesky_factor(EYE[:, :1] @ EYE[:1], "layer"),  # a singular matrix
    "neurons": lambda: Neurons.of(EYE, None, EYE, None, None, 0.1, "layer").eliminate(),
}


@pytest.mark.parametrize("name", DECOMPOSE)
def test_a_device_that_is_full_is_no_solver_that_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage says which GPU is needed."""

    def fails(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for solver in ("eigh", "eigvalsh", "cholesky"):
        monkeypatch.setattr(torch.linalg, solver, fails)
    monkeypatch.setattr(torch, "svd_lowrank", fails)
    with pytest.raises(torch.OutOfMemoryError):
        DECOMPOSE[name]()


def test_an_estimate_that_cannot_be_made_names_the_block_and_the_input() -> None:
    moments = {"mlp": accumulate(np.ones((2, 3, 8)), 1)}
    linears = {"gate": ("mlp", torch.ones(8, 8), None)}
    with pytest.raises(RankwiseError, match=r"layers\.3, mlp: .* over 4 groups needs as many windows; there are 2"):
        bases_of_block(linears, moments, Covariance(estimator="pooled", groups=4), torch.device("cpu"), "layers.3")


@given(m=st.integers(6, 12), n=st.integers(6, 12), seed=st.integers(0, 99), rank=st.integers(1, 2))
def test_what_is_not_stored_is_multiplied_anew(m: int, n: int, seed: int, rank: int) -> None:
    """And files of earlier versions, which hold the product, are read as they are."""
    w, b, x = random_layer(m, n, 40, seed)
    basis = basis_of(w, b, x)
    stored = basis.tensors("up")
    assert "up.projection" not in stored
    found, before = load_basis(stored, "up", w.float()), basis.factors(rank)
    pair = found.factors(rank)
    for old, new in ((before.down, pair.down), (before.up, pair.up), (before.bias, pair.bias)):
        assert old is not None
        assert new is not None
        assert torch.allclose(new.double(), old, atol=1e-5 * float(old.abs().max()))
    earlier = stored | {"up.projection": basis.projection.float()}
    assert load_basis(earlier, "up", torch.full((m, n), torch.nan)).projection.equal(basis.projection.float())
    assert "up.projection" in load_basis(earlier, "up", w).tensors("up")


def test_a_fisher_basis_stores_what_weights_do_not_tell() -> None:
    w, b, x = random_layer(6, 9, 40, 1)
    stored = fisher_basis(w, b, torch.cov(x), x.mean(1), torch.eye(6).double(), 0.01, "layer").tensors("up")
    assert load_basis(stored, "up", torch.full((6, 9), torch.nan)).projection.equal(stored["up.projection"])

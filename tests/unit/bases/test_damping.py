"""Damping by each feature's own size: what it adds, that scaling changes nothing, and what it does where it must."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank.bases.damping import SMALLEST, damped_cholesky


def moment(n: int, samples: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.logspace(-2, 2, n, dtype=torch.float64)[:, None] * torch.randn(
        n, samples, generator=draw, dtype=torch.float64
    )
    return x @ x.T / samples


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 12), samples=st.integers(1, 30), seed=st.integers(0, 999), damping=st.sampled_from([1e-6, 0.1]))
def test_it_is_the_root_of_the_damped_moment(n: int, samples: int, seed: int, damping: float) -> None:
    c = moment(n, samples, seed)
    root = damped_cholesky(c, damping)
    sizes = c.diagonal().sqrt()
    assert torch.equal(root, root.tril())
    expected = (c + damping * torch.diag(c.diagonal())) / sizes / sizes[:, None]
    assert torch.allclose(root @ root.T / sizes / sizes[:, None], expected, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 12), samples=st.integers(1, 30), seed=st.integers(0, 999), size=st.floats(-6, 6))
def test_scaling_features_scales_its_rows_and_nothing_else(n: int, samples: int, seed: int, size: float) -> None:
    c, factors = moment(n, samples, seed), torch.ones(n, dtype=torch.double)
    factors[seed % n] = 10.0**size
    scaled = factors * c * factors[:, None]
    for each in (c, scaled):  # else the smallest counts as larger than it is
        assume(float(each.diagonal().min()) > 1.01 * SMALLEST**2 * float(each.diagonal().max()))
    one, other = damped_cholesky(c, 0.01), damped_cholesky(scaled, 0.01)
    assert torch.allclose(other / factors[:, None], one, rtol=1e-6, atol=1e-9 * float(one.abs().max()))


def test_a_feature_that_is_always_zero_counts_as_the_smallest() -> None:
    c = moment(6, 30, 0)
    c[3] = c[:, 3] = 0
    root = damped_cholesky(c, 0.01)
    assert float((root @ root.T)[3, 3]) == pytest.approx(0.01 * float(c.diagonal()[c.diagonal() > 0].min()))


@pytest.mark.parametrize("size", [1e-11, 1e-16, 1e-18])
def test_no_feature_is_so_small_that_only_rounding_is_left_of_it(size: float) -> None:
    """What is multiplied by the root and divided by it again keeps the row of the smallest feature."""
    factors = torch.ones(6, dtype=torch.double)
    factors[0] = size * 1e4  # the largest is 1e4 times the first
    c = factors * moment(6, 30, 0) * factors[:, None]
    root = damped_cholesky(c, 0.01)
    added = 0.01 * 1e-20 * float(c.diagonal().max())
    assert float((root @ root.T)[0, 0]) == pytest.approx(float(c[0, 0]) + added)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double))[0]
    weight = torch.ones(6, 3, dtype=torch.double)
    back = torch.linalg.solve_triangular(root, rotation @ (rotation.T @ (root @ weight)), upper=False)
    assert torch.allclose(back, weight, atol=1e-4)


def test_what_rounding_took_is_made_up_for() -> None:
    c = moment(6, 2, 0)
    sizes = c.diagonal().sqrt()
    lowest = torch.linalg.eigh(c / sizes / sizes[:, None])[1][:, :1]
    broken = c - 0.3 * sizes * (lowest @ lowest.T) * sizes[:, None]
    assert float(torch.linalg.eigvalsh(broken)[0]) < 0
    root = damped_cholesky(broken, 0.1)
    own = broken.diagonal().sqrt()
    added = (root @ root.T - broken) / own / own[:, None]
    below = float(torch.linalg.eigvalsh(broken / own / own[:, None])[0])
    assert torch.allclose(added, (0.1 - below) * torch.eye(6, dtype=torch.double), atol=1e-9)


@pytest.mark.parametrize("damage", [0.0, float("nan")])
def test_nothing_and_damage_are_errors(damage: float) -> None:
    with pytest.raises(RuntimeError, match="zero or not finite"):
        damped_cholesky(torch.full((4, 4), damage), 0.01)

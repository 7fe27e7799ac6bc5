"""Moments against numpy in float64, for any split into windows and groups."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.calibration.moments import MomentAccumulator, Moments
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError

NAIVE, UNCENTRED = Covariance(estimator="naive"), Covariance(estimator="uncentred")


def pooled(groups: int) -> Covariance:
    return Covariance(estimator="pooled", groups=groups)


def accumulate(data: np.ndarray, batch: int) -> Moments:
    """Moments of windows x length x n; products are formed in the precision of the data."""
    accumulator = MomentAccumulator(data.shape[2])
    for part in torch.tensor(data).split(batch):
        accumulator.update(part, "here")
    return accumulator.result()


def direct_pooled(data: np.ndarray, groups: int) -> np.ndarray:
    """The covariances of the groups, weighted by their degrees of freedom; `data` is windows x length x n."""
    parts = [part.reshape(-1, data.shape[2]) for part in np.array_split(data, groups)]
    freedom = [len(rows) - 1 for rows in parts]
    covariances = [np.cov(rows.T) if len(rows) > 1 else np.zeros((data.shape[2],) * 2) for rows in parts]
    return sum(weight * covariance for weight, covariance in zip(freedom, covariances, strict=True)) / sum(freedom)


def direct(data: np.ndarray, estimate: Covariance) -> tuple[np.ndarray, np.ndarray]:
    """An estimate and its mean, as defined."""
    flat = data.reshape(-1, data.shape[2])
    if estimate.estimator == "uncentred":
        return flat.T @ flat / len(flat), np.zeros(data.shape[2])
    if estimate.estimator == "naive":
        return np.cov(flat.T), flat.mean(axis=0)
    return direct_pooled(data, estimate.groups or 0), flat.mean(axis=0)


def drifting(windows: int, length: int, features: int, seed: int) -> np.ndarray:
    """Windows with means of their own, all far from zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(windows, length, features)) + 30 * rng.normal(size=(windows, 1, features)) + 100


cases = {
    "windows": st.integers(2, 9),
    "length": st.integers(2, 6),
    "batch": st.integers(1, 4),
    "seed": st.integers(0, 99),
    "data": st.data(),
}


@settings(max_examples=30, deadline=None)
@given(**cases)
def test_every_estimate_equals_its_definition(
    windows: int, length: int, batch: int, seed: int, data: st.DataObject
) -> None:
    x = drifting(windows, length, 5, seed)
    moments = accumulate(x, batch)
    for estimate in (NAIVE, UNCENTRED, pooled(data.draw(st.integers(1, windows)))):
        covariance, mean = moments.estimate(estimate)
        expected, expected_mean = direct(x, estimate)
        assert np.allclose(covariance, expected, atol=1e-12 * np.abs(expected).max()), estimate
        assert np.allclose(mean, expected_mean, atol=1e-12 * 200)
    assert np.allclose(moments.absolute_mean, np.abs(x).mean(axis=(0, 1)), rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(**cases, outputs=st.integers(2, 8))
def test_through_the_inputs_equals_on_the_outputs(
    windows: int, length: int, batch: int, seed: int, data: st.DataObject, outputs: int
) -> None:
    x = drifting(windows, length, 5, seed)
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(outputs, 5)), rng.normal(size=outputs)
    moments = accumulate(x, batch)
    for estimate in (NAIVE, pooled(data.draw(st.integers(1, windows)))):
        covariance, mean = moments.estimate(estimate)
        expected, expected_mean = direct(x @ w.T + b, estimate)
        assert np.allclose(w @ covariance.numpy() @ w.T, expected, atol=1e-12 * np.abs(expected).max()), estimate
        assert np.allclose(w @ mean.numpy() + b, expected_mean, rtol=1e-12, atol=1e-12 * 200)
    second, zero = moments.estimate(UNCENTRED)  # its outputs are those without the bias, which stays as it is
    expected, _ = direct(x @ w.T, UNCENTRED)
    assert np.allclose(w @ second.numpy() @ w.T, expected, atol=1e-12 * np.abs(expected).max())
    assert not zero.any()


def test_groups_of_equal_size_are_averaged_and_longer_ones_weigh_more() -> None:
    x = drifting(7, 4, 3, seed=0)
    even = [np.cov(part.reshape(-1, 3).T) for part in np.split(x[:6], 3)]
    assert np.allclose(accumulate(x[:6], 4).estimate(pooled(3))[0], np.mean(even, axis=0), rtol=1e-12)
    ragged = [np.cov(part.reshape(-1, 3).T) for part in (x[:3], x[3:5], x[5:])]  # 12, 8 and 8 tokens
    expected = (11 * ragged[0] + 7 * ragged[1] + 7 * ragged[2]) / 25
    assert np.allclose(accumulate(x, 4).estimate(pooled(3))[0], expected, rtol=1e-12)


def test_pooling_one_group_is_the_sample_covariance_and_more_groups_leave_out_what_is_between_them() -> None:
    x = np.random.default_rng(0).normal(size=(8, 4, 6)) + np.arange(8)[:, None, None]
    moments = accumulate(x, 3)
    naive, _ = moments.estimate(NAIVE)
    assert torch.allclose(naive, moments.estimate(pooled(1))[0])
    assert float(moments.estimate(pooled(4))[0].trace()) < 0.4 * float(naive.trace())


@pytest.mark.parametrize("offset", [1000, 30000])
def test_a_large_mean_costs_no_digits(offset: float) -> None:
    x = (np.random.default_rng(1).normal(size=(4, 50, 3)) + offset).astype(np.float32)
    covariance, _ = accumulate(x, 2).estimate(NAIVE)
    assert np.allclose(covariance, np.cov(x.reshape(-1, 3).astype(np.float64).T), atol=1e-6)


def test_windows_that_lie_far_apart_cost_no_digits() -> None:
    """In float32, and through a file: what is between windows is ten million times what is within them."""
    rng = np.random.default_rng(3)
    means = 3000 * rng.normal(size=(6, 1, 4))
    x = (rng.normal(size=(6, 40, 4)) + means).astype(np.float32)
    stored = Moments.from_tensors(accumulate(x, 2).tensors("mlp"), "mlp")
    covariance, _ = stored.estimate(pooled(6))
    assert np.allclose(covariance, direct_pooled(x.astype(np.float64), 6), atol=1e-5)
    assert float(torch.linalg.eigvalsh(covariance).min()) > 0.5


def test_storing_and_reading_back_keeps_everything() -> None:
    moments = accumulate(np.random.default_rng(2).normal(size=(3, 5, 4)), 2)
    again = Moments.from_tensors(moments.tensors("mlp"), "mlp")
    for name in ("window_means", "absolute_mean"):
        assert torch.equal(getattr(again, name), getattr(moments, name))
    assert torch.allclose(again.within.double(), moments.within, rtol=1e-6)
    assert again.tokens == moments.tokens == 15


def test_bfloat16_inputs_are_added_up_in_float32() -> None:
    x = torch.randn(4, 300, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    accumulator = MomentAccumulator(3)
    accumulator.update(x, "here")
    covariance, mean = accumulator.result().estimate(NAIVE)
    assert torch.allclose(covariance, torch.cov(x.double().flatten(0, 1).T), atol=1e-6)
    assert torch.allclose(mean, x.double().mean(dim=(0, 1)), atol=1e-12)


def test_values_that_are_not_finite_name_the_layer() -> None:
    accumulator = MomentAccumulator(3)
    with pytest.raises(RankwiseError, match=r"layers\.7\.mlp\.down_proj: inputs are not finite"):
        accumulator.update(torch.full((1, 2, 3), float("inf")), "layers.7.mlp.down_proj")


def test_more_groups_than_windows_are_refused() -> None:
    moments = accumulate(np.ones((2, 3, 2)), 1)
    with pytest.raises(RankwiseError, match="pooled over 3 groups needs as many windows; there are 2"):
        moments.estimate(pooled(3))

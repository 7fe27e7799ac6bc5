"""Moments against numpy in float64, for any split into windows and groups."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.moments import MomentAccumulator, Moments

POOLED = {"estimator": "pooled"}


def accumulate(data: np.ndarray, batch: int) -> Moments:
    accumulator = MomentAccumulator(data.shape[2])
    for part in torch.tensor(data, dtype=torch.float32).split(batch):
        accumulator.update(part, "here")
    return accumulator.result()


def direct_pooled(data: np.ndarray, groups: int) -> np.ndarray:
    """Each group's scatter around its own mean, added up, over its degrees of freedom."""
    scatter, freedom = np.zeros((data.shape[2],) * 2), 0
    for part in np.array_split(data, groups):
        rows = part.reshape(-1, data.shape[2])
        scatter += np.cov(rows.T, ddof=0) * len(rows)
        freedom += len(rows) - 1
    return scatter / freedom


@settings(max_examples=30, deadline=None)
@given(
    windows=st.integers(2, 9),
    length=st.integers(2, 6),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_every_estimate_equals_its_definition(
    windows: int, length: int, batch: int, seed: int, data: st.DataObject
) -> None:
    groups = data.draw(st.integers(1, windows))
    rng = np.random.default_rng(seed)
    # A mean far from zero and drifting between windows, in float32 values so that both sides see the same numbers.
    x = (rng.normal(size=(windows, length, 5)) + 30 * rng.normal(size=(windows, 1, 5)) + 100).astype(np.float32)
    x = x.astype(np.float64)
    moments = accumulate(x, batch)
    flat = x.reshape(-1, 5)
    scale = np.abs(np.cov(flat.T)).max()
    pooled, mean = moments.estimate(Covariance(estimator="pooled", groups=groups))
    assert np.allclose(pooled, direct_pooled(x, groups), atol=2e-5 * scale)
    assert np.allclose(mean, flat.mean(axis=0), rtol=1e-6)
    naive, _ = moments.estimate(Covariance(estimator="naive"))
    assert np.allclose(naive, np.cov(flat.T), atol=2e-5 * scale)
    second, zero = moments.estimate(Covariance(estimator="uncentred"))
    assert np.allclose(second, flat.T @ flat / len(flat), rtol=1e-5)
    assert not zero.any()


def test_pooling_one_group_is_the_sample_covariance_and_more_groups_leave_out_what_is_between_them() -> None:
    x = np.random.default_rng(0).normal(size=(8, 4, 6)) + np.arange(8)[:, None, None]
    moments = accumulate(x, 3)
    naive, _ = moments.estimate(Covariance(estimator="naive"))
    one, _ = moments.estimate(Covariance(estimator="pooled", groups=1))
    four, _ = moments.estimate(Covariance(estimator="pooled", groups=4))
    assert torch.allclose(naive, one)
    assert float(four.trace()) < 0.4 * float(naive.trace())


def test_a_large_mean_costs_no_digits() -> None:
    noise = np.random.default_rng(1).normal(size=(4, 50, 3))
    shifted = accumulate((noise + 1000).astype(np.float32).astype(np.float64), 2)
    covariance, _ = shifted.estimate(Covariance(estimator="naive"))
    assert np.allclose(covariance, np.cov(noise.reshape(-1, 3).T), atol=2e-3)


def test_storing_and_reading_back_keeps_everything() -> None:
    moments = accumulate(np.random.default_rng(2).normal(size=(3, 5, 4)), 2)
    again = Moments.from_tensors(moments.tensors("mlp"), "mlp")
    assert torch.equal(again.window_means, moments.window_means)
    assert torch.allclose(again.covariance.double(), moments.covariance, rtol=1e-6)
    assert again.tokens == moments.tokens == 15


def test_values_that_are_not_finite_name_the_layer() -> None:
    accumulator = MomentAccumulator(3)
    with pytest.raises(RankwiseError, match=r"layers\.7\.mlp\.down_proj: inputs are not finite"):
        accumulator.update(torch.full((1, 2, 3), float("inf")), "layers.7.mlp.down_proj")


def test_more_groups_than_windows_are_refused() -> None:
    moments = accumulate(np.ones((2, 3, 2)), 1)
    with pytest.raises(RankwiseError, match="pooled over 3 groups needs as many windows"):
        moments.estimate(Covariance(estimator="pooled", groups=3))

"""What two errors of the paper's released code do to a covariance, and that ours has neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from tests.unit.calibration.released_code import SEQUENCES_PER_GROUP, group_scatter, pooled_covariance
from tests.unit.calibration.test_moments import accumulate

SURVIVES = sum((1 - 1 / k) ** 2 for k in range(2, SEQUENCES_PER_GROUP + 1)) / (SEQUENCES_PER_GROUP - 1)
"""Share of the scatter between equally long sequences that the running update keeps: of the k-th's, (1 - 1/k)^2."""


def ours(sequences: np.ndarray, groups: int) -> np.ndarray:
    return accumulate(sequences, 5).estimate(Covariance(estimator="pooled", groups=groups))[0].numpy()


def test_ours_is_the_released_computation_without_its_error() -> None:
    x = np.random.default_rng(0).normal(size=(96, 7, 5)) + np.random.default_rng(1).normal(size=(96, 1, 5))
    assert np.allclose(ours(x, 3), pooled_covariance(x, faulty=False), atol=1e-12)
    assert not np.allclose(ours(x, 3), pooled_covariance(x), atol=1e-2)


def test_82_percent_of_the_scatter_between_sequences_survive_the_error() -> None:
    assert pytest.approx(0.8225, abs=5e-5) == SURVIVES
    # Sequences that do not vary inside, with orthogonal means of one length: each adds its share and nothing else.
    x = np.repeat(np.eye(SEQUENCES_PER_GROUP)[:, None], 4, axis=1)
    between = group_scatter(x, faulty=False)
    assert np.trace(group_scatter(x)) / np.trace(between) == pytest.approx(SURVIVES, rel=1e-12)
    assert np.allclose(ours(x, 1), between / (4 * SEQUENCES_PER_GROUP - 1), atol=1e-12)


@pytest.mark.parametrize(("tokens", "percent"), [(16, 1.08), (86, 0.20), (4096, 0.0042)])
def test_the_error_is_small_where_tokens_do_not_depend_on_their_sequence(tokens: int, percent: float) -> None:
    lost = (1 - SURVIVES) * (SEQUENCES_PER_GROUP - 1)  # in units of the variance of a token: means vary by 1 / tokens
    assert 100 * lost / (SEQUENCES_PER_GROUP * tokens - 1) == pytest.approx(percent, rel=0.01)
    features = 16384 // tokens  # of independent tokens; what is lost is a sum over all of them
    x = np.random.default_rng(0).normal(size=(SEQUENCES_PER_GROUP, tokens, features))
    true = np.trace(group_scatter(x, faulty=False))
    assert 100 * (true - np.trace(group_scatter(x))) / true == pytest.approx(percent, rel=1.2 / features**0.5)


def test_the_error_is_large_where_sequences_differ() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SEQUENCES_PER_GROUP, 64, 200)) + rng.normal(size=(SEQUENCES_PER_GROUP, 1, 200))
    lost = 1 - np.trace(group_scatter(x)) / np.trace(group_scatter(x, faulty=False))
    assert lost == pytest.approx((1 - SURVIVES) / 2, rel=0.1)  # half of the variance lies between the sequences


def test_no_sequence_is_lost_when_the_groups_do_not_divide_them() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6, 4)) + np.arange(40)[:, None, None]
    assert np.array_equal(pooled_covariance(x), pooled_covariance(x[:32]))  # eight sequences gone without a word
    assert not pooled_covariance(x[:31]).any()  # and a covariance of zero from 31
    for groups in (1, 3, 32, 40):
        estimate = ours(x, groups)
        for last in (0, 39):
            changed = x.copy()
            changed[last] *= 1 + np.arange(6)[:, None]
            assert not np.allclose(ours(changed, groups), estimate)
    assert np.linalg.eigvalsh(ours(x[:31], 8)).min() > 0


def test_one_window_a_group_is_fine_and_one_token_a_group_is_said_to_be_too_few() -> None:
    x = np.random.default_rng(0).normal(size=(12, 6, 4)) + np.arange(12)[:, None, None]
    inside = x - x.mean(axis=1, keepdims=True)
    assert np.allclose(ours(x, 12), np.einsum("wti,wtj->ij", inside, inside) / (12 * 5), atol=1e-12)
    with pytest.raises(RankwiseError, match="12 tokens are too few for a covariance within 12 groups"):
        ours(x[:, :1], 12)
    naive = accumulate(x[:, :1], 5).estimate(Covariance(estimator="naive"))[0]
    assert torch.allclose(naive, torch.cov(torch.tensor(x[:, 0]).T), atol=1e-12)

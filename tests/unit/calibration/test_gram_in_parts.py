"""Products of 16-bit parts against float64: exact sums of what a 16-bit model's inputs are, in numpy.

On a processor the parts are multiplied in float32, which gives the numbers that a GPU's products of bfloat16 with sums
in float32 stand for. With a GPU the same tests run on it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.calibration import gram, moments
from lowrank.calibration.gram import (
    SLAB,
    WIDE_PANEL,
    add_gram_in_parts,
    add_gram_of_halves,
    prefers_parts,
    symmetric,
)
from lowrank.calibration.moments import MomentAccumulator, RoutedAccumulator
from tests.marks import HAS_GPU, NEEDS_GPU

DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]
WITHIN = 1e-5
"""Of sqrt(C_ii C_jj): what float32 gives."""


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest, each entry measured by the sizes of its two features."""
    size = np.sqrt(np.diag(expected))
    return float(np.abs((found - expected) / np.outer(size, size)).max())


def product(rows: torch.Tensor, device: str = "cpu") -> np.ndarray:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=device)
    add_gram_in_parts(total, rows.to(device))
    return symmetric(total).cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "width"), [(1, 1), (SLAB - 1, 3), (2 * SLAB + 1, 5), (3, WIDE_PANEL + 2)])
def test_slabs_and_panels_add_up_to_the_whole_product(count: int, width: int, device: str) -> None:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    exact = rows.double().numpy().T @ rows.double().numpy()
    found = product(rows, device)
    assert np.array_equal(found, found.T)
    assert relative_error(found, exact) < 2**-15
    if count > SLAB:
        assert relative_error(found, exact) < WITHIN  # of sums in float32, an outlier first


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (2 * SLAB + 1, 5), (3, WIDE_PANEL + 2)])
def test_numbers_of_16_bits_are_multiplied_exactly(dtype: torch.dtype, count: int, width: int, device: str) -> None:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)
    rows[0, 0] = 1e4
    total = torch.zeros(width, width, dtype=torch.float64, device=device)
    add_gram_of_halves(total, rows.to(device))
    exact = rows.double().numpy().T @ rows.double().numpy()
    assert relative_error(symmetric(total).cpu().numpy(), exact) < WITHIN  # of sums in float32, an outlier first


@given(sign=st.integers(0, 255), mantissa=st.integers(0, 2**23 - 1), exponent=st.integers(-30, 30))
@settings(max_examples=200, deadline=None)
def test_numbers_that_are_all_alike_lose_no_more_than_promised(sign: int, mantissa: int, exponent: int) -> None:
    """The worst that can be: every product errs in the same direction."""
    value = np.float32((1 + mantissa / 2**23) * 2.0**exponent)
    signs = np.where((sign >> np.arange(8)) & 1, -1, 1).astype(np.float32)
    rows = torch.from_numpy((signs * value)[:, None])
    assert abs(product(rows).item() / (8 * float(value) ** 2) - 1) <= 2**-15


@pytest.mark.parametrize("place", [(0, 0), (0, 3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(place: tuple[int, int], value: float) -> None:
    rows = torch.ones(2, 5)
    rows[place] = value
    assert not np.isfinite(product(rows)).all()


def activations(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Inputs of a 16-bit layer: correlated, some features 10,000 times as large as others, means far from zero."""
    draw = torch.Generator().manual_seed(seed)
    windows, length, width = 4, 512, 24
    mixed = torch.randn(windows, length, width, generator=draw) @ torch.randn(width, width, generator=draw)
    means = torch.tensor([0.0, 30.0, -100.0, 3.0]).repeat(width // 4) * (
        1 + torch.rand(windows, 1, width, generator=draw)
    )
    scales = torch.tensor([1.0, 1.0, 1e4, 1e-1, 1.0, 1e2]).repeat_interleave(width // 6)
    smaller = 1e-3 if dtype is torch.float16 else 1.0  # than 65,504
    return ((mixed + means) * scales * smaller).to(dtype)


def within(x: torch.Tensor) -> np.ndarray:
    """Covariance around the windows' means, in float64."""
    data = x.double().numpy()
    deviations = (data - data.mean(axis=1, keepdims=True)).reshape(-1, data.shape[2])
    return deviations.T @ deviations / len(deviations)


def collected(x: torch.Tensor, device: str, routed: bool = False) -> np.ndarray:
    """The scatter within windows; of an expert that got all tokens, if `routed`."""
    accumulator = (RoutedAccumulator if routed else MomentAccumulator)(x.shape[2], device)
    for batch in x.to(device).split(2):
        if isinstance(accumulator, RoutedAccumulator):
            of_window = torch.arange(len(batch), device=device).repeat_interleave(batch.shape[1])
            accumulator.update_routed(batch.flatten(0, 1), of_window, len(batch), "here")
        else:
            accumulator.update(batch, "here")
    return accumulator.result().within.cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("routed", [False, True])
def test_statistics_of_a_16_bit_model_are_those_of_float64(
    dtype: torch.dtype, seed: int, routed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(moments, "prefers_parts", lambda like: asked.append(like.dtype) or True)
    x = activations(dtype, seed)
    assert relative_error(collected(x, device, routed), within(x)) < WITHIN
    assert asked == [dtype, dtype]


def test_one_part_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above says something: deviations from a mean do not fit 16 bits."""
    monkeypatch.setattr(moments, "prefers_parts", lambda like: True)
    monkeypatch.setattr(gram, "product_in_float32", lambda left, right: _first_third(left).T @ _first_third(right))
    x = activations(torch.bfloat16, 0)
    assert relative_error(collected(x, "cpu"), within(x)) > WITHIN


def _first_third(stacked: torch.Tensor) -> torch.Tensor:
    return stacked[: len(stacked) // 3].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_processor_multiplies_in_float32(dtype: torch.dtype) -> None:
    """Its products of 16-bit numbers would be rounded to 16 bits."""
    assert not prefers_parts(torch.zeros(1, dtype=dtype))


@NEEDS_GPU
def test_a_gpu_splits_what_comes_from_16_bits_alone() -> None:
    kinds = {
        dtype: prefers_parts(torch.zeros(1, dtype=dtype, device="cuda")) for dtype in (torch.bfloat16, torch.float32)
    }
    assert kinds == {torch.bfloat16: torch.cuda.is_bf16_supported(including_emulation=False), torch.float32: False}

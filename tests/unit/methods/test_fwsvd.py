"""FWSVD: the decomposition with weighted rows, against numpy and against gradients of a float64 model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lowrank.bases.weighted_svd import NEGLIGIBLE, weigh_rows
from lowrank.errors import RankwiseError
from tests import tiny
from tests.unit.model import factor_samples as samples


def random_matrix(m: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and positive weights of its rows over three orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    weights = 10 ** (3 * torch.rand(m, generator=g, dtype=torch.double) - 2)
    return torch.randn(m, n, generator=g, dtype=torch.double), weights


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 24), n=st.integers(2, 24), seed=st.integers(0, 999))
def test_weighted_rows_give_the_best_weighted_approximation(m: int, n: int, seed: int) -> None:
    w, d = random_matrix(m, n, seed)
    ordered = weigh_rows(w, d, "layer")
    for rank in range(1, min(m, n) + 1):
        expected = samples.truncation(d[:, None] * w, rank) / d[:, None]
        pair = ordered.factors(rank, None)
        assert pair.rank == rank
        assert torch.allclose(pair.up @ pair.down, expected, atol=1e-9 * float(w.abs().max()))
        assert torch.allclose(pair.up.norm(dim=0), pair.down.norm(dim=1)), "the factors share the singular values"


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 8), rank=st.integers(1, 11), seed=st.integers(0, 999))
def test_rows_that_do_not_matter_get_what_the_others_leave_over(rows: int, rank: int, seed: int) -> None:
    w, d = random_matrix(12, 16, seed)
    d[rows:] = 0
    got = weigh_rows(w, d, "layer").factors(rank, None)
    result = got.up @ got.down
    weighted = d[:rows, None] * w[:rows]
    best = weighted - samples.truncation(weighted, min(rank, rows))
    size = float(weighted.norm())
    assert float((d[:rows, None] * (w - result)[:rows]).norm()) <= float(best.norm()) + 10 * NEGLIGIBLE * size
    if rank > rows:  # the first rows are exact; the others are projected on them and rank - rows directions besides
        q = torch.linalg.qr(w[:rows].T).Q
        rest = w[rows:] - w[rows:] @ q @ q.T
        expected = w[rows:] - (rest - samples.truncation(rest, rank - rows))
        assert torch.allclose(result[rows:], expected, atol=1e-4 * float(w.abs().max()))


def test_weights_that_say_nothing_name_the_layer() -> None:
    w, d = random_matrix(6, 4, 0)
    with pytest.raises(RankwiseError, match=r"layers\.1\.q: no row matters"):
        weigh_rows(w, d * 0, "layers.1.q")
    with pytest.raises(RankwiseError, match=r"layers\.1\.q: .* not finite"):
        weigh_rows(w, d * float("nan"), "layers.1.q")
    with pytest.raises(RankwiseError, match=r"layers\.1\.q: .* not finite"):
        weigh_rows(w * float("inf"), d, "layers.1.q")


def fisher_rows(kind: str, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Row sums of the squared gradients of each window's loss, by autograd in float64."""
    model = tiny.model(kind).double()
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    sums = {name: torch.zeros(weight.shape[0], dtype=torch.double) for name, weight in zip(names, weights, strict=True)}
    for window in tokens:
        logits = model(window[None]).logits[0, :-1]
        loss = functional.cross_entropy(logits, window[1:])
        for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
            sums[name] += gradient.pow(2).sum(1)
    return sums


@pytest.mark.parametrize("kind", tiny.FEW)
def test_every_layer_is_the_decomposition_weighted_by_its_gradients(kind: str) -> None:
    dense = tiny.model(kind)
    model, ranks = samples.compressed("fwsvd", kind, 30)
    names = [name for name, rank in ranks.items() if rank]
    assert names
    sums = fisher_rows(kind, samples.TOKENS, names)
    for name in names:
        weight = dense.get_submodule(name).weight.double()
        d = sums[name].sqrt()
        d = d.clamp(min=1e-6 * float(d.max()))
        error = d[:, None] * (weight - samples.product(model, name))
        best = d[:, None] * weight - samples.truncation(d[:, None] * weight, ranks[name] or 0)
        assert float(error.norm()) == pytest.approx(float(best.norm()), rel=1e-3), name
        plain = samples.truncation(weight, ranks[name] or 0)
        assert float((d[:, None] * (weight - plain)).norm()) > 1.001 * float(best.norm()), "the weights decide nothing"
        bias = dense.get_submodule(name).bias
        assert (model.get_submodule(name).up.bias is None) == (bias is None)
        assert bias is None or torch.equal(model.get_submodule(name).up.bias, bias)


def test_sequences_are_the_first_windows() -> None:
    first, _ = samples.compressed("fwsvd", "llama-gqa", 25, sequences=3)
    same, _ = samples.compressed("fwsvd", "llama-gqa", 25, tokens=samples.TOKENS[:3])
    every, _ = samples.compressed("fwsvd", "llama-gqa", 25)
    assert torch.equal(first(samples.TOKENS).logits, same(samples.TOKENS).logits)
    assert not torch.allclose(first(samples.TOKENS).logits, every(samples.TOKENS).logits)


def test_a_layer_that_the_loss_does_not_depend_on_is_named() -> None:
    model = tiny.model("llama-gqa")
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.data.zero_()
    with pytest.raises(RankwiseError, match=r"model\.layers\.1\.self_attn\.q_proj: no row matters"):
        samples.compressed("fwsvd", "llama-gqa", 40, model=model)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_ratio_of_zero_changes_nothing(kind: str) -> None:
    samples.check_unchanged_at_ratio_zero("fwsvd", kind)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(list(tiny.FEW)), ratio=st.integers(5, 70))
def test_the_budget_holds(kind: str, ratio: int) -> None:
    samples.check_budget("fwsvd", kind, ratio, sequences=1)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, _ = samples.compressed("fwsvd", kind, 25)
    samples.check_round_trip(model, tmp_path)

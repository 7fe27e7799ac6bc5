"""Heads of fewer dimensions: against decompositions of whole matrices in numpy and float64, and by invariants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank.compression.heads import InnerBasis, Inputs, QueryKey, ValueOutput
from lowrank.errors import RankwiseError

D, GROUPS, SHARED, K, TOKENS = 20, 2, 3, 6, 90
"""Width of the model, key/value heads, query heads of each, dimensions of a head."""


def linear(weight: np.ndarray, bias: np.ndarray | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    layer.weight.data = torch.from_numpy(weight)
    if bias is not None:
        layer.bias.data = torch.from_numpy(bias)
    return layer.requires_grad_(False)


@dataclass
class Attention:
    """Random layers and samples of what they read, with a mean far from zero."""

    x: np.ndarray
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear

    @classmethod
    def drawn(cls, seed: int, biases: bool = False) -> Attention:
        draw = np.random.default_rng(seed)
        x = draw.standard_normal((TOKENS, D)) @ draw.standard_normal((D, D)) + 2 * draw.standard_normal(D)
        heads = GROUPS * SHARED
        layers = [
            linear(draw.standard_normal((m, n)), draw.standard_normal(m) if biases else None)
            for m, n in ((heads * K, D), (GROUPS * K, D), (GROUPS * K, D), (D, heads * K))
        ]
        return cls(x, *layers)

    def inputs(self) -> Inputs:
        return Inputs(torch.from_numpy(self.x.T @ self.x / TOKENS), torch.from_numpy(self.x.mean(axis=0)))

    def values(self) -> ValueOutput:
        return ValueOutput.of(self.v, self.o, GROUPS, self.inputs(), "model.layers.0")

    def queries(self, rotary: bool = True) -> QueryKey:
        return QueryKey.of(self.q, self.k, GROUPS, self.inputs(), rotary, "model.layers.0")


def outputs_of(v: nn.Linear | object, o: object, x: np.ndarray) -> np.ndarray:
    """O_h v(x) of each query head, heads x tokens x d, with a head's values from its group."""
    value = x @ v.weight.numpy().T + (0 if v.bias is None else v.bias.numpy())
    rank = value.shape[1] // GROUPS
    columns = o.weight.numpy().reshape(D, GROUPS * SHARED, rank)
    return np.array(
        [value[:, h // SHARED * rank :][:, :rank] @ columns[:, h].T for h in range(GROUPS * SHARED)], dtype=np.float64
    )


def root_of(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_v_and_o_are_the_best_product_of_their_rank(rank: int) -> None:
    """By the SVD of C^(1/2) W_v' [O_1' ... O_g'], the root of the whole matrix, undone afterwards."""
    attention = Attention.drawn(seed=3)
    v, o = attention.values().narrower(rank)
    c = root_of(attention.inputs().second.numpy())
    for group in range(GROUPS):
        w = attention.v.weight.numpy()[group * K :][:K]
        heads = attention.o.weight.numpy().reshape(D, GROUPS, SHARED, K)[:, group]
        product = np.concatenate([c @ w.T @ heads[:, h].T for h in range(SHARED)], axis=1)
        u, s, vt = np.linalg.svd(product, full_matrices=False)
        best = np.linalg.inv(c) @ (u[:, :rank] * s[:rank]) @ vt[:rank]
        narrow = v.weight.numpy()[group * rank :][:rank]
        columns = o.weight.numpy().reshape(D, GROUPS, SHARED, rank)[:, group]
        for h in range(SHARED):
            expected = best[:, h * D : (h + 1) * D]
            assert np.allclose(narrow.T @ columns[:, h].T, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("biases", [False, True])
def test_errors_of_the_samples_are_those_of_the_best_product(biases: bool) -> None:
    """The mean over tokens of e' e, summed over heads, against the singular values of the outputs themselves."""
    attention = Attention.drawn(seed=4, biases=biases)
    dense = outputs_of(attention.v, attention.o, attention.x)
    for rank in range(1, K + 1):
        error = dense - outputs_of(*attention.values().narrower(rank), attention.x)
        least = 0.0
        for group in range(GROUPS):
            heads = np.concatenate(dense[group * SHARED : (group + 1) * SHARED], axis=1)  # tokens x (heads, d)
            least += float((np.linalg.svd(heads, compute_uv=False)[rank:] ** 2).sum()) / TOKENS
        assert (error**2).sum() / TOKENS == pytest.approx(least, rel=1e-6, abs=1e-9 * (dense**2).sum() / TOKENS)


def test_no_bias_is_added() -> None:
    assert [layer.bias for layer in Attention.drawn(seed=4).values().narrower(2)] == [None, None]
    biased = Attention.drawn(seed=4, biases=True)
    assert torch.equal(biased.values().narrower(2)[1].bias, biased.o.bias)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, K))
def test_no_other_map_of_that_rank_loses_less(seed: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    m, n = (a @ a.T for a in (draw.standard_normal((K, K)), draw.standard_normal((K, 2 * K))))
    basis = InnerBasis.of(torch.from_numpy(m), torch.from_numpy(n))
    best = basis.decode[:, :rank].numpy() @ basis.encode[:rank].numpy()

    def loss(middle: np.ndarray) -> float:
        rest = np.eye(K) - middle
        return float(np.trace(n @ rest @ m @ rest.T))

    singular = np.linalg.svd(np.linalg.cholesky(n).T @ np.linalg.cholesky(m), compute_uv=False)
    assert loss(best) == pytest.approx(float((singular[rank:] ** 2).sum()), abs=1e-8)
    for scale in (1e-3, 0.1, 1):
        other = best + scale * draw.standard_normal((K, K))
        u, s, vt = np.linalg.svd(other)
        assert loss((u[:, :rank] * s[:rank]) @ vt[:rank]) >= loss(best) - 1e-9
    assert np.allclose(basis.encode.norm(dim=1), basis.decode.norm(dim=0))


def test_nothing_removed_changes_nothing() -> None:
    attention = Attention.drawn(seed=5, biases=True)
    v, o = attention.values().narrower(K)
    assert np.allclose(outputs_of(v, o, attention.x), outputs_of(attention.v, attention.o, attention.x))
    queries = attention.queries()
    q, k = queries.narrower(queries.kept(K // 2))
    assert torch.equal(q.weight, attention.q.weight)
    assert torch.equal(k.bias, attention.k.bias)


def test_dimensions_without_energy_cost_nothing() -> None:
    """Values that lie in two dimensions, outputs that read two others: one dimension in common is all there is."""
    attention = Attention.drawn(seed=6)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((K, K)))[0]
    v = attention.v.weight.numpy().reshape(GROUPS, K, D)
    attention.v.weight.data = torch.from_numpy((basis[:, :2] @ basis[:, :2].T @ v).reshape(GROUPS * K, D))
    o = attention.o.weight.numpy().reshape(D, GROUPS * SHARED, K)
    attention.o.weight.data = torch.from_numpy((o @ basis[:, 1:3] @ basis[:, 1:3].T).reshape(D, -1))
    found = attention.values()
    v, o = found.narrower(1)
    assert np.allclose(outputs_of(v, o, attention.x), outputs_of(attention.v, attention.o, attention.x))
    assert bool(found.narrower(K)[1].weight.isfinite().all())


def rotated(heads: np.ndarray, position: int) -> np.ndarray:
    """One token's heads x k, turned by its position, pair by pair."""
    turned, half = heads.copy(), K // 2
    for pair in range(half):
        angle = position * 0.7**pair
        first, second = heads[:, pair], heads[:, pair + half]
        turned[:, pair] = first * np.cos(angle) - second * np.sin(angle)
        turned[:, pair + half] = second * np.cos(angle) + first * np.sin(angle)
    return turned


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("rotary", [True, False])
def test_scores_are_products_of_sizes_at_any_position(rotary: bool, biases: bool) -> None:
    attention = Attention.drawn(seed=7, biases=biases)
    units = K // 2 if rotary else K
    sizes = {}
    for name, layer in (("q", attention.q), ("k", attention.k)):
        outputs = attention.x @ layer.weight.numpy().T + (0 if layer.bias is None else layer.bias.numpy())
        total = np.zeros((GROUPS, units))
        for position, token in enumerate(outputs):
            heads = token.reshape(-1, K)
            heads = rotated(heads, position) if rotary else heads
            for head, values in enumerate(heads):
                for unit in range(units):
                    members = [unit, unit + units] if rotary else [unit]
                    total[head * GROUPS // len(heads), unit] += sum(values[each] ** 2 for each in members) / TOKENS
        sizes[name] = np.sqrt(total)
    found = attention.queries(rotary)
    assert np.allclose(found.scores.numpy(), sizes["q"] * sizes["k"])
    for group in range(GROUPS):
        best = sorted(np.argsort(-(sizes["q"] * sizes["k"])[group])[:2].tolist())
        assert found.kept(2)[group].tolist() == best


@pytest.mark.parametrize("rotary", [True, False])
def test_q_and_k_keep_the_rows_of_what_stays(rotary: bool) -> None:
    attention = Attention.drawn(seed=8, biases=True)
    found = attention.queries(rotary)
    kept = found.kept(2)
    for layer, narrow in zip((attention.q, attention.k), found.narrower(kept), strict=True):
        heads = layer.out_features // K
        rows = []
        for head in range(heads):
            units = kept[head * GROUPS // heads].tolist()
            rows += [head * K + unit for unit in [*units, *(unit + K // 2 for unit in units if rotary)]]
        assert torch.equal(narrow.weight, layer.weight[rows])
        assert torch.equal(narrow.bias, layer.bias[rows])


def test_a_pair_that_keys_do_not_have_goes_first() -> None:
    attention = Attention.drawn(seed=9)
    attention.k.weight.data[[1, 1 + K // 2]] = 0
    attention.q.weight.data[K * SHARED :].view(SHARED, K, D)[:, [2, 2 + K // 2]] = 0
    assert attention.queries().kept(2).tolist() == [[0, 2], [0, 1]]


def test_damaged_weights_name_their_block() -> None:
    attention = Attention.drawn(seed=10)
    attention.v.weight.data[0, 0] = torch.nan
    with pytest.raises(RankwiseError, match=r"model\.layers\.0: its weights or its statistics are damaged"):
        attention.values()
    attention.q.weight.data[0, 0] = torch.inf
    with pytest.raises(RankwiseError, match=r"model\.layers\.0: its weights or its statistics are damaged"):
        attention.queries()

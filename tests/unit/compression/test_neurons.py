"""Elimination of neurons and regression onto the others, against least squares, all subsets, and invariants."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.compression.neurons import AT_ONCE, Neurons
from lowrank.errors import RankwiseError

EPS = 0.01


@dataclass
class Layer:
    """Samples of what a matrix reads, the matrix, its bias, gradients at its output."""

    inputs: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    gradients: np.ndarray

    def neurons(self, damping: float = 0.01, centred: bool = True) -> Neurons:
        h, mean = self.inputs, self.inputs.mean(axis=0)
        around = h - mean if centred else h
        return Neurons.of(
            torch.from_numpy(self.weight),
            None if self.bias is None else torch.from_numpy(self.bias),
            torch.from_numpy(around.T @ around / len(h)),
            torch.from_numpy(mean) if centred else None,
            torch.from_numpy(self.gradients.T @ self.gradients / len(self.gradients)),
            EPS,
            "model.layers.0.mlp.down_proj",
            damping,
        )

    def metric(self) -> np.ndarray:
        g = self.gradients.T @ self.gradients / len(self.gradients)
        return g + EPS * np.diag(np.diag(g))

    def by_least_squares(
        self, kept: list[int], damping: float = 0.01, centred: bool = True
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Cost, weights and bias of the best affine map of some neurons, by numpy's least squares on all samples.

        Damping a variance by a share is adding a sample for each neuron, in which only that neuron moves.
        """
        h = self.inputs
        mean = h.mean(axis=0) if centred else np.zeros(h.shape[1])
        around = h - mean
        extra = np.diag(np.sqrt(damping * (around**2).sum(axis=0)))
        x = np.vstack([around, extra])
        targets = x @ self.weight.T
        solution = np.linalg.lstsq(x[:, kept], targets, rcond=None)[0]
        error = targets - x[:, kept] @ solution
        cost = float(np.trace(self.metric() @ (error.T @ error))) / len(h) / 2
        own = np.zeros(len(self.weight)) if self.bias is None else self.bias
        return cost, solution.T, own + self.weight @ mean - solution.T @ mean[kept]


def layer(seed: int, f: int = 20, d: int = 6, bias: bool = False, samples: int = 200) -> Layer:
    """Correlated neurons of very different sizes."""
    draw = np.random.default_rng(seed)
    h = draw.normal(size=(samples, f)) @ (np.eye(f) + 0.7 * draw.normal(size=(f, f)) / np.sqrt(f)) + draw.normal(size=f)
    h *= 10 ** draw.uniform(-2, 2, size=f)
    w = draw.normal(size=(d, f)) / h.std(axis=0) * draw.exponential(size=f)
    gradients = draw.normal(size=(50, d)) * draw.exponential(size=d)
    return Layer(h, w, draw.normal(size=d) if bias else None, gradients)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), f=st.integers(9, 40), bias=st.booleans(), centred=st.booleans())
def test_every_set_on_the_way_costs_what_least_squares_says_and_gets_its_map(
    seed: int, f: int, bias: bool, centred: bool
) -> None:
    sample = layer(seed, f, bias=bias)
    neurons = sample.neurons(centred=centred)
    found = neurons.eliminate()
    assert sorted(found.order.tolist()) == list(range(f))
    for count in range(1, f + 1):
        kept = found.kept(count)
        cost, weight, added = sample.by_least_squares(kept.tolist(), centred=centred)
        assert float(found.losses[f - count]) == pytest.approx(cost, rel=1e-6, abs=1e-9 * float(found.losses[-1]))
        got, got_bias = neurons.refit(kept)
        scale = sample.inputs.std(axis=0)[kept]
        assert np.allclose(
            got.numpy() * scale, weight * scale, atol=1e-8 * np.abs(sample.weight * sample.inputs.std(axis=0)).max()
        )
        if centred:
            expected = added if bias or count < f else np.zeros_like(added)
            there = np.zeros_like(added) if got_bias is None else got_bias.numpy()
            assert np.allclose(there, expected, atol=1e-6 * np.abs(sample.weight * sample.inputs.mean(axis=0)).sum())
        else:
            assert (got_bias is None) == (not bias)


def test_the_last_to_go_takes_all_variance_with_it() -> None:
    sample = layer(3)
    h = sample.inputs - sample.inputs.mean(axis=0)
    c = h.T @ h / len(h)
    whole = sample.weight @ (c + 0.01 * np.diag(np.diag(c))) @ sample.weight.T
    assert float(sample.neurons().eliminate().losses[-1]) == pytest.approx(np.trace(sample.metric() @ whole) / 2)


@pytest.mark.parametrize("bias", [True, False])
def test_none_removed_changes_nothing(bias: bool) -> None:
    sample = layer(1, bias=bias)
    neurons = sample.neurons()
    found = neurons.eliminate()
    assert float(found.losses[0]) == 0
    weight, kept_bias = neurons.refit(found.kept(20))
    assert np.array_equal(weight.numpy(), sample.weight)
    assert kept_bias is None if sample.bias is None else np.array_equal(kept_bias.numpy(), sample.bias)


def test_a_twin_costs_nothing_and_its_brother_takes_its_weight() -> None:
    """But for the damping: with a share of 1e-9 that is what is left."""
    sample = layer(2)
    sample.inputs[:, 7] = -3 * sample.inputs[:, 12] + 5
    neurons = sample.neurons(damping=1e-9)
    found = neurons.eliminate(at_once=1)
    assert int(found.order[0]) in (7, 12)
    assert float(found.losses[1]) < 1e-7 * float(found.losses[-1])
    kept = torch.tensor([index for index in range(20) if index != 7])
    weight, bias = neurons.refit(kept)
    assert bias is not None
    before = sample.inputs @ sample.weight.T
    after = sample.inputs[:, kept] @ weight.numpy().T + bias.numpy()
    assert np.allclose(before, after, atol=1e-5 * np.abs(before).max())
    assert np.allclose(weight[:, 11].numpy(), sample.weight[:, 12] - 3 * sample.weight[:, 7], atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), size=st.floats(-6, 6))
def test_scaling_neurons_changes_neither_order_nor_losses(seed: int, size: float) -> None:
    """With gate's or up's row by a and down's column by 1/a the network is the same; 1e6 in one neuron, too."""
    sample = layer(seed)
    factors = np.ones(20)
    factors[seed % 20] = 10.0**size
    factors[(seed + 1) % 20] = -0.5
    scaled = Layer(sample.inputs * factors, sample.weight / factors, None, sample.gradients)
    first, second = sample.neurons().eliminate(), scaled.neurons().eliminate()
    assert first.order.tolist() == second.order.tolist()
    assert np.allclose(first.losses, second.losses, rtol=1e-6)
    kept = first.kept(9)
    maps = [part.neurons().refit(kept)[0].numpy() for part in (sample, scaled)]
    assert np.allclose(maps[0], maps[1] * factors[kept], rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), size=st.floats(-4, 4))
def test_scaling_an_output_changes_neither_order_nor_losses(seed: int, size: float) -> None:
    """With gradients by 1/a: an output that is huge makes no other's gradients look like none."""
    sample = layer(seed)
    factors = np.ones(6)
    factors[seed % 6] = 10.0**size
    scaled = Layer(sample.inputs, sample.weight * factors[:, None], None, sample.gradients / factors)
    first, second = sample.neurons().eliminate(), scaled.neurons().eliminate()
    assert first.order.tolist() == second.order.tolist()
    assert np.allclose(first.losses, second.losses, rtol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_beside_all_subsets_the_first_removal_is_the_best_and_later_ones_are_near(seed: int) -> None:
    """Only the first is guaranteed, and that no set costs less than the best of its size."""
    f = 9
    sample = layer(seed, f, d=4)
    found = sample.neurons().eliminate(at_once=1)
    for removed in range(1, f):
        best = min(sample.by_least_squares(list(kept))[0] for kept in combinations(range(f), f - removed))
        cost = float(found.losses[removed])
        assert cost >= best * (1 - 1e-9)
        assert cost <= best * (1 + 1e-9 if removed == 1 else 1.5)


@pytest.mark.parametrize("seed", range(4))
def test_several_at_once_cost_hardly_more_than_one_by_one(seed: int) -> None:
    sample = layer(seed, f=160, d=16, samples=400)
    together, alone = sample.neurons().eliminate(), sample.neurons().eliminate(at_once=1)
    assert AT_ONCE > 1
    for removed in (16, 48, 80, 112):
        assert float(together.losses[removed]) <= 1.1 * float(alone.losses[removed])


def test_constant_neurons_go_first_for_nothing_and_keep_their_weights_if_they_stay() -> None:
    sample = layer(5, bias=True)
    sample.inputs[:, [3, 8]] = [0.0, 2.0]
    neurons = sample.neurons()
    found = neurons.eliminate()
    assert set(found.order[:2].tolist()) == {3, 8}
    assert float(found.losses[2]) == 0
    weight, bias = neurons.refit(torch.tensor([index for index in range(20) if index != 8]))
    assert bias is not None
    assert sample.bias is not None
    assert np.allclose(weight.numpy(), np.delete(sample.weight, 8, axis=1))
    assert np.allclose(bias.numpy(), sample.bias + 2 * sample.weight[:, 8])
    weight, _ = neurons.refit(torch.tensor([3, 5, 6]))
    assert np.array_equal(weight[:, 0].numpy(), sample.weight[:, 3])


@pytest.mark.parametrize("seed", range(8))
def test_neurons_that_move_less_than_float32_can_say_count_as_constant(seed: int) -> None:
    sample = layer(seed)
    sample.inputs[:, :6] *= 3e-23 * np.random.default_rng(seed).uniform(0, 3, 6)
    w, h = torch.from_numpy(sample.weight), torch.from_numpy(sample.inputs)
    stored = torch.cov(h.T, correction=0).float()  # of which the first ones are denormal, and not even positive
    found = Neurons.of(w, None, stored, h.mean(0), None, 0, "a layer").eliminate()
    assert set(found.order[:6].tolist()) == set(range(6))
    assert float(found.losses[6]) == 0


def test_a_layer_without_gradient_or_with_damaged_statistics_is_named() -> None:
    sample = layer(0)
    sample.gradients[:] = 0
    with pytest.raises(RankwiseError, match=r"layers\.0\.mlp\.down_proj: the loss has no gradient"):
        sample.neurons()
    sample = layer(0)
    sample.inputs[0, 0] = np.nan
    with pytest.raises(RankwiseError, match=r"layers\.0\.mlp\.down_proj: its weights or its statistics are damaged"):
        sample.neurons()
    sample = layer(0)
    sample.inputs[:, 1] = sample.inputs[:, 0]
    with pytest.raises(RankwiseError, match="damped covariance of its inputs is not positive"):
        sample.neurons(damping=-1e-3).eliminate()


def test_without_gradients_the_error_of_the_outputs_is_what_counts() -> None:
    draw = np.random.default_rng(12)
    layer = Layer(draw.standard_normal((60, 10)), draw.standard_normal((4, 10)), None, draw.standard_normal((50, 4)))
    h = torch.from_numpy(layer.inputs)
    options = (torch.from_numpy(layer.weight), None, h.T @ h / 60, None)
    plain, by_identity = (Neurons.of(*options, g, 0, "a layer") for g in (None, torch.eye(4)))
    assert torch.allclose(plain.eliminate().losses, by_identity.eliminate().losses)
    kept = plain.eliminate().kept(4)
    error = h @ options[0].T - h[:, kept] @ plain.refit(kept)[0].T
    assert float((error**2).sum()) / 120 == pytest.approx(float(plain.eliminate().losses[6]), rel=0.05)  # the damping

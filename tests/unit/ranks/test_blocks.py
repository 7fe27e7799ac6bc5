"""Blocks weighed by their influence: the formula, what it leaves alone, and what it does to an allocation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.errors import RankwiseError
from lowrank.ranks.blocks import LEAST_INFLUENCE, block_weights, loss_at, weigh_blocks
from lowrank.ranks.curves import Curve, choices_of
from lowrank.ranks.predicted_loss import allocate
from tests.unit.ranks.test_predicted_loss import budget_of, losses_of

POSITIVE = st.floats(1e-3, 1e3)


def curve(losses: list[float], size: float = 8.0) -> Curve:
    return Curve(size * np.arange(1, len(losses) + 1, dtype=float), np.array(losses))


def test_the_weights_by_hand() -> None:
    """Two blocks of one predicted loss: the influence of one is four times that of the other."""
    assert block_weights({0: 2.0, 1: 2.0}, [0.1, 0.4]) == pytest.approx({0: 2**-0.5, 1: 2**0.5})
    # Predicted losses that say the same as influence leave nothing to weigh.
    assert block_weights({0: 1.0, 1: 4.0}, [0.1, 0.4]) == pytest.approx({0: 1.0, 1: 1.0})


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=6), POSITIVE, POSITIVE)
def test_weighed_blocks_compare_as_the_geometric_mean_of_both(
    blocks: list[tuple[float, float]], one: float, other: float
) -> None:
    """Whatever the units of either are."""
    losses, influence = (np.array(column) for column in zip(*blocks, strict=True))
    weights = block_weights(dict(enumerate(one * losses)), list(other * influence))
    weighed = np.array([weights[layer] for layer in range(len(blocks))]) * losses
    mean = np.sqrt(losses * influence)
    np.testing.assert_allclose(weighed / weighed[0], mean / mean[0], rtol=1e-9)
    assert np.prod(list(weights.values())) == pytest.approx(1)


def test_a_block_that_does_nothing_has_a_weight_and_one_without_losses_needs_none() -> None:
    weights = block_weights({0: 1.0, 1: 1.0, 2: 0.0}, [0.0, 1.0, 0.5])
    assert weights[2] == 1
    assert weights[0] / weights[1] == pytest.approx(LEAST_INFLUENCE**0.5)
    assert block_weights({0: 0.0}, [0.5]) == {0: 1.0}
    with pytest.raises(RankwiseError, match="block 1 has an influence of nan"):
        block_weights({0: 1.0, 1: 1.0}, [0.5, float("nan")])


def test_the_loss_of_a_block_at_a_share_is_that_of_its_best_combination() -> None:
    """One matrix is cheap to cut: 3 of 4 parameters are left by cutting it alone."""
    first, second = curve([1.0, 0.0]), curve([10.0, 0.0])  # 8 or 16 parameters each
    assert loss_at([first, second], 1.0) == 0
    assert loss_at([first, second], 0.75) == 1.0
    assert loss_at([first, second], 0.5) == 11.0
    assert loss_at([first, second], 0.1) == 11.0


def test_a_share_of_a_block_is_one_of_its_dense_matrices_whatever_loses_nothing() -> None:
    """Directions in which nothing was seen cost nothing: dense is no choice then, and still what is kept a share of."""
    lossless, nearly = (curve([4.0, 1.0, last, 0.0]) for last in (0.0, 1e-9))  # 8, 16, 24 or 32 parameters
    for kept in (0.5, 0.75, 0.8, 1.0):
        assert loss_at([lossless], kept) == loss_at([nearly], kept)
    assert loss_at([lossless], 0.75) == 0
    assert loss_at([curve([4.0, 1.0, 1e-3, 0.0])], 0.75) == 1e-3


def test_curves_of_several_blocks_are_left_alone() -> None:
    curves = {"a": curve([2.0, 0.0]), "b": curve([2.0, 0.0]), "both": curve([5.0, 0.0])}
    weighed = weigh_blocks(curves, {"a": {0}, "b": {1}, "both": {0, 1}}, [0.1, 0.4], kept=0.5)
    assert weighed["a"].losses.tolist() == pytest.approx([2 * 2**-0.5, 0])
    assert weighed["b"].losses.tolist() == pytest.approx([2 * 2**0.5, 0])
    assert weighed["both"] is curves["both"]


def kept(ranks: dict[str, int | None], layer: int) -> int:
    budget = budget_of("llama")
    return sum(budget.cost(module, ranks[module.name]) for module in budget.modules if module.layer == layer)


def test_a_block_of_more_influence_keeps_more_and_the_predicted_loss_stays_what_it_is() -> None:
    budget, losses = budget_of("llama"), losses_of(budget_of("llama"), 3)
    plain = allocate(budget, 30, losses)
    first, last = (allocate(budget, 30, losses, influence=each) for each in ([1.0, 0.01], [0.01, 1.0]))
    assert kept(first.ranks, 0) > kept(plain.ranks, 0) > kept(last.ranks, 0)
    assert budget.parameters(first.ranks) <= budget.allowed(30)
    for found in (first, last):
        assert found.loss >= plain.loss - 1e-12  # it is the prediction's optimum no more
        by_hand = 0.0
        for module in budget.modules:
            choices = choices_of(budget, module, losses[module.name])
            by_hand += float(choices.losses[choices.ranks.index(found.ranks[module.name])])
        assert found.loss == pytest.approx(by_hand)


def test_within_a_block_nothing_changes() -> None:
    """All curves of a block are scaled by one factor, whatever they are."""
    curves = {"a": curve([2.0, 1.0, 0.0]), "b": curve([7.0, 0.0]), "c": curve([3.0, 0.5, 0.0])}
    weighed = weigh_blocks(curves, {"a": {0}, "b": {0}, "c": {1}}, [0.3, 0.01], kept=0.7)
    factors = {name: weighed[name].losses[0] / curves[name].losses[0] for name in curves}
    assert factors["a"] == pytest.approx(factors["b"])
    assert factors["a"] > 1.5 > 0.7 > factors["c"]
    for name, before in curves.items():
        np.testing.assert_allclose(weighed[name].losses, factors[name] * before.losses)
        np.testing.assert_array_equal(weighed[name].parameters, before.parameters)

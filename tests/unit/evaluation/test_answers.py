"""Shares of answers, and the guess at these shares, against all orders in which the answers could have been given."""

from __future__ import annotations

from itertools import permutations
from statistics import fmean, pstdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.evaluation.answers import count_answers

Json = dict[str, Any]


def sample(values: list[float], target: int | str, answers: tuple[str, ...] = ("no", "yes")) -> Json:
    """As lm-eval records a document: an answer stands behind its delimiter, a space."""
    return {
        "arguments": [("Question?", f" {answer}") for answer in answers],
        "filtered_resps": [(value, False) for value in values],
        "target": target,
    }


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5))
def test_a_blind_guess_has_the_mean_accuracy_of_all_orders_of_the_answers(pairs: list[tuple[int, int]]) -> None:
    answers = ("true", "false", "neither")
    documents = [sample([-1.0 if i == chosen else -2.0 for i in range(3)], target, answers) for chosen, target in pairs]
    found = count_answers(documents, "acc")
    chosen, targets = zip(*pairs, strict=True)
    orders = [fmean(a == b for a, b in zip(order, targets, strict=True)) for order in permutations(chosen)]
    assert found["blind"] == pytest.approx(fmean(orders))
    if len(pairs) > 1:
        assert found["blind_stderr"] == pytest.approx(pstdev(orders), abs=1e-7)
    for index, answer in enumerate(answers):
        assert found["answers"][answer]["given"] == pytest.approx(chosen.count(index) / len(pairs))
        assert found["answers"][answer]["correct"] == pytest.approx(targets.count(index) / len(pairs))


def test_a_model_with_one_answer_is_as_right_as_its_guess() -> None:
    documents = [sample([-3.0, -1.0], target) for target in (1, 1, 1, 0)]
    assert count_answers(documents, "acc")["blind"] == 0.75


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=8),
    st.floats(-5, 5),
)
def test_the_auc_is_a_share_of_pairs_that_no_preference_changes(pairs: list[tuple[int, int]], bias: float) -> None:
    no, yes = ([float(value) for value, target in pairs if target == label] for label in (0, 1))
    found, shifted = (
        count_answers([sample([0.5, 0.5 + value + shift], target) for value, target in pairs], "acc")
        for shift in (0, bias)
    )
    if not no or not yes:
        assert "auc" not in found
        return
    wins = fmean(float(a > b) + 0.5 * (a == b) for a in yes for b in no)
    assert found["auc"] == pytest.approx(wins)
    assert shifted["auc"] == pytest.approx(wins)


def test_the_metric_decides_which_answer_was_given() -> None:
    documents = [sample([-3.0, -4.0], 1)]  # per character: no -1.5, yes -1.33
    assert count_answers(documents, "acc")["answers"]["no"]["given"] == 1
    assert count_answers(documents, "acc_norm")["answers"]["yes"]["given"] == 1


def test_answers_are_as_long_as_the_task_writes_them() -> None:
    documents = [sample([-3.0, -4.0], 1)]  # with the delimiter as a part of the answers: no -1, yes -1
    assert count_answers(documents, "acc_norm", "")["answers"][" no"]["given"] == 1


@pytest.mark.parametrize(
    "documents",
    [
        [sample([-1.0, -2.0], 0), sample([-1.0, -2.0], 0, ("a cup", "the sun"))],
        [sample([-1.0, -2.0], 0, ("ran off", "ran off"))],
        [sample([-1.0, -2.0, -1.5, -2.5], 0, ("no", "yes", "no", "yes"))],
        [sample([-1.0, -2.0], "no")],
        [sample([-1.0, -2.0], 2)],
        [sample([-1.0, -2.0], -1)],
        [{"arguments": [("Solve", {"until": ["."]})], "filtered_resps": ["4"], "target": "4"}],
    ],
    ids=[
        "answers of their own",
        "one answer in two contexts",
        "each answer with and without the question",
        "no index of the correct answer",
        "an index beyond the answers",
        "no correct answer",
        "generated text",
    ],
)
def test_nothing_is_counted_where_answers_are_not_shared(documents: list[Json]) -> None:
    assert count_answers(documents, "acc") == {}

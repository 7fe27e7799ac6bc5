"""How often a model gives each answer, where all documents of a task offer the same answers (BoolQ's "no" and "yes").

Such a task can be answered as well as by chance without reading it, and chance is no fixed number: a model that
always says "yes" is right as often as "yes" is. What reading brought shows beside `blind`, the accuracy of a guess
that gives each answer as often as the model did, whatever the document; and of two answers in `auc`, which no
preference for one of them changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

NORMALIZED = "acc_norm"
"""lm-eval's metric by log-likelihood per character of the answer."""


def count_answers(documents: Sequence[Mapping[str, Any]], metric: str, delimiter: str = " ") -> dict[str, Any]:
    """Shares of the answers that were given and of those that are correct.

    Args:
        documents: lm-eval's samples of a task.
        metric: the one that decides which answer was given.
        delimiter: what the task writes before an answer.

    Returns:
        "answers": answer -> {"given", "correct"}, shares of the documents, in the order of the task; "blind":
        `b = sum_a given(a) correct(a)`; "blind_stderr": the standard deviation of the accuracy over all orders in
        which the same answers could have been given to the `n` documents,
        `sqrt((b + b^2 - sum_a given(a) correct(a) (given(a) + correct(a))) / (n - 1))` (of one document: left out);
        and, of two answers that are both correct somewhere, "auc": how often a document of the second prefers the
        second by more than one of the first does, over all such pairs of documents (0.5 for a guess). Nothing, where
        documents offer answers of their own or one twice, or the correct one is not told by its index.
    """
    offered = [[answer for _, answer in document["arguments"]] for document in documents]
    if any(other != offered[0] for other in offered) or not all(isinstance(answer, str) for answer in offered[0]):
        return {}
    answers = [answer.removeprefix(delimiter) for answer in offered[0]]
    targets = [document["target"] for document in documents]
    if not 2 <= len(answers) == len(set(answers)) or not all(
        isinstance(t, int) and 0 <= t < len(answers) for t in targets
    ):
        return {}
    values = [_values(document, answers, metric) for document in documents]
    given = Counter(answers[row.index(max(row))] for row in values)
    correct = Counter(answers[target] for target in targets)
    pairs = [(given[answer] / len(documents), correct[answer] / len(documents)) for answer in answers]
    counts: dict[str, Any] = {
        "answers": {answer: {"given": g, "correct": c} for answer, (g, c) in zip(answers, pairs, strict=True)},
        "blind": math.fsum(g * c for g, c in pairs),
    }
    if len(documents) > 1:
        spread = counts["blind"] + counts["blind"] ** 2 - math.fsum(g * c * (g + c) for g, c in pairs)
        counts["blind_stderr"] = math.sqrt(max(spread, 0.0) / (len(documents) - 1))
    if len(answers) == len(correct) == 2:
        counts["auc"] = _preferred(targets, [second - first for first, second in values])
    return counts


def _preferred(targets: Sequence[int], preferences: Sequence[float]) -> float:
    """How often one with target 1 has the larger preference than one with target 0; a tie counts as half.

    The area under the ROC curve, from the sum of ranks (Mann and Whitney).
    """
    ranks = pd.Series(preferences).rank()[[target == 1 for target in targets]]
    ones, zeros = len(ranks), len(targets) - len(ranks)
    return float((ranks.sum() - ones * (ones + 1) / 2) / (ones * zeros))


def _values(document: Mapping[str, Any], answers: Sequence[str], metric: str) -> list[float]:
    """What the metric compares: an answer's log-likelihood, or that per character."""
    lengths = [len(answer) if metric == NORMALIZED else 1 for answer in answers]
    return [value / length for (value, _), length in zip(document["filtered_resps"], lengths, strict=True)]

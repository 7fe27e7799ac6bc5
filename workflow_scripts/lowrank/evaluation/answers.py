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

from sklearn.metrics import roc_auc_score

NORMALIZED = "acc_norm"
"""lm-eval's metric by log-likelihood per character of the answer."""


def count_answers(documents: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Shares of the answers that were given and of those that are correct.

    Args:
        documents: lm-eval's samples of a task.
        metric: the one that decides which answer was given.

    Returns:
        "answers": answer -> {"given", "correct"}, shares of the documents, in the order of the task; "blind":
        `sum_a given(a) correct(a)`; and, of two answers that are both correct somewhere, "auc": how often a document
        of the second prefers the second by more than one of the first does, over all such pairs of documents (0.5
        for a guess). Nothing, where documents offer answers of their own, or the correct one is not told by its index.
    """
    offered = {tuple(answer.strip() for _, answer in document["arguments"]) for document in documents}
    answers = offered.pop()
    if offered or len(set(answers)) < 2 or not all(isinstance(document["target"], int) for document in documents):
        return {}
    values = [_values(document, answers, metric) for document in documents]
    targets = [document["target"] for document in documents]
    given = Counter(answers[row.index(max(row))] for row in values)
    correct = Counter(answers[target] for target in targets)
    shares = {
        answer: {"given": given[answer] / len(documents), "correct": correct[answer] / len(documents)}
        for answer in answers
    }
    blind = math.fsum(share["given"] * share["correct"] for share in shares.values())
    counts: dict[str, Any] = {"answers": shares, "blind": blind}
    if len(answers) == len(correct) == 2:
        counts["auc"] = float(roc_auc_score(targets, [second - first for first, second in values]))
    return counts


def _values(document: Mapping[str, Any], answers: Sequence[str], metric: str) -> list[float]:
    """What the metric compares: an answer's log-likelihood, or that per character."""
    lengths = [len(answer) if metric == NORMALIZED else 1 for answer in answers]
    return [value / length for (value, _), length in zip(document["filtered_resps"], lengths, strict=True)]

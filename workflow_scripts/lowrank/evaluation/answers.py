"""How often a model gives each answer, where all documents of a task offer the same answers (BoolQ's "no" and "yes").

Such a task can be answered as well as by chance without reading it, and chance is no fixed number: a model that
always says "yes" is right as often as "yes" is. What reading brought shows beside `blind`, the accuracy of a guess
that gives each answer as often as the model did, whatever the document.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

NORMALIZED = "acc_norm"
"""lm-eval's metric by log-likelihood per character of the answer."""


def count_answers(documents: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Shares of the answers that were given and of those that are correct.

    Args:
        documents: lm-eval's samples of a task.
        metric: the one that decides which answer was given.

    Returns:
        "answers": answer -> {"given", "correct"}, shares of the documents, in the order of the task; and "blind":
        `sum_a given(a) correct(a)`. Nothing, where documents offer answers of their own, or the correct one is not
        told by its index.
    """
    offered = {tuple(answer.strip() for _, answer in document["arguments"]) for document in documents}
    answers = offered.pop()
    if offered or len(set(answers)) < 2 or not all(isinstance(document["target"], int) for document in documents):
        return {}
    given = Counter(_given(document, answers, metric) for document in documents)
    correct = Counter(answers[document["target"]] for document in documents)
    shares = {
        answer: {"given": given[answer] / len(documents), "correct": correct[answer] / len(documents)}
        for answer in answers
    }
    return {"answers": shares, "blind": math.fsum(share["given"] * share["correct"] for share in shares.values())}


def _given(document: Mapping[str, Any], answers: Sequence[str], metric: str) -> str:
    lengths = [len(answer) if metric == NORMALIZED else 1 for answer in answers]
    values = [value / length for (value, _), length in zip(document["filtered_resps"], lengths, strict=True)]
    return answers[values.index(max(values))]

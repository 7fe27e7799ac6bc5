"""The perplexities that figures show, from evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.errors import RankwiseError
from lowrank.paper.tables.data import Json
from lowrank.paper.tables.rows import over_seeds

NUMBERS = {"perplexity": "float64", "stderr": "float64", "sd_over_seeds": "float64"}
"""Columns of `perplexity_over_seeds` in a frame; what is unknown is empty."""


def perplexity_over_seeds(evaluations: Sequence[Json], corpus: str) -> dict[str, float | None]:
    """Perplexity on a corpus: mean, standard error and standard deviation over seeds.

    Args:
        evaluations: of one checkpoint, one a seed, at least one.
        corpus: one that they judge.

    Raises:
        RankwiseError: an evaluation is of another kind or lacks the corpus.
    """
    for evaluation in evaluations:
        if evaluation["kind"] != "perplexity" or corpus not in evaluation["corpora"]:
            subject = ", ".join(f"{key} {value}" for key, value in evaluation["subject"].items())
            raise RankwiseError(
                f"the evaluation of {subject} holds no perplexity on '{corpus}'. Delete it and run again."
            )
    results = [evaluation["corpora"][corpus] for evaluation in evaluations]
    estimate = over_seeds([result["perplexity"] for result in results], [result["stderr"] for result in results])
    return {"perplexity": estimate.value, "stderr": estimate.stderr, "sd_over_seeds": estimate.sd_over_seeds}

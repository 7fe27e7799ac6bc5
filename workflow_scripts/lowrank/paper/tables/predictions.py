"""The rise of the loss that methods predict, and beside it what the perplexities of a row and its dense model say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.measures import Measure
from lowrank.ranks.predicted_loss import MEANING

PREDICTED = "predicted_loss_rise"
"""The CSV column, and the key of a manifest."""
NOTE = (
    f"The CSV has the rise of the loss in nats per token, as methods predict it ({PREDICTED}: {MEANING}) and as "
    "measured on each corpus (…_loss_rise: log of the perplexity over that of the dense model). A prediction orders "
    "ranks; it is no estimate of what is measured."
)


def loss_rises(rows: Sequence[RowResults], measures: Sequence[Measure]) -> list[dict[str, float | None]]:
    """CSV columns for each row of a table; none at all if no row has a prediction.

    A prediction is of the compressed model, so a row of a post-trained one has none. The measured rises are those of
    all compressed rows whose dense model stands in the table.
    """
    predicted = [_predicted(results) for results in rows]
    if all(value is None for value in predicted):
        return [{} for _ in rows]
    dense = {results.row.model: results for results in rows if results.row.ratio == 0}
    corpora = [measure for measure in measures if measure.kind == "perplexity"]
    return [
        {PREDICTED: value} | {_key(measure): _measured(results, dense, measure) for measure in corpora}
        for results, value in zip(rows, predicted, strict=True)
    ]


def _key(measure: Measure) -> str:
    return f"{measure.key.removesuffix('_perplexity')}_loss_rise"


def _predicted(results: RowResults) -> float | None:
    """The mean over seeds."""
    if results.row.tuning != "none":
        return None
    found = [manifest[PREDICTED] for manifest in shared.manifests_of(results, "compression") if PREDICTED in manifest]
    return fmean(prediction["nats_per_token"] for prediction in found) if found else None


def _measured(results: RowResults, dense: dict[str, RowResults], measure: Measure) -> float | None:
    """The mean over seeds."""
    if results.row.ratio == 0 or results.row.model not in dense:
        return None
    return _mean_loss(results, measure) - _mean_loss(dense[results.row.model], measure)


def _mean_loss(results: RowResults, measure: Measure) -> float:
    found = shared.evaluations_of(results, measure.suite, measure.kind)
    return fmean(math.log(measure.read(evaluation)[0]) for evaluation in found)

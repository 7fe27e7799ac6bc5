"""Which value of a table is the best, and whether the test set tells it apart from the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.differences import Difference, average_difference, loss_difference, task_differences
from lowrank.paper.tables.measures import Measure
from lowrank.paper.tables.rows import Estimate

Estimates = Mapping[int, Estimate]
"""Number of a row -> its value in one column."""


def best_row(
    rows: Sequence[RowResults], measure: Measure, estimates: Estimates, guesses: Mapping[int, bool]
) -> int | None:
    """The row whose value is better than that of every other, if there is one that stands out.

    It does not if it is no better than a guess, or if its difference from some other row is no more than two standard
    errors.

    Args:
        rows: all rows of the table.
        measure: the column.
        estimates: the rows that compete; of one model and ratio, so that one text is behind them.
        guesses: whether a row's value is no better than a guess.
    """
    if len(estimates) < 2:
        return None
    pick = min if measure.lower_is_better else max
    first = pick(estimates, key=lambda number: estimates[number].value)
    if guesses[first]:
        return None
    others = (number for number in estimates if number != first)
    ahead = all(
        is_ahead(difference(rows[first], rows[other], measure, estimates[first], estimates[other]), measure)
        for other in others
    )
    return first if ahead else None


def is_ahead(found: Difference, measure: Measure) -> bool:
    """Whether a difference is clear and says that the first of the two is the better one.

    The order of two values may be another than the difference's sign: a mean of perplexities over seeds follows the
    largest, the mean of the losses does not.
    """
    return found.clear and (found.value < 0 if measure.lower_is_better else found.value > 0)


def no_better_than_a_guess(estimate: Estimate, measure: Measure, vocabulary: int | None) -> bool:
    """Whether a value is no better than that of a model that knows nothing.

    An accuracy is not if it is at most two standard errors above that of drawing an answer; a perplexity if it is that
    of drawing a token, which is the size of the vocabulary.
    """
    if measure.lower_is_better:
        return vocabulary is not None and estimate.value >= vocabulary
    return measure.chance is not None and estimate.value - 2 * (estimate.stderr or 0.0) <= measure.chance


def difference(ours: RowResults, theirs: RowResults, measure: Measure, one: Estimate, other: Estimate) -> Difference:
    """Value of a row less that of another, with its standard error.

    Of rows that were tested on the same windows or documents the pairs count; of a perplexity it is then the difference
    of the mean losses, nats per token. Of others, as those of two tokenizers, both errors count. The spread between
    seeds adds to either.
    """
    if _tested_alike(ours, theirs, measure):
        return _paired(ours, theirs, measure)
    apart = _apart(measure, one, other)
    return Difference(apart.value, _with_seeds(apart, ours, theirs, measure, one, other))


def _tested_alike(ours: RowResults, theirs: RowResults, measure: Measure) -> bool:
    tested = {
        measure.tested(evaluation)
        for results in (ours, theirs)
        for evaluation in shared.evaluations_of(results, measure.suite, measure.kind)
    }
    return len(tested) == 1


def _paired(ours: RowResults, theirs: RowResults, measure: Measure) -> Difference:
    if measure.kind == "perplexity":
        return loss_difference(ours, theirs, measure.suite, measure.part)
    if not measure.part:
        return average_difference(ours, theirs, measure.suite)
    return task_differences(ours, theirs, measure.suite)[measure.part]


def _apart(measure: Measure, one: Estimate, other: Estimate) -> Difference:
    """The difference of two independent values; of perplexities, of their logarithms."""
    errors = [estimate.stderr for estimate in (one, other)]
    if measure.lower_is_better:
        value = math.log(one.value / other.value)
        errors = [None if e.stderr is None else e.stderr / e.value for e in (one, other)]
    else:
        value = one.value - other.value
    known = [error for error in errors if error is not None]
    return Difference(value, math.hypot(*known) if len(known) == 2 else None)


def _with_seeds(
    found: Difference, ours: RowResults, theirs: RowResults, measure: Measure, one: Estimate, other: Estimate
) -> float | None:
    """The standard error with that of the means over seeds, whose spread the windows do not know of."""
    if found.stderr is None:
        return None
    spreads = []
    for results, estimate in ((ours, one), (theirs, other)):
        if estimate.sd_over_seeds is not None:
            seeds = len(shared.evaluations_of(results, measure.suite, measure.kind))
            unit = estimate.value if measure.lower_is_better else 1.0
            spreads.append(estimate.sd_over_seeds / unit / math.sqrt(seeds))
    return math.hypot(found.stderr, *spreads)

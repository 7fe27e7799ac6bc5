"""Tables of differences: each method against the first of its model and ratio, on the same windows and documents.

Most of the spread between windows, and between a task's documents, is common to two methods. So the standard error of
a difference is that of the paired differences, and much smaller than two separate errors suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank.config.outputs import RowTable
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import Cell, Column, Context, Line, RowResults, TableData

CLEAR = 2.0
"""Standard errors from which on a difference is marked."""
LOSS_NOTE = (
    "Loss less that of the first method of the block, in nats per token; positive: the first is better. The "
    "exponential of a difference is the ratio of perplexities."
)
ACCURACY_NOTE = (
    "Mean accuracy of the tasks less that of the first method of the block, in percentage points; negative: the first "
    "is better. The CSV has each task's."
)
ERROR_NOTE = (
    "± is the standard error of the mean of paired differences, of the same windows and the same documents; * marks "
    "more than two of them."
)


@dataclass(frozen=True)
class Difference:
    """Of two rows: the row's value less that of the reference.

    Attributes:
        value: of the mean loss in nats per token, or of the mean accuracy in percentage points.
        stderr: standard error of the mean of paired differences; None with one window or document.
    """

    value: float
    stderr: float | None

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.stderr is not None and abs(self.value) > CLEAR * self.stderr


def build_differences(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of paired differences: of the loss on held-out text, of the mean accuracy on tasks.

    Raises:
        RankwiseError: results are missing or of another row, rows of one block were tested on different windows or
            documents, or a method missed its ratio.
    """
    corpora = [
        (name, corpus)
        for name, suite in context.suites.items()
        if isinstance(suite, PerplexitySuite)
        for corpus in suite.corpora
    ]
    tasks = [name for name, suite in context.suites.items() if isinstance(suite, ZeroShotSuite)]
    references = _references(rows)
    lines, records = [], []
    for number, (results, starts_block) in enumerate(shared.block_starts(rows)):
        kept, reference = shared.kept_percent(results), references[results.row.model, results.row.ratio]
        of_losses = {corpus: loss_difference(results, reference, suite, corpus) for suite, corpus in corpora}
        of_tasks = {suite: task_differences(results, reference, suite) for suite in tasks}
        of_means = {suite: mean_difference(list(found.values())) for suite, found in of_tasks.items()}
        texts = [
            *shared.leading_texts(rows, results),
            f"{kept.value:.1f}",
            *(_text(results, reference, difference, 3) for difference in of_losses.values()),
            *(_text(results, reference, difference, 1) for difference in of_means.values()),
        ]
        lines.append(Line(tuple(map(Cell, texts)), starts_block=starts_block))
        record: dict[str, Any] = shared.record_start(results, number) | {"kept_percent": kept.value}
        record["reference"] = reference.row.title
        for corpus, difference in of_losses.items():
            record[f"{corpus}_difference"] = difference.value
            record[f"{corpus}_difference_stderr"] = difference.stderr
            record[f"{corpus}_perplexity_ratio"] = math.exp(difference.value)
        for suite, difference in of_means.items():
            record[f"{suite}_difference"] = difference.value
            record[f"{suite}_difference_stderr"] = difference.stderr
            for task, of_task in of_tasks[suite].items():
                record[f"{suite}.{task}_difference"] = of_task.value
                record[f"{suite}.{task}_difference_stderr"] = of_task.stderr
        records.append(record | shared.evidence_record(results))
    leading = shared.leading_columns(rows)
    return TableData(
        title=table.title,
        notes=(
            *shared.model_note(rows),
            *([LOSS_NOTE] if corpora else []),
            *([ACCURACY_NOTE] if tasks else []),
            ERROR_NOTE,
            *shared.seeds_note(rows),
        ),
        frame=shared.frame_of(records),
        columns=(
            *leading,
            Column("Kept (%)"),
            *(Column(corpus, group="Difference of the loss (nats per token)") for _, corpus in corpora),
            *(Column(suite, group="Difference of the accuracy (points)") for suite in tasks),
        ),
        lines=tuple(lines),
        heading=len(leading),
        warning=shared.smoke_warning(context.smoke),
    )


def loss_difference(results: RowResults, reference: RowResults, suite: str, corpus: str) -> Difference:
    """The paired difference of one row and its reference on one corpus; a row's seeds are averaged first.

    Raises:
        RankwiseError: an evaluation is missing, or they were made on different windows.
    """

    def losses(row: RowResults) -> tuple[np.ndarray, str]:
        found = [evaluation["corpora"][corpus] for evaluation in shared.evaluations_of(row, suite, "perplexity")]
        return _over_seeds(row, [(result["window_nll"], result["tokens_sha256"]) for result in found], corpus)

    return _paired(results, reference, losses(results), losses(reference), corpus)


def task_differences(results: RowResults, reference: RowResults, suite: str) -> dict[str, Difference]:
    """The paired difference of one row and its reference in the accuracy of each task of a suite, percentage points.

    Raises:
        RankwiseError: an evaluation is missing, or they were made on different documents.
    """

    def scores(row: RowResults, task: str) -> tuple[np.ndarray, str]:
        found = [evaluation["tasks"][task] for evaluation in shared.evaluations_of(row, suite, "zero-shot")]
        values, documents = _over_seeds(row, [(part["scores"], part["documents_sha256"]) for part in found], task)
        return 100 * values, documents

    tasks = shared.evaluations_of(reference, suite, "zero-shot")[0]["tasks"]
    return {task: _paired(results, reference, scores(results, task), scores(reference, task), task) for task in tasks}


def mean_difference(found: Sequence[Difference]) -> Difference:
    """Of independent tasks: the error of the mean of `T` differences is `sqrt(sum_t se_t^2) / T`."""
    errors = [difference.stderr for difference in found if difference.stderr is not None]
    return Difference(
        math.fsum(difference.value for difference in found) / len(found),
        math.hypot(*errors) / len(found) if len(errors) == len(found) else None,
    )


def _references(rows: Sequence[RowResults]) -> dict[tuple[str, int], RowResults]:
    first: dict[tuple[str, int], RowResults] = {}
    for results in rows:
        first.setdefault((results.row.model, results.row.ratio), results)
    return first


def _over_seeds(results: RowResults, found: Sequence[tuple[Sequence[float], str]], name: str) -> tuple[np.ndarray, str]:
    """The mean over seeds for each window or document, and the hash of what was tested."""
    hashes = {tested for _, tested in found}
    if len(hashes) > 1:
        raise RankwiseError(f"{results.place}: its seeds were scored on different parts of '{name}'; run again.")
    return np.mean([values for values, _ in found], axis=0), hashes.pop()


def _paired(
    results: RowResults,
    reference: RowResults,
    ours: tuple[np.ndarray, str],
    theirs: tuple[np.ndarray, str],
    name: str,
) -> Difference:
    """The mean of the differences, and its standard error."""
    (one, tested), (other, same) = ours, theirs
    if tested != same:
        raise RankwiseError(
            f"{results.place}: '{name}' was scored on other texts than for '{reference.row.title}', the "
            "first row of the block, so that no differences can be taken. Rows of different tokenizers cannot stand in "
            "one block; else delete the older evaluation and run the workflow again."
        )
    difference = one - other
    stderr = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else None
    return Difference(float(difference.mean()), stderr)


def _text(results: RowResults, reference: RowResults, difference: Difference, digits: int) -> str:
    if results is reference:
        return "reference"
    text = shared.estimate_text(difference.value, difference.stderr, digits)
    return f"{text} *" if difference.clear else text

"""Tables of differences: each method against the first of its model and ratio, or against the dense model.

All are judged on the same windows and documents. Perplexities stand beside the differences of their logarithms; and how
fast a prompt is read, against the dense model, and what compressing took, if the table names a suite of costs.

Most of the spread between windows, and between a task's documents, is common to two methods. So the standard error of
a difference is that of the paired differences, and much smaller than two separate errors suggest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lowrank.config.outputs import RowTable
from lowrank.config.suites import CostSuite, PerplexitySuite, ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import MISSING, Cell, Column, Context, Line, RowResults, TableData

CLEAR = 2.0
"""Standard errors from which on a difference is marked."""
LOSS_NOTE = (
    "Loss less that of the {of}, in nats per token; positive: the {short} is better. The exponential of a difference "
    "is the ratio of perplexities (of their geometric means over seeds)."
)
ACCURACY_NOTE = (
    "Mean accuracy of the tasks less that of the {of}, in percentage points; negative: the {short} is better. The CSV "
    "has each task's."
)
REFERENCES = {
    "first": {"of": "first method of the block", "short": "first"},
    "dense": {"of": "dense model", "short": "dense model"},
}
"""What the notes call it."""
PREFILL_NOTE = (
    "Prefill: tokens of a prompt read in a second, against the dense model; above 1 is faster. Wall times vary from "
    "run to run and with what else the machine does. The CSV has the tokens a second, a table of times says on what "
    "they were measured."
)
SPEED = "Prefill (× dense)"
PREFILL = "prefill_tokens_per_second"
TOOK_NOTE = (
    "Seconds: search, compression and post-training, the last including what a checkpoint takes to be written. "
    "Statistics, gradients, bases, eliminations and validation windows, which methods and ratios share, are not in it: "
    "the report has them job by job."
)
TOOK = ("search", "compression", "tuning")
"""Stages that are a row's own."""
ERROR_NOTE = (
    "± is the standard error of the mean of paired differences, of the same windows and the same documents, with the "
    "spread between seeds where there are several; * marks more than two of them."
)


@dataclass(frozen=True)
class Difference:
    """Of two rows: the row's value less that of the reference.

    Attributes:
        value: of the mean loss in nats per token, or of the mean accuracy in percentage points.
        stderr: standard error of the mean of paired differences, and of the means over seeds; None with one window or
            document.
    """

    value: float
    stderr: float | None

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.stderr is not None and abs(self.value) > CLEAR * self.stderr


def build_differences(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of paired differences: of the loss on held-out text, of the mean accuracy on tasks; and of costs.

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
    speeds = {name: _speeds(rows, name) for name, suite in context.suites.items() if isinstance(suite, CostSuite)}
    lines, records = [], []
    references = _references(rows, table.reference)
    compared_with = Counter(map(id, references))
    compared = zip(shared.block_starts(rows), references, strict=True)
    for number, ((results, starts_block), reference) in enumerate(compared):
        kept = shared.kept_percent(results)
        of_losses = {corpus: loss_difference(results, reference, suite, corpus) for suite, corpus in corpora}
        of_tasks = {suite: task_differences(results, reference, suite) for suite in tasks}
        of_means = {suite: average_difference(results, reference, suite) for suite in tasks}
        perplexities = {corpus: _perplexity(results, suite, corpus) for suite, corpus in corpora}
        alone = compared_with[id(results)] == 1  # the dense model, of which a table has nothing else at its ratio
        texts = [
            *shared.leading_texts(rows, results),
            f"{kept.value:.1f}",
            *(_text(results, reference, difference, 3, alone) for difference in of_losses.values()),
            *(_text(results, reference, difference, 1, alone) for difference in of_means.values()),
            *(shared.number_text(perplexity, 2) for perplexity in perplexities.values()),
            *(f"{of_rows[number].of_dense:.2f}" for of_rows in speeds.values()),
        ]
        took = _seconds(results) if speeds else None
        if speeds:
            texts.append(MISSING if took is None else f"{took:.0f}")
        lines.append(Line(tuple(map(Cell, texts)), starts_block=starts_block))
        record: dict[str, Any] = shared.record_start(results, number) | {"kept_percent": kept.value}
        record["reference"] = reference.row.title
        for corpus, difference in of_losses.items():
            record[f"{corpus}_difference"] = difference.value
            record[f"{corpus}_difference_stderr"] = difference.stderr
            record[f"{corpus}_perplexity_ratio"] = math.exp(difference.value)
            record[f"{corpus}_perplexity"] = perplexities[corpus]
        for suite, difference in of_means.items():
            record[f"{suite}_difference"] = difference.value
            record[f"{suite}_difference_stderr"] = difference.stderr
            for task, of_task in of_tasks[suite].items():
                record[f"{suite}.{task}_difference"] = of_task.value
                record[f"{suite}.{task}_difference_stderr"] = of_task.stderr
        for suite, of_rows in speeds.items():
            record[f"{suite}_{PREFILL}"] = of_rows[number].value
            record[f"{suite}_prefill_of_dense"] = of_rows[number].of_dense
        if speeds:
            record["seconds"] = took
        records.append(record | shared.evidence_record(results))
    leading = shared.leading_columns(rows)
    return TableData(
        title=table.title,
        notes=(
            *shared.model_note(rows),
            *([LOSS_NOTE.format(**REFERENCES[table.reference])] if corpora else []),
            *([ACCURACY_NOTE.format(**REFERENCES[table.reference])] if tasks else []),
            ERROR_NOTE,
            *([PREFILL_NOTE, TOOK_NOTE] if speeds else []),
            *shared.seeds_note(rows),
        ),
        frame=shared.frame_of(records),
        columns=(
            *leading,
            Column("Kept (%)"),
            *(Column(corpus, group="Difference of the loss (nats per token)") for _, corpus in corpora),
            *(Column(suite, group="Difference of the accuracy (points)") for suite in tasks),
            *(Column(corpus, group="Perplexity") for _, corpus in corpora),
            *([Column(SPEED)] if len(speeds) == 1 else [Column(suite, group=SPEED) for suite in speeds]),
            *([Column("Seconds")] if speeds else []),
        ),
        lines=tuple(lines),
        heading=len(leading),
        warning=shared.smoke_warning(context.smoke),
    )


def _perplexity(results: RowResults, suite: str, corpus: str) -> float:
    """The mean over seeds."""
    found = [evaluation["corpora"][corpus] for evaluation in shared.evaluations_of(results, suite, "perplexity")]
    return shared.over_seeds([result["perplexity"] for result in found]).value


@dataclass(frozen=True)
class _Speed:
    """How fast a row reads a prompt: tokens a second, mean over seeds, and how often that of its dense model."""

    value: float
    of_dense: float


def _seconds(results: RowResults) -> float | None:
    """What a row's own stages took; None for the dense model, whose files are linked."""
    found = [shared.seconds_of(results, stage) for stage in TOOK] if results.row.ratio else []
    return math.fsum(each for each in found if each is not None) if found else None


def _speeds(rows: Sequence[RowResults], suite: str) -> list[_Speed]:
    """Of each row; the config's check has seen to it that every model has its dense row."""
    found = [
        shared.over_seeds([e["measured"][PREFILL] for e in shared.evaluations_of(results, suite, "cost")]).value
        for results in rows
    ]
    dense = {results.row.model: speed for results, speed in zip(rows, found, strict=True) if not results.row.ratio}
    return [_Speed(speed, speed / dense[results.row.model]) for results, speed in zip(rows, found, strict=True)]


def loss_difference(results: RowResults, reference: RowResults, suite: str, corpus: str) -> Difference:
    """The paired difference of one row and its reference on one corpus; a row's seeds are averaged first.

    Windows count by their scored tokens, as in the perplexity: with a stride below the length the first of a corpus
    has more than the others.

    Raises:
        RankwiseError: an evaluation is missing, or they were made on different windows.
    """

    def losses(row: RowResults) -> _Scores:
        found = [evaluation["corpora"][corpus] for evaluation in shared.evaluations_of(row, suite, "perplexity")]
        scored = [(result["window_nll"], result["tokens_sha256"]) for result in found]
        return _over_seeds(row, scored, corpus, found[0]["window_tokens"])

    return _paired(results, reference, losses(results), losses(reference), corpus)


def task_differences(results: RowResults, reference: RowResults, suite: str) -> dict[str, Difference]:
    """The paired difference of one row and its reference in the accuracy of each task of a suite, percentage points.

    Raises:
        RankwiseError: an evaluation is missing, or they were made on different documents.
    """

    scored = {task: _scored(results, reference, suite, task) for task in _tasks(reference, suite)}
    return {task: _paired(results, reference, *pair, task) for task, pair in scored.items()}


def average_difference(results: RowResults, reference: RowResults, suite: str) -> Difference:
    """The paired difference of one row and its reference in the mean accuracy of a suite's tasks, percentage points.

    Tasks are independent, so the error of the mean of `T` differences is `sqrt(sum_t se_t^2) / T`; a row's seeds are
    not, each makes one checkpoint for all tasks, so that the spread is that of the means.

    Raises:
        RankwiseError: an evaluation is missing, or they were made on different documents.
    """
    pairs = {task: _scored(results, reference, suite, task) for task in _tasks(reference, suite)}
    alone = [
        _paired(results, reference, ours.without_seeds(), theirs.without_seeds(), task)
        for task, (ours, theirs) in pairs.items()
    ]
    errors = [difference.stderr for difference in alone if difference.stderr is not None]
    sides = () if results is reference else (0, 1)
    seeds = [seeds_error(np.mean([pair[side].of_seeds for pair in pairs.values()], axis=0)) for side in sides]
    return Difference(
        math.fsum(difference.value for difference in alone) / len(alone),
        math.hypot(math.hypot(*errors) / len(alone), *seeds) if len(errors) == len(alone) else None,
    )


def seeds_error(of_seeds: np.ndarray) -> float:
    """The standard error of a mean over seeds, whose spread the windows or documents do not know of; 0 with one."""
    return float(of_seeds.std(ddof=1)) / math.sqrt(len(of_seeds)) if len(of_seeds) > 1 else 0.0


@dataclass(frozen=True)
class _Scores:
    """What one row scored on one text or task.

    Attributes:
        values: mean over seeds for each window or document.
        weights: how much each counts, 1 on average.
        tested: hash of what was tested.
        of_seeds: mean of each seed.
    """

    values: np.ndarray
    weights: np.ndarray
    tested: str
    of_seeds: np.ndarray

    def without_seeds(self) -> _Scores:
        """The same, as if there were one seed."""
        return replace(self, of_seeds=self.of_seeds.mean(keepdims=True))


def _tasks(reference: RowResults, suite: str) -> Iterable[str]:
    tasks: dict[str, Any] = shared.evaluations_of(reference, suite, "zero-shot")[0]["tasks"]
    return tasks


def _scored(results: RowResults, reference: RowResults, suite: str, task: str) -> tuple[_Scores, _Scores]:
    """The percent that a row and its reference have right, by document."""

    def scores(row: RowResults) -> _Scores:
        found = [evaluation["tasks"][task] for evaluation in shared.evaluations_of(row, suite, "zero-shot")]
        points = [([100 * score for score in part["scores"]], part["documents_sha256"]) for part in found]
        return _over_seeds(row, points, task)

    return scores(results), scores(reference)


def _references(rows: Sequence[RowResults], of: Literal["first", "dense"]) -> list[RowResults]:
    """What each row is compared with: the first of its model and ratio, or its dense model."""
    first: dict[tuple[str, int], RowResults] = {}
    for results in rows:
        first.setdefault((results.row.model, results.row.ratio), results)
    return [first[results.row.model, 0 if of == "dense" else results.row.ratio] for results in rows]


def _over_seeds(
    results: RowResults, found: Sequence[tuple[Sequence[float], str]], name: str, counts: Sequence[int] = ()
) -> _Scores:
    """Scores with the hash of what was tested, one pair a seed, averaged; `counts` of tokens, where these differ."""
    hashes = {tested for _, tested in found}
    if len(hashes) > 1:
        raise RankwiseError(f"{results.place}: its seeds were scored on different parts of '{name}'; run again.")
    scores = np.array([values for values, _ in found], dtype=float)
    weights = np.array(counts or np.ones(scores.shape[1]), dtype=float)
    weights /= weights.mean()
    return _Scores(scores.mean(axis=0), weights, hashes.pop(), (scores * weights).mean(axis=1))


def _paired(
    results: RowResults,
    reference: RowResults,
    ours: _Scores,
    theirs: _Scores,
    name: str,
) -> Difference:
    """The mean of the differences, and its standard error: that of a ratio of sums, where weights differ."""
    if ours.tested != theirs.tested:
        raise RankwiseError(
            f"{results.place}: '{name}' was scored on other texts than for '{reference.row.title}', with which it is "
            "compared, so that no differences can be taken. Rows of different tokenizers cannot be compared; else "
            "delete the older evaluation and run the workflow again."
        )
    difference, count = ours.values - theirs.values, len(ours.values)
    value = float((ours.weights * difference).mean())
    if count < 2 or results is reference:
        return Difference(value, None if count < 2 else 0.0)
    spread = math.sqrt(((ours.weights * (difference - value)) ** 2).sum() / (count - 1) / count)
    return Difference(value, math.hypot(spread, seeds_error(ours.of_seeds), seeds_error(theirs.of_seeds)))


def _text(results: RowResults, reference: RowResults, difference: Difference, digits: int, alone: bool) -> str:
    if results is reference:
        return MISSING if alone else "reference"
    text = shared.estimate_text(difference.value, difference.stderr, digits)
    return f"{text} *" if difference.clear else text

"""Tables of accuracy and perplexity, methods by tasks (Tables 1 to 6 and 10 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lowrank.config.outputs import RowTable
from lowrank.config.published import Published, single_values
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.best import best_row, no_better_than_a_guess
from lowrank.paper.tables.data import MISSING, Cell, Column, Context, Line, RowResults, TableData
from lowrank.paper.tables.measures import (
    ANSWER_COUNTS,
    PERPLEXITY,
    TASK_TITLES,
    Measure,
    comparable_average,
    in_order,
    match_corpora,
    measures_of,
    without_lone_averages,
)
from lowrank.paper.tables.predictions import NOTE as PREDICTION_NOTE
from lowrank.paper.tables.predictions import loss_rises
from lowrank.paper.tables.rows import Estimate

BLIND = "†"
BLIND_NOTE = (
    f"{BLIND}: not above, by two standard errors, a guess that gives each answer as often as the model does, without "
    "reading; the CSV has its accuracy (…_blind) and, whatever the preference for one answer, the area under the ROC "
    "curve (…_auc, 50 for a guess)."
)
BEST_RULE = (
    "the best compressed value of a model and ratio, where it is better than each other by more than two standard "
    "errors of their difference (of the same windows or documents, paired) and better than a guess; else none"
)
BOLD_NOTE = f"Bold: {BEST_RULE}."
BEST = "best"
"""CSV column: the columns in which a line has the best value by that rule, separated by spaces."""
LEEWAY = 1.0
"""Points above the target up to which a row that keeps more competes for the best value: coarse ranks leave some."""


@dataclass(frozen=True)
class Beside:
    """Published values in the columns of a table.

    Attributes:
        rows: number of a row -> what is published of it.
        values: number of a row -> CSV column -> value.
        corpora: published column -> CSV column of ours that it stands under.
        alone: published perplexities of texts that are none of ours; they have columns of their own.
    """

    rows: dict[int, Published]
    values: dict[int, dict[str, float | None]]
    corpora: dict[str, str]
    alone: list[str]


def build_accuracy(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of zero-shot accuracy (percent) and perplexity.

    Raises:
        RankwiseError: results are missing or of another row, a method missed its ratio, or a published row is unknown.
    """
    measures = measures_of(context, table.tasks)
    beside = _beside(rows, measures, context)
    estimates = [{measure.key: _estimate(measure, results) for measure in measures} for results in rows]
    kept = [shared.kept_percent(results) for results in rows]
    rises = loss_rises(rows, measures)
    ample = [i for i, found in enumerate(kept) if found.value > 100 - rows[i].row.ratio + LEEWAY]
    blind = {(i, m.key) for i, row in enumerate(rows) for m in measures if _is_blind(row, m, estimates[i][m.key])}
    guesses = blind | _guesses(rows, measures, estimates, context)
    best = _best(rows, measures, estimates, ample, guesses)
    shown = without_lone_averages(measures)
    lines: list[Line] = []
    records: list[dict[str, Any]] = []
    for index, (results, starts_block) in enumerate(shared.block_starts(rows)):
        texts = [*shared.leading_texts(rows, results), f"{kept[index].value:.1f}"]
        cells = [
            Cell(
                shared.estimate_text(estimates[index][m.key].value, estimates[index][m.key].stderr, m.digits)
                + f" {BLIND}" * ((index, m.key) in blind),
                best=(index, m.key) in best,
            )
            for m in shown
        ]
        missing = [Cell(MISSING)] * len(beside.alone)
        lines.append(Line((*map(Cell, texts), *cells, *missing), starts_block=starts_block))
        start = shared.record_start(results, index)
        found = {BEST: " ".join(m.key for m in measures if (index, m.key) in best)} | rises[index]
        records.append(start | _record(results, kept[index], measures, estimates[index], found))
        if index in beside.rows:
            lines.append(_published_line(rows, index, shown, beside))
            start = shared.published_record(beside.rows[index], index)
            keys = [*(m.key for m in measures), *map(_perplexity_key, beside.alone)]
            records.append(start | {key: beside.values[index].get(key) for key in keys})
    leading = shared.leading_columns(rows)
    predicts = any(rises) and any(measure.kind == "perplexity" for measure in measures)
    return TableData(
        title=table.title,
        notes=_notes(rows, context, beside, _ample_notes(rows, ample), _blind_notes(rows, measures, blind), predicts),
        frame=shared.frame_of(records),
        columns=(
            *leading,
            Column("Kept (%)"),
            *(Column(m.title, group=m.group) for m in shown),
            *(Column(name, group=f"{PERPLEXITY}, published only") for name in beside.alone),
        ),
        lines=tuple(lines),
        heading=len(leading),
        warning=_warning(context),
    )


def _beside(rows: Sequence[RowResults], measures: Sequence[Measure], context: Context) -> Beside:
    found = {
        index: published
        for index, results in enumerate(rows)
        if (published := shared.published_of(results, context)) is not None
    }
    printed = {index: single_values(published, f"{rows[index].place}.published") for index, published in found.items()}
    corpora, alone = match_corpora(measures, [name for values in printed.values() for name in values])
    if not any(measure.kind == "perplexity" for measure in measures):
        alone = []  # the table is not about perplexity
    keys = {name: name for values in printed.values() for name in values}
    keys |= {name: _perplexity_key(name) for name in alone} | corpora
    values = {
        index: {
            keys[name]: value for name, value in row.items() if name != "average" or comparable_average(row, context)
        }
        for index, row in printed.items()
    }
    return Beside(found, values, corpora, alone)


def _perplexity_key(corpus: str) -> str:
    return f"{corpus}_perplexity"


def _published_line(rows: Sequence[RowResults], index: int, measures: Sequence[Measure], beside: Beside) -> Line:
    values = beside.values[index]
    texts = [*shared.published_texts(rows, beside.rows[index]), ""]
    cells = [_published_text(values.get(m.key), m.digits) for m in measures]
    cells += [_published_text(values.get(_perplexity_key(name)), 2) for name in beside.alone]
    return Line((*map(Cell, texts), *map(Cell, cells)), source="published")


def _estimate(measure: Measure, results: RowResults) -> Estimate:
    pairs = [measure.read(e) for e in shared.evaluations_of(results, measure.suite, measure.kind)]
    return shared.over_seeds([value for value, _ in pairs], [stderr for _, stderr in pairs])


def _is_blind(results: RowResults, measure: Measure, estimate: Estimate) -> bool:
    """Whether an accuracy is not above that of a guess at the same shares of answers, by two standard errors.

    The error is that of a guess. Seeds share the documents: their mean is taken, as for an accuracy's error.
    """
    details = [measure.details(e) for e in shared.evaluations_of(results, measure.suite, measure.kind)]
    bounds = [found["blind"] + 2 * found.get("blind_stderr", 0.0) for found in details if "blind" in found]
    return bool(bounds) and estimate.value <= fmean(bounds)


def _guesses(
    rows: Sequence[RowResults], measures: Sequence[Measure], estimates: Sequence[dict[str, Estimate]], context: Context
) -> set[tuple[int, str]]:
    sizes = {name: shape.vocabulary for name, shape in context.shapes.items()}
    return {
        (index, measure.key)
        for index, results in enumerate(rows)
        for measure in measures
        if no_better_than_a_guess(estimates[index][measure.key], measure, sizes.get(results.row.model))
    }


def _best(
    rows: Sequence[RowResults],
    measures: Sequence[Measure],
    estimates: Sequence[dict[str, Estimate]],
    ample: Sequence[int],
    guesses: set[tuple[int, str]],
) -> set[tuple[int, str]]:
    """(row, column) of the value that stands out among the compressed rows of one model and ratio.

    Rows that keep too much (`ample`) win by what they keep, not by their method, so they are no candidates.
    """
    best = set()
    comparable = [i for i in range(len(rows)) if i not in ample]
    for block in {(results.row.model, results.row.ratio) for results in rows if results.row.ratio}:
        members = [i for i in comparable if (rows[i].row.model, rows[i].row.ratio) == block]
        for measure in measures:
            values = {index: estimates[index][measure.key] for index in members}
            found = best_row(rows, measure, values, {index: (index, measure.key) in guesses for index in members})
            if found is not None:
                best.add((found, measure.key))
    return best


def _record(
    results: RowResults,
    kept: Estimate,
    measures: Sequence[Measure],
    estimates: dict[str, Estimate],
    found: dict[str, Any],
) -> dict[str, Any]:
    """The values of a CSV line: accuracies and standard errors in percent, perplexities as they are, then `found`."""
    record: dict[str, Any] = {"kept_percent": kept.value}
    for measure in measures:
        estimate = estimates[measure.key]
        evaluations = shared.evaluations_of(results, measure.suite, measure.kind)
        record |= {measure.key: estimate.value, f"{measure.key}_stderr": estimate.stderr}
        if estimate.sd_over_seeds is not None:
            record[f"{measure.key}_sd_over_seeds"] = estimate.sd_over_seeds
        details = [measure.details(evaluation) for evaluation in evaluations]
        means = {name: fmean(d[name] for d in details) for name in ANSWER_COUNTS if all(name in d for d in details)}
        record |= {f"{measure.key}_{suffix}": value for suffix, value in (details[0] | means).items()}
    record["seeds"] = max(map(len, results.evaluations.values()))
    return record | found | shared.evidence_record(results)


def _published_text(value: float | None, digits: int) -> str:
    return MISSING if value is None else shared.number_text(value, digits)


def _notes(
    rows: Sequence[RowResults],
    context: Context,
    beside: Beside,
    ample_notes: Sequence[str],
    blind_notes: Sequence[str],
    predicts: bool,
) -> tuple[str, ...]:
    zero_shot = {name: s for name, s in context.suites.items() if isinstance(s, ZeroShotSuite)}
    return (
        *shared.model_note(rows),
        "Removed: target, in percent of the decoder's linear weights; kept: what the checkpoint holds of them. "
        "± is the standard error from the finite test set.",
        BOLD_NOTE,
        *ample_notes,
        *(_metric_note(suite) for suite in zero_shot.values()),
        *blind_notes,
        *(_protocol_note(suite) for suite in context.suites.values() if isinstance(suite, PerplexitySuite)),
        *([PREDICTION_NOTE] if predicts else []),
        *shared.seeds_note(rows),
        *(["The columns …_sd_over_seeds of the CSV hold the spread between seeds."] * (shared.most_seeds(rows) > 1)),
        *shared.published_notes(rows, context),
        *_corpus_notes(beside),
    )


def _ample_notes(rows: Sequence[RowResults], ample: Sequence[int]) -> list[str]:
    """Which rows are not compared with their neighbours, and why."""
    several = shared.several_models(rows)
    named = [f"{rows[i].row.title} at {rows[i].row.ratio} %" + f" ({rows[i].row.model})" * several for i in ample]
    told = f"No value in bold for rows that keep more than a point above the target: {', '.join(named)}."
    return [told] * bool(named)


def _blind_notes(rows: Sequence[RowResults], measures: Sequence[Measure], blind: set[tuple[int, str]]) -> list[str]:
    """What the mark means, and where not even the dense model is above a guess."""
    useless = [
        f"{rows[index].row.model} on {measure.title}"
        for measure in measures
        for index in range(len(rows))
        if (index, measure.key) in blind and rows[index].row.ratio == 0
    ]
    told = (
        f"Not above such a guess are dense models themselves ({', '.join(useless)}): what compression costs hardly "
        "shows there."
    )
    return [BLIND_NOTE] * bool(blind) + [told] * bool(useless)


def _corpus_notes(beside: Beside) -> list[str]:
    """Says which published perplexity stands where: the texts and windows behind it are not ours."""
    notes = []
    if beside.corpora:
        pairs = ", ".join(f"{name} under {key.removesuffix('_perplexity')}" for name, key in beside.corpora.items())
        notes.append(
            f"Published perplexities stand under our corpus of that name: {pairs}; text and windows may differ."
        )
    if beside.alone:
        notes.append(f"No single corpus of ours answers to the published {', '.join(beside.alone)}.")
    return notes


def _warning(context: Context) -> str:
    limits = [
        f"first {suite.limit} documents per task"
        for suite in context.suites.values()
        if isinstance(suite, ZeroShotSuite) and suite.limit is not None
    ]
    return shared.smoke_warning(context.smoke or bool(limits), limits)


def _metric_note(suite: ZeroShotSuite) -> str:
    """Which metric of lm-eval each task shows; the average, if there is one, is over just these."""
    by_metric = {
        metric: [TASK_TITLES.get(task, task) for task in in_order(suite.tasks) if suite.tasks[task] == metric]
        for metric in ("acc", "acc_norm")
    }
    parts = [f"{metric} for {', '.join(tasks)}" for metric, tasks in by_metric.items() if tasks]
    parts += ["average: their plain mean"] * (len(suite.tasks) > 1)
    return f"Zero-shot accuracy by lm-eval: {'; '.join(parts)}."


def _protocol_note(suite: PerplexitySuite) -> str:
    windows = "all windows" if suite.windows is None else f"the first {suite.windows} windows"
    stride = "" if suite.stride in (None, suite.length) else f", stride {suite.stride}"
    return f"Token perplexity (lower is better) over {windows} of {suite.length} tokens{stride} of each corpus."

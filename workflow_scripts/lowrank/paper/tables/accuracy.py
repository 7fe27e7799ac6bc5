"""Tables of accuracy and perplexity, methods by tasks (Tables 1, 5 and 6 of the paper)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.paper.published import Published
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import MISSING, Cell, Column, Context, Json, Line, RowResults, TableData
from lowrank.paper.tables.rows import Estimate

TASK_TITLES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaS.",
    "winogrande": "WinoG.",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
ACCURACY = "Zero-shot accuracy (%)"
PERPLEXITY = "Perplexity"


@dataclass(frozen=True)
class Measure:
    """One column of results.

    Attributes:
        key: name of the CSV column; published files use the same names.
        title, group: heading.
        suite, kind: the evaluation that holds it.
        read: evaluation -> (value, standard error) in the unit of the table.
        details: evaluation -> further CSV columns (suffix -> value), e.g. how many documents were scored.
        lower_is_better: for perplexity.
    """

    key: str
    title: str
    group: str
    suite: str
    kind: str
    read: Callable[[Json], tuple[float, float | None]]
    details: Callable[[Json], Json]
    lower_is_better: bool = False

    @property
    def digits(self) -> int:
        """Decimals that are shown."""
        return 2 if self.lower_is_better else 1


def build_accuracy(title: str, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of zero-shot accuracy (percent) and perplexity.

    Raises:
        RankwiseError: results are missing or of another row, a method missed its ratio, or a published row is unknown.
    """
    measures = measures_of(context)
    estimates = [{measure.key: _estimate(measure, results) for measure in measures} for results in rows]
    kept = [shared.kept_percent(results) for results in rows]
    best = _best(rows, measures, estimates)
    lines: list[Line] = []
    records: list[dict[str, Any]] = []
    for index, (results, starts_block) in enumerate(shared.block_starts(rows)):
        texts = [*shared.leading_texts(rows, results), f"{kept[index].value:.1f}"]
        cells = [
            Cell(
                shared.estimate_text(estimates[index][m.key].value, estimates[index][m.key].stderr, m.digits),
                best=(index, m.key) in best,
            )
            for m in measures
        ]
        lines.append(Line((*map(Cell, texts), *cells), starts_block=starts_block))
        records.append(_record(results, kept[index], measures, estimates[index]))
        published = shared.published_of(results, context)
        if published is not None:
            values = _comparable(shared.single_values(published, results.place), context)
            texts = [*shared.published_texts(rows, published), ""]
            cells = [Cell(_published_text(values.get(m.key), m.digits)) for m in measures]
            lines.append(Line((*map(Cell, texts), *cells), source="published"))
            records.append(_published_record(published, measures, values))
    leading = shared.leading_columns(rows)
    return TableData(
        title=title,
        notes=_notes(rows, context),
        frame=shared.frame_of(records),
        columns=(*leading, Column("Kept (%)"), *(Column(m.title, group=m.group) for m in measures)),
        lines=tuple(lines),
        heading=len(leading),
        warning=_warning(context),
    )


def measures_of(context: Context) -> list[Measure]:
    """The columns of results, suite by suite; a name that two suites share is preceded by its suite."""
    measures: list[Measure] = []
    for name, suite in context.suites.items():
        if isinstance(suite, ZeroShotSuite):
            measures += [_task_measure(name, task) for task in suite.tasks]
            measures.append(_average_measure(name))
        elif isinstance(suite, PerplexitySuite):
            measures += [_corpus_measure(name, corpus) for corpus in suite.corpora]
    counts = Counter(measure.key for measure in measures)
    return [
        measure
        if counts[measure.key] == 1
        else Measure(
            **{**vars(measure), "key": f"{measure.suite}.{measure.key}", "group": f"{measure.group}: {measure.suite}"}
        )
        for measure in measures
    ]


def _task_measure(suite: str, task: str) -> Measure:
    def read(evaluation: Json) -> tuple[float, float]:
        result = _part(evaluation, "tasks", task)
        return _percent(result[result["metric"]]), _percent(result[f"{result['metric']}_stderr"])

    def details(evaluation: Json) -> Json:
        result = evaluation["tasks"][task]
        return {"metric": result["metric"], "documents": result["documents"], "documents_of": result["of"]}

    return Measure(task, TASK_TITLES.get(task, task), ACCURACY, suite, "zero-shot", read, details)


def _average_measure(suite: str) -> Measure:
    def read(evaluation: Json) -> tuple[float, float]:
        return _percent(evaluation["average"]), _percent(evaluation["average_stderr"])

    return Measure("average", "Average", ACCURACY, suite, "zero-shot", read, lambda evaluation: {})


def _corpus_measure(suite: str, corpus: str) -> Measure:
    def read(evaluation: Json) -> tuple[float, float | None]:
        result = _part(evaluation, "corpora", corpus)
        return result["perplexity"], result["stderr"]

    def details(evaluation: Json) -> Json:
        result = evaluation["corpora"][corpus]
        return {"tokens": result["tokens"], "windows": result["windows"]}

    key = f"{corpus}_perplexity"
    return Measure(key, corpus, PERPLEXITY, suite, "perplexity", read, details, lower_is_better=True)


def _percent(share: float) -> float:
    """Percent, without the last digits that only the multiplication would add."""
    return round(100 * share, 10)


def _part(evaluation: Json, section: str, name: str) -> Json:
    if name not in evaluation[section]:
        raise RankwiseError(
            f"an evaluation of {evaluation['subject']} lacks '{name}' in `{section}`; delete it and run again."
        )
    part: Json = evaluation[section][name]
    return part


def _estimate(measure: Measure, results: RowResults) -> Estimate:
    pairs = [measure.read(e) for e in shared.evaluations_of(results, measure.suite, measure.kind)]
    return shared.over_seeds([value for value, _ in pairs], [stderr for _, stderr in pairs])


def _best(
    rows: Sequence[RowResults], measures: Sequence[Measure], estimates: Sequence[dict[str, Estimate]]
) -> set[tuple[int, str]]:
    """(row, column) of the best value among the compressed rows of one model and ratio, if there is a choice."""
    best = set()
    for block in {(results.row.model, results.row.ratio) for results in rows}:
        members = [i for i, results in enumerate(rows) if (results.row.model, results.row.ratio) == block]
        if block[1] == 0 or len(members) < 2:
            continue
        for measure in measures:
            values = {index: estimates[index][measure.key].value for index in members}
            target = min(values.values()) if measure.lower_is_better else max(values.values())
            best |= {(index, measure.key) for index, value in values.items() if value == target}
    return best


def _record(
    results: RowResults, kept: Estimate, measures: Sequence[Measure], estimates: dict[str, Estimate]
) -> dict[str, Any]:
    """A line of the CSV: accuracies and standard errors in percent, perplexities as they are."""
    record = shared.record_start(results) | {"kept_percent": kept.value}
    for measure in measures:
        estimate = estimates[measure.key]
        evaluations = shared.evaluations_of(results, measure.suite, measure.kind)
        record |= {measure.key: estimate.value, f"{measure.key}_stderr": estimate.stderr}
        if estimate.sd_over_seeds is not None:
            record[f"{measure.key}_sd_over_seeds"] = estimate.sd_over_seeds
        record |= {f"{measure.key}_{suffix}": value for suffix, value in measure.details(evaluations[0]).items()}
    record["seeds"] = max(len(found) for found in results.evaluations.values())
    return record | shared.evidence_record(results)


def _published_record(
    published: Published, measures: Sequence[Measure], values: dict[str, float | None]
) -> dict[str, Any]:
    return shared.published_record(published) | {m.key: values.get(m.key) for m in measures}


def _comparable(values: dict[str, float | None], context: Context) -> dict[str, float | None]:
    """Published values under the names of our columns; an average only where it is over the same tasks."""
    shown = [set(suite.tasks) for suite in context.suites.values() if isinstance(suite, ZeroShotSuite)]
    # A file that prints only the average (an ablation) means the paper's seven tasks.
    printed = set(values) & set(TASK_TITLES).union(*shown) or set(TASK_TITLES)
    comparable = dict(values)
    if any(printed != tasks for tasks in shown):
        comparable.pop("average", None)
    return comparable | {f"{name}_perplexity": value for name, value in values.items()}


def _published_text(value: float | None, digits: int) -> str:
    return MISSING if value is None else shared.number_text(value, digits)


def _notes(rows: Sequence[RowResults], context: Context) -> tuple[str, ...]:
    zero_shot = {name: s for name, s in context.suites.items() if isinstance(s, ZeroShotSuite)}
    return (
        *shared.model_note(rows),
        "Removed: target, in percent of the decoder's linear weights; kept: what the checkpoint holds of them. "
        "Best compressed value of each model and ratio in bold; ± is the standard error from the finite test set.",
        *(_metric_note(suite) for suite in zero_shot.values()),
        *(_protocol_note(suite) for suite in context.suites.values() if isinstance(suite, PerplexitySuite)),
        *shared.seeds_note(rows),
        *(["The columns …_sd_over_seeds of the CSV hold the spread between seeds."] * (shared.most_seeds(rows) > 1)),
        *shared.published_notes(rows, context),
    )


def _warning(context: Context) -> str:
    limits = [
        f"first {suite.limit} documents per task"
        for suite in context.suites.values()
        if isinstance(suite, ZeroShotSuite) and suite.limit is not None
    ]
    return shared.smoke_warning(context.smoke or bool(limits), limits)


def _metric_note(suite: ZeroShotSuite) -> str:
    """Which metric of lm-eval each task shows; the average is over just these."""
    by_metric = {
        metric: [TASK_TITLES.get(task, task) for task, chosen in suite.tasks.items() if chosen == metric]
        for metric in ("acc", "acc_norm")
    }
    parts = [f"{metric} for {', '.join(tasks)}" for metric, tasks in by_metric.items() if tasks]
    return f"Zero-shot accuracy by lm-eval: {'; '.join(parts)}; average: their plain mean."


def _protocol_note(suite: PerplexitySuite) -> str:
    windows = "all windows" if suite.windows is None else f"the first {suite.windows} windows"
    stride = "" if suite.stride in (None, suite.length) else f", stride {suite.stride}"
    return f"Token perplexity (lower is better) over {windows} of {suite.length} tokens{stride} of each corpus."

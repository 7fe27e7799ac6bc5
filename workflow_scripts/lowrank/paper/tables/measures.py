"""The columns of results of a table of accuracy: what each reads, and which published value belongs under it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.paper.tables.data import Context, Json

TASK_TITLES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaS.",
    "winogrande": "WinoG.",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
CHANCE = {
    "boolq": 50.0,
    "piqa": 50.0,
    "hellaswag": 25.0,
    "winogrande": 50.0,
    "arc_easy": 25.0,
    "arc_challenge": 25.0,
    "openbookqa": 25.0,
}
"""Percent that a guess among a task's answers gets; a few documents of ARC offer three or five instead of four."""
ACCURACY = "Zero-shot accuracy (%)"
PERPLEXITY = "Perplexity"
ANSWER_COUNTS = ("blind", "blind_stderr", "auc")
"""Of an accuracy where all documents share their answers, see `evaluation.answers`."""
PAPER_CORPORA = ("wikitext", "ptb", "c4")
"""Columns of published files that hold perplexities."""


@dataclass(frozen=True)
class Measure:
    """One column of results.

    Attributes:
        key: name of the CSV column; published files use the same names.
        title, group: heading; the title of a perplexity is the name of its corpus.
        suite, kind: the evaluation that holds it.
        read: evaluation -> (value, standard error) in the unit of the table.
        details: evaluation -> further CSV columns (suffix -> value), e.g. how many documents were scored.
        tested: evaluation -> the hash of the windows or documents behind the value.
        part: the task or corpus; empty for the mean of all tasks.
        chance: percent that a guess gets, where it is known.
        lower_is_better: for perplexity.
        shares_title: whether another suite has a column of this title.
    """

    key: str
    title: str
    group: str
    suite: str
    kind: str
    read: Callable[[Json], tuple[float, float | None]]
    details: Callable[[Json], Json]
    tested: Callable[[Json], str]
    part: str = ""
    chance: float | None = None
    lower_is_better: bool = False
    shares_title: bool = False

    @property
    def name(self) -> str:
        """The title, with the suite where another has a column of this title too."""
        return f"{self.title} ({self.suite})" if self.shares_title else self.title

    @property
    def digits(self) -> int:
        """Decimals that are shown."""
        return 2 if self.lower_is_better else 1


def measures_of(context: Context, tasks: Literal["each", "mean"] = "each") -> list[Measure]:
    """The columns of results, perplexities before tasks; a name that two suites share is preceded by its suite.

    Args:
        context: its suites.
        tasks: a column for each zero-shot task and their mean, or only the mean.
    """
    measures: list[Measure] = []
    for name, suite in context.suites.items():
        if isinstance(suite, ZeroShotSuite):
            measures += [_task_measure(name, task) for task in (in_order(suite.tasks) if tasks == "each" else ())]
            measures.append(_average_measure(name, suite))
        elif isinstance(suite, PerplexitySuite):
            measures += [_corpus_measure(name, corpus) for corpus in suite.corpora]
    measures.sort(key=lambda measure: measure.kind != "perplexity")
    counts = Counter(measure.key for measure in measures)
    return [
        measure
        if counts[measure.key] == 1
        else replace(
            measure,
            key=f"{measure.suite}.{measure.key}",
            group=f"{measure.group}: {measure.suite}",
            shares_title=True,
        )
        for measure in measures
    ]


def without_lone_averages(measures: Sequence[Measure]) -> list[Measure]:
    """What a table shows: an average of one task would only repeat it."""
    columns = Counter(measure.suite for measure in measures if measure.kind == "zero-shot")
    return [measure for measure in measures if measure.part or columns[measure.suite] != 2]


def in_order(tasks: Iterable[str]) -> list[str]:
    """The paper's tasks in the paper's order, then others by name; the order of keys in a config means nothing."""
    known = list(TASK_TITLES)
    return sorted(tasks, key=lambda task: (known.index(task) if task in known else len(known), task))


def match_corpora(measures: Sequence[Measure], columns: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Decide under which of our perplexities the published ones stand.

    A published column belongs to the corpus of that name, or whose name goes on after it with `-`, `_` or `.`:
    `wikitext` to `wikitext-test`, but not to `wikitext103`. Where several of our columns answer to it, or none, it
    keeps a column of its own: numbers of different texts are never mixed.

    Args:
        measures: columns of a table.
        columns: columns of published files, of any kind.

    Returns:
        Published column -> key of our column; and the published perplexities that have none of ours.
    """
    accuracies = {*TASK_TITLES, "average", *(measure.key for measure in measures if measure.kind == "zero-shot")}
    names = [name for name in dict.fromkeys(columns) if name not in accuracies]
    owners: dict[str, list[str]] = {}
    for measure in measures:
        if measure.kind == "perplexity":
            fitting = [name for name in names if re.fullmatch(rf"{re.escape(name)}([-_.].*)?", measure.title)]
            if fitting:
                owners.setdefault(max(fitting, key=len), []).append(measure.key)
    placed = {name: keys[0] for name, keys in owners.items() if len(keys) == 1}
    return placed, [name for name in names if name not in placed and (name in owners or name in PAPER_CORPORA)]


def comparable_average(values: Mapping[str, float | None], context: Context) -> bool:
    """Whether a published average is over the tasks that this table averages."""
    shown = [set(suite.tasks) for suite in context.suites.values() if isinstance(suite, ZeroShotSuite)]
    # A file that prints only the average (an ablation) means the paper's seven tasks.
    printed = set(values) & set(TASK_TITLES).union(*shown) or set(TASK_TITLES)
    return all(printed == tasks for tasks in shown)


def _task_measure(suite: str, task: str) -> Measure:
    def read(evaluation: Json) -> tuple[float, float]:
        result = _part(evaluation, "tasks", task)
        return _percent(result[result["metric"]]), _percent(result[f"{result['metric']}_stderr"])

    def details(evaluation: Json) -> Json:
        result = evaluation["tasks"][task]
        counts = {"metric": result["metric"], "documents": result["documents"], "documents_of": result["of"]}
        return counts | {name: _percent(result[name]) for name in ANSWER_COUNTS if name in result}

    def tested(evaluation: Json) -> str:
        return str(evaluation["tasks"][task]["documents_sha256"])

    title, chance = TASK_TITLES.get(task, task), CHANCE.get(task)
    return Measure(task, title, ACCURACY, suite, "zero-shot", read, details, tested, part=task, chance=chance)


def _average_measure(name: str, suite: ZeroShotSuite) -> Measure:
    def read(evaluation: Json) -> tuple[float, float]:
        return _percent(evaluation["average"]), _percent(evaluation["average_stderr"])

    def tested(evaluation: Json) -> str:
        return " ".join(result["documents_sha256"] for _, result in sorted(evaluation["tasks"].items()))

    chances = [CHANCE.get(task) for task in suite.tasks]
    known = [chance for chance in chances if chance is not None]
    chance = fmean(known) if known and len(known) == len(chances) else None
    return Measure(
        "average", "Average", ACCURACY, name, "zero-shot", read, lambda evaluation: {}, tested, chance=chance
    )


def _corpus_measure(suite: str, corpus: str) -> Measure:
    def read(evaluation: Json) -> tuple[float, float | None]:
        result = _part(evaluation, "corpora", corpus)
        return result["perplexity"], result["stderr"]

    def details(evaluation: Json) -> Json:
        result = evaluation["corpora"][corpus]
        return {"tokens": result["tokens"], "windows": result["windows"]}

    def tested(evaluation: Json) -> str:
        return str(evaluation["corpora"][corpus]["tokens_sha256"])

    key = f"{corpus}_perplexity"
    return Measure(
        key, corpus, PERPLEXITY, suite, "perplexity", read, details, tested, part=corpus, lower_is_better=True
    )


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

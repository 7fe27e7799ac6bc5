"""Tables of generations: how each row's model goes on after a prompt (Table 9 of the paper)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.config.outputs import RowTable
from lowrank.config.suites import GenerationSuite
from lowrank.errors import RankwiseError
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import Cell, Column, Context, Grid, Json, Line, RowResults, TableData

NOTHING = "(ends at once)"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a suite, and how each row goes on: its first evaluation, and the entry of the prompt in it."""

    text: str
    suite: str
    found: Sequence[tuple[Json, Json]]


def build_generations(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of texts: a block a prompt, in it a line a row; in HTML a line a prompt and a column a row.

    Raises:
        RankwiseError: results are missing, of another row, or of other prompts, or a method missed its ratio.
    """
    prompts = [prompt for name in context.suites for prompt in _prompts(name, rows, context)]
    leading = shared.leading_columns(rows)
    lines, records = [], []
    for prompt in prompts:
        for number, (results, (evaluation, entry)) in enumerate(zip(rows, prompt.found, strict=True)):
            texts = (prompt.text if number == 0 else "", *shared.leading_texts(rows, results), _shown(entry))
            lines.append(Line(tuple(map(Cell, texts)), starts_block=number == 0 and prompt is not prompts[0]))
            records.append(_record(results, number, prompt, evaluation, entry))
    return TableData(
        title=table.title,
        notes=_notes(rows, context),
        frame=shared.frame_of(records),
        columns=(Column("Prompt", "text"), *leading, Column("Continuation", "text")),
        lines=tuple(lines),
        heading=1 + len(leading),
        warning=shared.smoke_warning(context.smoke),
        page=_side_by_side(rows, prompts),
    )


def one_kind_of_line_end(text: str) -> str:
    """Text whose lines end with a newline only: readers of CSV do not agree on any other end."""
    return re.sub(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]", "\n", text)


def _prompts(suite: str, rows: Sequence[RowResults], context: Context) -> list[Prompt]:
    settings = context.suites[suite]
    assert isinstance(settings, GenerationSuite)
    evaluations = [shared.evaluations_of(results, suite, "generation")[0] for results in rows]
    for results, evaluation in zip(rows, evaluations, strict=True):
        shared.kept_percent(results)  # refuses a row that missed its ratio
        if [entry["prompt"] for entry in evaluation["completions"]] != settings.prompts:
            raise RankwiseError(
                f"{results.place}: the evaluation '{suite}' is of other prompts. Delete it and run the workflow again."
            )
    return [
        Prompt(text, suite, [(evaluation, evaluation["completions"][index]) for evaluation in evaluations])
        for index, text in enumerate(settings.prompts)
    ]


def _shown(entry: Json) -> str:
    """The continuation without space around it, or that there is none."""
    return one_kind_of_line_end(entry["completion"]).strip() or NOTHING


def _record(results: RowResults, number: int, prompt: Prompt, evaluation: Json, entry: Json) -> dict[str, Any]:
    return (
        shared.record_start(results, number)
        | {
            "seed": evaluation["subject"]["seed"],
            "suite": prompt.suite,
            "prompt": one_kind_of_line_end(prompt.text),
            "completion": one_kind_of_line_end(entry["completion"]),
            "tokens": entry["tokens"],
            "ended": entry["ended"],
        }
        | shared.evidence_record(results)
    )


def _side_by_side(rows: Sequence[RowResults], prompts: Sequence[Prompt]) -> Grid:
    """A line a prompt, a column a row."""
    titles = []
    for results in rows:
        *models, removed, method = shared.leading_texts(rows, results)
        titles.append(", ".join([*models, method, *([f"{removed} % removed"] if results.row.ratio else [])]))
    lines = [
        Line((Cell(prompt.text), *(Cell(_shown(entry)) for _, entry in prompt.found)), starts_block=number > 0)
        for number, prompt in enumerate(prompts)
    ]
    return Grid((Column("Prompt", "text"), *(Column(title, "text") for title in titles)), tuple(lines))


def _notes(rows: Sequence[RowResults], context: Context) -> tuple[str, ...]:
    limits = {suite.new_tokens for suite in context.suites.values() if isinstance(suite, GenerationSuite)}
    longest = " or ".join(str(limit) for limit in sorted(limits))
    several = [found[0]["subject"]["seed"] for row in rows for found in row.evaluations.values() if len(found) > 1]
    return (
        *shared.model_note(rows),
        f"Greedy decoding: the most probable token each time, at most {longest} of them; a text that stops in the "
        "middle met this limit. Space around a continuation is left out.",
        *([f"Of rows with several seeds the first is shown, seed {several[0]}."] if several else []),
    )

"""Tables of measured durations, throughput and peak memory: apart from the counts, since they vary from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank.config.outputs import RowTable
from lowrank.config.suites import CostSuite
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import MISSING, Cell, Column, Context, Line, RowResults, TableData

STAGES = {"search": "Search (s)", "compression": "Compression (s)", "tuning": "Post-training (s)"}
SPEEDS = {
    "prefill_tokens_per_second": "Prefill (tokens/s)",
    "decode_tokens_per_second": "Decode (tokens/s)",
}


def build_times(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of measured times; values are means over seeds.

    Raises:
        RankwiseError: results are missing or of another row, a method missed its ratio, or a manifest lacks its
            seconds.
    """
    suite = next(iter(context.suites))
    measured = [_measured(results, suite) for results in rows]
    keys = list(dict.fromkeys(key for values in measured for key in values))
    headings = STAGES | SPEEDS
    lines = [
        Line(
            (*map(Cell, shared.leading_texts(rows, results)), *(Cell(_text(values.get(key))) for key in keys)),
            starts_block=starts_block,
        )
        for (results, starts_block), values in zip(shared.block_starts(rows), measured, strict=True)
    ]
    records: list[dict[str, Any]] = [
        shared.record_start(results, number)
        | {f"{key}_seconds" if key in STAGES else key: values.get(key) for key in keys}
        | shared.evidence_record(results)
        for number, (results, values) in enumerate(zip(rows, measured, strict=True))
    ]
    leading = shared.leading_columns(rows)
    return TableData(
        title=table.title,
        notes=_notes(rows, context, suite),
        frame=shared.frame_of(records),
        columns=(*leading, *(Column(headings.get(key) or _peak_heading(key)) for key in keys)),
        lines=tuple(lines),
        heading=len(leading),
        warning=shared.smoke_warning(context.smoke),
    )


def _measured(results: RowResults, suite: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for stage in STAGES:
        values[stage] = shared.seconds_of(results, stage)
    shared.kept_percent(results)  # refuses a row that missed its ratio
    evaluations = [e["measured"] for e in shared.evaluations_of(results, suite, "cost")]
    for key in SPEEDS:
        values[key] = shared.over_seeds([measured[key] for measured in evaluations]).value
    for memory in evaluations[0]["peak_mib"]:
        if all(memory in measured["peak_mib"] for measured in evaluations):  # one on a processor has none of a GPU
            values[f"peak_mib_{memory}"] = shared.over_seeds([m["peak_mib"][memory] for m in evaluations]).value
    return values


def _peak_heading(key: str) -> str:
    return f"Peak {key.removeprefix('peak_mib_')} (MiB)"


def _text(value: float | None) -> str:
    return MISSING if value is None else shared.number_text(value, 1)


def _notes(rows: Sequence[RowResults], context: Context, suite: str) -> tuple[str, ...]:
    settings = context.suites[suite]
    assert isinstance(settings, CostSuite)
    devices = sorted(
        {
            f"{e['environment']['device']}, {e['environment']['threads']} threads"
            for results in rows
            for e in shared.evaluations_of(results, suite, "cost")
        }
    )
    return (
        *shared.model_note(rows),
        f"Measured on: {'; '.join(devices)}. Wall times vary from run to run and with what else the machine does. "
        f"Throughput: batch {settings.batch_size}, prompt of {settings.prompt_tokens} tokens, {settings.new_tokens} "
        f"new tokens, median of {settings.repeats}. Compression: making and writing the checkpoint; the statistics, "
        "bases and eliminations of neurons, which methods and ratios share, are not in it. "
        f"{MISSING}: no such stage. A post-trained row repeats the times of the checkpoint that it began with.",
        *shared.seeds_note(rows),
    )

"""Tables of parameters, multiply-accumulates and bytes (Table 7 of the paper): exact counts, no measured times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank.config.outputs import RowTable
from lowrank.config.published import single_values
from lowrank.config.suites import CostSuite
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import MISSING, Cell, Column, Context, Json, Line, RowResults, TableData

GIB = 2**30
MIB = 2**20
MEASURES = ("parameters", "kept_percent", "macs", "weight_bytes", "disk_bytes")


def build_statistics(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of counts; they are means over seeds where there are several.

    Raises:
        RankwiseError: results are missing or of another row, a method missed its ratio, or a published row is unknown.
    """
    suite = next(iter(context.suites))
    counts = [_counts(results, suite) for results in rows]
    units = _units(counts)
    lines: list[Line] = []
    records: list[dict[str, Any]] = []
    for number, ((results, starts_block), values) in enumerate(zip(shared.block_starts(rows), counts, strict=True)):
        lines.append(_line(shared.leading_texts(rows, results), values, units, starts_block))
        records.append(shared.record_start(results, number) | values | shared.evidence_record(results))
        published = shared.published_of(results, context)
        if published is not None:
            printed = _printed(single_values(published, f"{results.place}.published"))
            lines.append(_line(shared.published_texts(rows, published), printed, units, False, published=True))
            records.append(shared.published_record(published, number) | printed)
    leading = shared.leading_columns(rows)
    return TableData(
        title=table.title,
        notes=_notes(rows, context, suite),
        frame=shared.frame_of(records),
        columns=(
            *leading,
            Column(f"Parameters ({units['parameters'][0]})"),
            Column("Kept of linears (%)"),
            Column("MACs (G)"),
            Column(f"Weights ({units['weight_bytes'][0]})"),
            Column(f"On disk ({units['disk_bytes'][0]})"),
        ),
        lines=tuple(lines),
        heading=len(leading),
    )


def _counts(results: RowResults, suite: str) -> dict[str, float]:
    """Counts of one row as the CSV holds them: parameters, percent, multiply-accumulates, bytes."""
    per_seed = [_count(evaluation) for evaluation in shared.evaluations_of(results, suite, "cost")]
    shared.target_met(results, [counts["kept_percent"] for counts in per_seed])
    means = {key: shared.over_seeds([counts[key] for counts in per_seed]).value for key in per_seed[0]}
    return {key: int(mean) if key != "kept_percent" and mean == int(mean) else mean for key, mean in means.items()}


def _count(evaluation: Json) -> dict[str, float]:
    parameters, macs = evaluation["parameters"], evaluation["macs"]
    return {
        "parameters": parameters["total"],
        "kept_percent": 100 * shared.linears_kept(parameters),
        "macs": macs["total"],
        "weight_bytes": evaluation["weight_bytes"],
        "disk_bytes": evaluation["disk_bytes"],
        "parameters_decoder_linears": parameters["decoder_linears"],
        "parameters_decoder_linears_dense": parameters["decoder_linears_dense"],
        "parameters_total_dense": parameters["total_dense"],
        **{f"macs_{part}": macs[part] for part in ("linears", "attention", "head")},
    }


def _printed(values: dict[str, float | None]) -> dict[str, float | None]:
    """Published values in the units of the CSV; what was not printed is None."""
    factors = {
        "parameters_billion": ("parameters", 1e9),
        "macs_giga": ("macs", 1e9),
        "memory_gib": ("weight_bytes", GIB),
    }
    printed: dict[str, float | None] = dict.fromkeys(MEASURES)
    for column, (key, factor) in factors.items():
        value = values.get(column)
        printed[key] = None if value is None else round(value * factor)
    return printed


def size_unit(size: float) -> tuple[str, float]:
    """The unit in which so many bytes are told, and its bytes."""
    return ("GiB", GIB) if size >= GIB else ("MiB", MIB)


def _units(counts: Sequence[dict[str, float]]) -> dict[str, tuple[str, float]]:
    """Column -> unit and its size: one unit a column, by the largest of our values."""
    largest = {key: max(values[key] for values in counts) for key in MEASURES}
    units = {key: size_unit(largest[key]) for key in ("weight_bytes", "disk_bytes")}
    parameters = ("B", 1e9) if largest["parameters"] >= 1e9 else ("M", 1e6)
    return {"parameters": parameters, "kept_percent": ("%", 1), "macs": ("G", 1e9), **units}


def _line(
    leading: Sequence[str],
    values: dict[str, Any],
    units: dict[str, tuple[str, float]],
    starts_block: bool,
    published: bool = False,
) -> Line:
    texts = [
        MISSING if values[key] is None else f"{values[key] / units[key][1]:.{1 if key == 'kept_percent' else 2}f}"
        for key in MEASURES
    ]
    cells = (*map(Cell, leading), *map(Cell, texts))
    return Line(cells, source="published" if published else "ours", starts_block=starts_block)


def _notes(rows: Sequence[RowResults], context: Context, suite: str) -> tuple[str, ...]:
    settings = context.suites[suite]
    assert isinstance(settings, CostSuite)
    return (
        *shared.model_note(rows),
        f"MACs: multiply-accumulates of a forward pass over {settings.mac_tokens} tokens, attention and head included. "
        "Weights: bytes of the parameters in memory; on disk: its safetensors files.",
        *shared.seeds_note(rows),
        *shared.published_notes(rows, context),
    )

"""Tables of agreement: ours against the published values, cell by cell, in standard errors.

They read the CSVs of other tables, whose column `row` says which published line stands beside which line of ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank.config.outputs import AgreementTable
from lowrank.errors import RankwiseError
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import Cell, Column, Context, Line, RowResults, TableData
from lowrank.paper.tables.measures import TASK_TITLES
from lowrank.paper.tables.statistics import GIB

COMPARED = "compared"
COUNTS = {"parameters": ("Parameters (B)", 1e9), "macs": ("MACs (G)", 1e9), "weight_bytes": ("Weights (GiB)", GIB)}
"""Columns of tables of statistics: title, and the unit that is printed."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """One cell that has a value of ours and a published one.

    Attributes:
        table, column: where it stands; the column is that of the CSV.
        line, published_line: the CSV lines of ours and of the published values.
        ours, published: the values, in the unit of the CSV.
        stderr: standard error of ours, see `combined_error`; None where it has none.
        status: `compared`, or why the two cannot be compared.
    """

    table: str
    column: str
    line: Record
    published_line: Record
    ours: float
    published: float
    stderr: float | None
    status: str

    @property
    def difference(self) -> float:
        """Ours less the published value."""
        return self.ours - self.published

    @property
    def percent(self) -> float | None:
        """The difference in percent of the published value; None of zero."""
        return 100 * self.difference / self.published if self.published else None

    @property
    def standard_errors(self) -> float | None:
        """The difference in standard errors of ours; None without one."""
        return self.difference / self.stderr if self.stderr else None


def build_agreement(table: AgreementTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of agreement.

    Raises:
        RankwiseError: a table that has no line for each row, or whose CSV this version did not write.
    """
    pairs = [pair for name in table.tables for pair in pairs_of(name, context.compared[name])]
    compared = [pair for pair in pairs if pair.status == COMPARED]
    several_models = len({pair.line["model"] for pair in compared}) > 1
    leading = ("Table", *(["Model"] if several_models else []))
    return TableData(
        title=table.title,
        notes=_notes(pairs, compared, several_models),
        frame=pd.DataFrame([_record(pair) for pair in pairs], columns=list(RECORD), dtype="object"),
        columns=(
            *(Column(title, "left") for title in leading),
            Column("Removed (%)"),
            Column("Method", "left"),
            Column("Measure", "left"),
            Column("Ours"),
            Column("Published"),
            Column("Difference"),
            Column("Difference (%)"),
            Column("Standard errors"),
        ),
        lines=tuple(_lines(compared, several_models)),
        heading=len(leading) + 3,
        warning=shared.smoke_warning(context.smoke),
    )


def read_table(path: Path) -> pd.DataFrame:
    """The CSV of a table; only empty cells are missing, since a model or a label may be called `NA`."""
    try:
        return pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise RankwiseError(f"{path}: cannot be read ({error}). Run the workflow again.") from error


def pairs_of(name: str, frame: pd.DataFrame) -> Iterator[Pair]:
    """All cells of a table that have a value of ours and a published one.

    Raises:
        RankwiseError: several lines of one source for a row, or no column that numbers the rows.
    """
    if "row" not in frame.columns or "source" not in frame.columns:
        raise RankwiseError(f"table '{name}': its CSV does not number the rows. Delete it and run the workflow again.")
    if frame.duplicated(["row", "source"]).any():
        raise RankwiseError(
            f"table '{name}' has several lines for a row; a table of agreement reads tables of accuracy and statistics"
        )
    records = [{str(key): value for key, value in record.items()} for record in frame.to_dict(orient="records")]
    lines = {(record["row"], record["source"]): record for record in records}
    for (row, source), line in lines.items():
        published = lines.get((row, "published"))
        if source != "ours" or published is None:
            continue
        for column in frame.columns:
            if column not in shared.NAMING and not pd.isna(published[column]) and not pd.isna(line[column]):
                yield Pair(
                    name,
                    str(column),
                    line,
                    published,
                    float(line[column]),
                    float(published[column]),
                    _error_of(line, str(column)),
                    _status(line, published),
                )


def combined_error(stderr: float | None, sd: float | None, seeds: int) -> float | None:
    """Standard error of a mean over seeds: `sqrt(stderr^2 + sd^2 / k)`.

    The seeds share one test set, whose error does not shrink with their number k; the spread between them does.

    Args:
        stderr: from the finite test set; None for a value without one, which then has no error.
        sd: standard deviation between seeds; None with one seed.
        seeds: k.
    """
    if stderr is None:
        return None
    return math.hypot(stderr, sd / math.sqrt(seeds)) if sd is not None else stderr


def _error_of(line: Record, column: str) -> float | None:
    stderr, sd = (_number(line.get(f"{column}_{kind}")) for kind in ("stderr", "sd_over_seeds"))
    return combined_error(stderr, sd, int(_number(line.get("seeds")) or 1))


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _status(line: Record, published: Record) -> str:
    """Published values are of the same model if the config calls both by one name, and of the same ratio."""
    for key, word in (("model", "model"), ("target_removed_percent", "ratio")):
        if line[key] != published[key]:
            return f"not comparable: other {word}"
    return COMPARED


RECORD = (
    *("source", "table", "row", "model", "method", "label", "tuning", "target_removed_percent"),
    *("published_model", "published_method", "published_removed_percent", "column", "ours", "published"),
    *("difference", "difference_percent", "stderr", "standard_errors", "status", "citation", "evidence"),
)


def _record(pair: Pair) -> dict[str, Any]:
    line, published = pair.line, pair.published_line
    compared = pair.status == COMPARED
    names = {key: line[key] for key in ("row", "model", "method", "label", "tuning", "target_removed_percent")}
    return names | {
        "source": "comparison",
        "table": pair.table,
        "published_model": published["model"],
        "published_method": published["method"],
        "published_removed_percent": published["target_removed_percent"],
        "column": pair.column,
        "ours": pair.ours,
        "published": pair.published,
        "difference": pair.difference if compared else None,
        "difference_percent": pair.percent if compared else None,
        "stderr": pair.stderr,
        "standard_errors": pair.standard_errors if compared else None,
        "status": pair.status,
        "citation": published["citation"],
        "evidence": f"{pair.table}.csv",  # beside this CSV
    }


def _lines(pairs: Sequence[Pair], several_models: bool) -> Iterator[Line]:
    """One line a cell; what names a row of a table stands in its first line only."""
    previous: tuple[str, int] | None = None
    for pair in pairs:
        row = (pair.table, pair.line["row"])
        title, factor = COUNTS.get(pair.column, (_title(pair.column), 1.0))
        naming = [
            pair.table,
            *([str(pair.line["model"])] if several_models else []),
            str(pair.line["target_removed_percent"]),
            str(pair.line["label"]),
        ]
        errors = pair.standard_errors
        texts = [
            *(naming if row != previous else [""] * len(naming)),
            title,
            f"{pair.ours / factor:.2f}",
            f"{pair.published / factor:.2f}",
            f"{pair.difference / factor:+.2f}",
            "" if pair.percent is None else f"{pair.percent:+.1f}",
            "" if errors is None else f"{errors:+.1f}",
        ]
        yield Line(tuple(map(Cell, texts)), starts_block=previous is not None and row != previous)
        previous = row


def _title(column: str) -> str:
    if column.endswith("_perplexity"):
        return f"{column.removesuffix('_perplexity')} (ppl)"
    return {"average": "Average"}.get(column) or TASK_TITLES.get(column, column)


def _notes(pairs: Sequence[Pair], compared: Sequence[Pair], several_models: bool) -> tuple[str, ...]:
    if not compared:
        return ("No cell can be compared.", *_left_out(pairs))
    models = {} if several_models else dict.fromkeys(str(pair.line["model"]) for pair in compared)
    citations = dict.fromkeys(str(pair.published_line["citation"]) for pair in compared)
    return (
        _summary(compared),
        *(f"Model: {model}." for model in models),
        *_left_out(pairs),
        "Standard errors: the difference over sqrt(stderr² + sd²/k), with stderr the error of ours from the finite "
        "test set and sd the standard deviation between k seeds, where there are several. The published value has an "
        "error of its own, which is not printed and not counted. Cells are not independent: the average is made of the "
        "tasks beside it. Counts have no error.",
        "Metrics, windows and corpora are those of the tables: see their notes before reading a difference as one.",
        *(f"Published values: {citation}." for citation in citations),
    )


def _summary(compared: Sequence[Pair]) -> str:
    errors = [abs(pair.standard_errors) for pair in compared if pair.standard_errors is not None]
    within = ", ".join(f"{sum(error <= limit for error in errors)} within {limit}" for limit in (1, 2, 3))
    return (
        f"{len(compared)} cells are compared. Of {len(errors)} with a standard error, {within} standard errors."
        if errors
        else f"{len(compared)} cells are compared, none of them with a standard error."
    )


def _left_out(pairs: Sequence[Pair]) -> list[str]:
    """Counts what is in the CSV only, by its reason and the two models."""
    left = Counter(
        (pair.status, pair.line["model"], pair.published_line["model"]) for pair in pairs if pair.status != COMPARED
    )
    return [
        f"{count} cells are {status} (ours {model}, published {other}); they are in the CSV only."
        for (status, model, other), count in left.items()
    ]

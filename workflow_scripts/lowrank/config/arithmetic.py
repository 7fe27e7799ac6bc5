"""What a table of arithmetic computes, and all that can be wrong with it: config and published files decide both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank.config.outputs import ArithmeticRow, ArithmeticTable, Table
from lowrank.config.published import KEY_COLUMNS, Published, find_published, single_values
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.ranks.counts import Counts, count, module_ranks

TOKENS = 64
"""Of the pass whose multiply-accumulates the paper prints."""

Shapes = Mapping[str, ModelShape]


@dataclass(frozen=True)
class Arithmetic:
    """The numbers of one row of the table.

    Attributes:
        counts: from the ranks, converted if the config says so.
        as_printed: from the ranks as they are printed; None where nothing was converted, or where the model cannot
            have such ranks.
        parameters, macs: as they were printed, billions.
    """

    counts: Counts
    as_printed: Counts | None
    parameters: float
    macs: float


def arithmetic_of(row: ArithmeticRow, ranks: Published, statistics: Published, shapes: Shapes) -> Arithmetic:
    """Count what published ranks come to.

    Args:
        row: of the config.
        ranks, statistics: the published rows that it names.
        shapes: model -> shape, with those that the row names.

    Raises:
        RankwiseError: ranks and statistics of different rows, ranks that the model cannot have, or no statistics.
    """
    if why := _why_other_row(row):
        raise RankwiseError(why)
    printed = single_values(statistics, "statistics")
    parameters, macs = (_printed(printed, column) for column in ("parameters_billion", "macs_giga"))
    shape = shapes[row.model]
    try:
        counts = _counts(ranks, shape, shapes[row.units_of] if row.units_of else None)
    except RankwiseError as error:
        raise RankwiseError(f"{error}; {_cure(row, ranks, shapes)}") from error
    return Arithmetic(counts, _counts_or_none(ranks, shape, None) if row.units_of else None, parameters, macs)


def arithmetic_problems(tables: Mapping[str, Table], folder: str | Path, shapes: Shapes) -> Iterator[str]:
    """What the tables of arithmetic would fail on, each with its YAML path.

    Names and published rows that are not there are passed over, since they are reported elsewhere.

    Args:
        tables: of the config.
        folder: of the published values.
        shapes: model -> shape.
    """
    for name, table in tables.items():
        for index, row in enumerate(table.checks if isinstance(table, ArithmeticTable) else ()):
            place = f"tables.{name}.checks[{index}]"
            if row.model not in shapes or (row.units_of or row.model) not in shapes:
                continue
            try:
                ranks, statistics = (find_published(folder, named, place) for named in (row.ranks, row.statistics))
            except RankwiseError:
                continue
            try:
                arithmetic_of(row, ranks, statistics, shapes)
            except RankwiseError as error:
                yield f"{place}: {error}"


def _counts(ranks: Published, shape: ModelShape, units: ModelShape | None) -> Counts:
    return count(shape, module_ranks(ranks.values, shape, units), TOKENS)


def _counts_or_none(ranks: Published, shape: ModelShape, units: ModelShape | None) -> Counts | None:
    """None where the model cannot have these ranks."""
    try:
        return _counts(ranks, shape, units)
    except RankwiseError:
        return None


def _cure(row: ArithmeticRow, ranks: Published, shapes: Shapes) -> str:
    """What makes the ranks some that the model can have, if anything of this config does."""
    if row.units_of and _counts_or_none(ranks, shapes[row.model], None):
        return "leave out `units_of`"
    others = [name for name in shapes if name not in (row.model, row.units_of)]
    fitting = [name for name in others if _counts_or_none(ranks, shapes[row.model], shapes[name])]
    if fitting:
        return f"if the ranks are in units of another model, write `units_of: {' or '.join(fitting)}`"
    models = [name for name in shapes if name != row.model and _counts_or_none(ranks, shapes[name], None)]
    return f"name another model ({', '.join(models)})" if models else "leave this check out"


def _why_other_row(row: ArithmeticRow) -> str | None:
    """Why ranks and statistics cannot be of one published row, or None if they are."""
    for key in KEY_COLUMNS:
        ranks, statistics = getattr(row.ranks, key), getattr(row.statistics, key)
        if ranks != statistics:
            return (
                f"the ranks are of {key} '{ranks}', the statistics of '{statistics}'; both must be published of one "
                "model, ratio and method"
            )
    return None


def _printed(values: Mapping[str, float | None], column: str) -> float:
    value = values.get(column)
    if value is None:
        raise RankwiseError(f"the file of the statistics prints no `{column}` for this row; name another `file`")
    return value

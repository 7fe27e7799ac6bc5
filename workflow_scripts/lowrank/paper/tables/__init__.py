"""Tables of the study: from a section of the config and the results of its rows to a `TableData`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowrank.config.outputs import Table
from lowrank.paper.tables.accuracy import build_accuracy
from lowrank.paper.tables.agreement import build_agreement
from lowrank.paper.tables.allocations import build_allocations
from lowrank.paper.tables.arithmetic import build_arithmetic
from lowrank.paper.tables.data import Context, RowResults, TableData
from lowrank.paper.tables.differences import build_differences
from lowrank.paper.tables.generations import build_generations
from lowrank.paper.tables.statistics import build_statistics
from lowrank.paper.tables.times import build_times

__all__ = ["Context", "RowResults", "TableData", "build_table"]

BUILDERS: dict[str, Callable[..., TableData]] = {
    "accuracy": build_accuracy,
    "statistics": build_statistics,
    "times": build_times,
    "allocations": build_allocations,
    "generations": build_generations,
    "differences": build_differences,
    "agreement": build_agreement,
    "arithmetic": build_arithmetic,
}


def build_table(table: Table, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build one table.

    Args:
        table: its section of the config.
        rows: results of each row, in the config's order.
        context: suites and whatever else the table needs.

    Raises:
        RankwiseError: results are missing, belong to another row or miss their ratio; or a published row is unknown.
    """
    return BUILDERS[table.kind](table, rows, context)

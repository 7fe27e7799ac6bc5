"""The leader board: a line a checkpoint, a column for everything that was measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowrank.paper.page.results import DECODE, PARAMETERS, PREFILL, SIZE, Checkpoint
from lowrank.paper.page.verdict import size_text
from lowrank.paper.tables.data import MISSING
from lowrank.paper.tables.measures import Measure
from lowrank.paper.tables.rows import estimate_text, number_text


@dataclass(frozen=True)
class BoardColumn:
    """A column that can be sorted by; `rising` if small is good."""

    key: str
    title: str
    rising: bool


@dataclass(frozen=True)
class BoardCell:
    """A value as it is printed, and the number to sort by; None where nothing was measured."""

    text: str
    value: float | None


@dataclass(frozen=True)
class BoardLine:
    """A checkpoint with its cells, in the order of the columns."""

    checkpoint: Checkpoint
    cells: Sequence[BoardCell]


@dataclass(frozen=True)
class Board:
    """The columns of which something was measured, and a line a checkpoint."""

    columns: Sequence[BoardColumn]
    lines: Sequence[BoardLine]


def leader_board(found: Sequence[Checkpoint], measures: Sequence[Measure]) -> Board:
    """All checkpoints; of zero-shot tasks the mean alone, since tables have each."""
    cells = [dict(_cells(each, measures)) for each in found]
    columns = [column for column in _columns(measures) if any(column.key in line for line in cells)]
    blank = BoardCell(MISSING, None)
    return Board(
        columns,
        [
            BoardLine(each, [line.get(column.key, blank) for column in columns])
            for each, line in zip(found, cells, strict=True)
        ],
    )


def _shown(measures: Sequence[Measure]) -> list[Measure]:
    return [measure for measure in measures if measure.kind == "perplexity" or not measure.part]


def _columns(measures: Sequence[Measure]) -> Iterator[BoardColumn]:
    yield BoardColumn("kept", "kept (%)", False)
    for measure in _shown(measures):
        tasks = f"tasks ({measure.suite}, %)" if measure.shares_title else "tasks (%)"
        title = f"ppl {measure.name}" if measure.kind == "perplexity" else tasks
        yield BoardColumn(measure.key, title, measure.lower_is_better)
    yield BoardColumn(PARAMETERS, "params (M)", True)
    yield BoardColumn(SIZE, "weights", True)
    yield BoardColumn(PREFILL, "prompt (tok/s)", False)
    yield BoardColumn(DECODE, "generated (tok/s)", False)


def _cells(checkpoint: Checkpoint, measures: Sequence[Measure]) -> Iterator[tuple[str, BoardCell]]:
    yield "kept", BoardCell(f"{checkpoint.kept:.1f}", checkpoint.kept)
    for measure in _shown(measures):
        estimate = checkpoint.values.get(measure.key)
        if estimate is not None:
            yield measure.key, BoardCell(estimate_text(estimate.value, estimate.stderr, measure.digits), estimate.value)
    yield from _costs(checkpoint.cost)


def _costs(cost: Mapping[str, float]) -> Iterator[tuple[str, BoardCell]]:
    yield PARAMETERS, BoardCell(f"{cost[PARAMETERS] / 1e6:,.1f}", cost[PARAMETERS])
    if SIZE in cost:
        yield SIZE, BoardCell(size_text(cost[SIZE]), cost[SIZE])
    for key in (PREFILL, DECODE):
        if key in cost:
            yield key, BoardCell(number_text(cost[key], 1), cost[key])

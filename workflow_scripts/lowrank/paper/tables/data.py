"""What a table is made from (`RowResults`) and what it is before it becomes a file (`TableData`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from lowrank.config.outputs import Row
from lowrank.config.sources import ModelShape
from lowrank.config.suites import CostSuite, GenerationSuite, PerplexitySuite, ZeroShotSuite

Json = dict[str, Any]
AnySuite = PerplexitySuite | ZeroShotSuite | CostSuite | GenerationSuite
MISSING = "–"


@dataclass(frozen=True)
class RowResults:
    """Everything that was measured for one row of a table.

    Attributes:
        row: the row of the config.
        evaluations: suite -> evaluations, one a seed.
        manifests: those of compression, search (`allocation.json`) and post-training, of all seeds, as far as there
            are any; a dense row has none.
        place: YAML path of the row, for messages.
        evidence: paths of the files above, as the CSV names them.
    """

    row: Row
    evaluations: Mapping[str, Sequence[Json]] = field(default_factory=dict)
    manifests: Sequence[Json] = ()
    place: str = "table row"
    evidence: Sequence[str] = ()


@dataclass(frozen=True)
class Context:
    """What a table is built with besides its rows.

    Attributes:
        suites: the suites that the table shows, in its order.
        smoke: the config says that this run is no measurement.
        shapes: model -> shape; tables of allocations and of arithmetic need it.
        published_folder: folder of the published values.
        compared: table -> the content of its CSV; tables of agreement read them.
    """

    suites: Mapping[str, AnySuite] = field(default_factory=dict)
    smoke: bool = False
    shapes: Mapping[str, ModelShape] = field(default_factory=dict)
    published_folder: Path = Path("config/published")
    compared: Mapping[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of the table that is shown; `group` is a heading above several columns.

    Numbers stand on the right and names on the left; `text` is for sentences, which may need several lines.
    """

    title: str
    align: Literal["left", "right", "text"] = "right"
    group: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of the table that is shown."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One line of the table that is shown; published lines are set apart from ours."""

    cells: tuple[Cell, ...]
    source: Literal["ours", "published"] = "ours"
    starts_block: bool = False


@dataclass(frozen=True)
class Grid:
    """Another arrangement of a table, with columns, lines and heading as in `TableData`."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    heading: int = 1


@dataclass(frozen=True)
class TableData:
    """A table: full precision for machines in `frame`, rounded text for people in `columns` and `lines`.

    Attributes:
        title: caption.
        notes: what a reader has to know, one sentence each.
        frame: one row a line of ours or of published values, see the column `source`.
        heading: number of first columns that name a line.
        warning: empty, or that this is no measurement; it belongs to the caption.
        page: the arrangement for HTML, where that is another one.
    """

    title: str
    notes: tuple[str, ...]
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    heading: int = 1
    warning: str = ""
    page: Grid | None = None

    @property
    def grid(self) -> Grid:
        """What HTML shows."""
        return self.page or Grid(self.columns, self.lines, self.heading)

    @property
    def caption(self) -> str:
        """Title and warning."""
        return f"{self.title}. {self.warning}" if self.warning else self.title

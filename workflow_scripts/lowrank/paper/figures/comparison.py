"""Perplexity of some rows side by side, a panel a corpus: objectives of the search, transfers, tunings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from lowrank.config.outputs import namesakes
from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.paper.figures.axes import (
    SPREAD,
    TICKS_ALONG,
    is_wide,
    perplexity_label,
    readable_ticks,
    spread_ends,
    spread_notes,
    standard_errors,
)
from lowrank.paper.figures.panels import (
    balanced,
    columns_for,
    label_axes,
    legend_below,
    legend_entries,
    panel_grid,
    write_title,
)
from lowrank.paper.figures.style import DENSE_COLOUR, DENSE_DASHES, TEXT, series_style, style
from lowrank.paper.figures.values import NUMBERS, perplexity_over_seeds
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.rows import evaluations_of, kept_percent, number_text

UNTUNED = "none"
ROW_HEIGHT, LINE_HEIGHT = 0.2, 0.12  # inches: of a row, and of each further line of its label
AROUND_ROWS = 0.85  # inches: title and axis of a panel
LABEL_CHARACTERS = {1: 20, 2: 26, 3: 22}  # panels side by side -> characters of a label before it is broken
AXIS_CHARACTERS = 30  # of the label below a panel, before it is broken
VALUE_DISTANCE = 3.0  # points between the end of an error bar and the value
MARGIN = 0.02  # of a panel's width, right of the values


@dataclass(frozen=True)
class Entry:
    """One line at the side of the panels: the heading of a block, or a row.

    Attributes:
        text: what stands there, broken into lines.
        y: its place in inches below the top.
        row: index of the row in the frame of one corpus; None for a heading.
    """

    text: str
    y: float
    row: int | None


def comparison_frame(rows: Sequence[RowResults], suite_name: str, suite: PerplexitySuite) -> pd.DataFrame:
    """What is drawn: model, label, method, tuning, ratio, kept percent, corpus, perplexity, stderr, sd over seeds.

    Args:
        rows: each with its evaluations and manifests, one a seed.
        suite_name: the suite that judges them.
        suite: its corpora are the panels.

    Raises:
        RankwiseError: there are no rows, an evaluation is not of its row or lacks a corpus, a row missed its ratio, or
            two rows would stand there under one name.
    """
    if not rows:
        raise RankwiseError("a comparison needs at least one row; write some in the figure's `rows`.")
    refuse_equal_names(rows)
    records = [
        {
            "model": results.row.model,
            "label": results.row.title,
            "method": results.row.method,
            "tuning": results.row.tuning,
            "ratio": results.row.ratio,
            "kept_percent": kept_percent(results).value,
            "corpus": corpus,
            **perplexity_over_seeds(evaluations_of(results, suite_name, "perplexity"), corpus),
        }
        for corpus in suite.corpora
        for results in rows
    ]
    return pd.DataFrame(records).astype(NUMBERS)


def draw_comparison(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `comparison_frame`: rows from top to bottom in blocks of one model and ratio.

    A dense row leads the first block of its model, and a dotted line goes down from it through the model's other
    rows. Marks differ by post-training. The value stands beside its mark; a pale bar is the standard deviation
    between seeds.
    """
    corpora = list(dict.fromkeys(frame["corpus"]))
    parts = [frame[frame["corpus"] == corpus].reset_index(drop=True) for corpus in corpora]
    columns = columns_for(len(parts))
    entries, height = _entries(parts[0], LABEL_CHARACTERS[columns])
    wide = any(is_wide(list(part["perplexity"])) for part in parts)
    with style():
        figure, panels = panel_grid(len(parts), height + AROUND_ROWS, columns)
        values = [_draw_panel(axes, part, entries, wide) for axes, part in zip(panels, parts, strict=True)]
        for index, (axes, corpus) in enumerate(zip(panels, corpora, strict=True)):
            axes.set_ylim(height, 0)
            axes.set_title(corpus)
            _name_rows(axes, entries, shown=index % columns == 0)
        label_axes(panels, "\n".join(balanced(perplexity_label(wide), AXIS_CHARACTERS)))
        write_title(figure, title, smoke)
        tunings = legend_entries(panels)
        legend_below(figure, tunings if len(tunings) > 1 else {}, spread_notes(frame["sd_over_seeds"]))
        _make_room(figure, panels, values)
    return figure


def refuse_equal_names(rows: Sequence[RowResults]) -> None:
    """See that no two rows would stand there under one name.

    Raises:
        RankwiseError: two would.
    """
    for index, earlier in namesakes([results.row for results in rows]):
        row = rows[index].row
        raise RankwiseError(
            f"{rows[index].place}: '{row.title}' of {row.model} at {row.ratio} % stands in {rows[earlier].place} "
            "already; leave one out, or give it a `label` of its own."
        )


def _entries(part: pd.DataFrame, characters: int) -> tuple[list[Entry], float]:
    """The rows of one corpus in blocks, from top to bottom, and the height of all in inches."""
    entries, y = [], 0.0
    for heading, rows in _blocks(part):
        texts = [(heading, None), *((str(part.loc[row, "label"]), row) for row in rows)]
        for text, row in texts:
            lines = balanced(text, characters)
            room = ROW_HEIGHT + LINE_HEIGHT * (len(lines) - 1)
            entries.append(Entry("\n".join(lines), y + room / 2, row))
            y += room
        y += ROW_HEIGHT / 4
    return entries, y


def _blocks(part: pd.DataFrame) -> Iterator[tuple[str, list[int]]]:
    """Heading and rows of each block; models, ratios and rows in the order of the config."""
    for model, rows in part.groupby("model", sort=False):
        dense = [int(row) for row in rows.index[rows["ratio"] == 0]]
        compressed = rows[rows["ratio"] != 0]
        if compressed.empty:
            yield str(model), dense
        for ratio, block in compressed.groupby("ratio", sort=False):
            yield f"{model}, {ratio}\u00a0%\u00a0removed", dense + [int(row) for row in block.index]
            dense = []


def _draw_panel(axes: Axes, part: pd.DataFrame, entries: Sequence[Entry], wide: bool) -> list[Annotation]:
    """Draw one corpus; returns the texts of the values, in the order of the entries."""
    if wide:
        axes.set_xscale("log")
    places = {entry.row: entry.y for entry in entries if entry.row is not None}
    part = part.loc[list(places)].assign(y=list(places.values()))
    for model in dict.fromkeys(part["model"]):
        _draw_dense_lines(axes, part[part["model"] == model])
    dense = part["ratio"] == 0
    for index, (tuning, rows) in enumerate(part[~dense].groupby("tuning", sort=False)):
        name = "as compressed" if tuning == UNTUNED else f"+ {tuning}"
        _draw_marks(axes, rows, name, **series_style(index))
    if dense.any():
        _draw_marks(axes, part[dense], None, **series_style(0) | {"color": DENSE_COLOUR, "marker": "d"})
    axes.grid(False, axis="y")
    return [_write_value(axes, row) for _, row in part.iterrows()]


def _draw_dense_lines(axes: Axes, rows: pd.DataFrame) -> None:
    for dense in rows[rows["ratio"] == 0].to_dict(orient="records"):
        axes.vlines(
            dense["perplexity"],
            dense["y"],
            rows["y"].max() + ROW_HEIGHT / 2,
            color=DENSE_COLOUR,
            linewidth=1.0,
            linestyle=DENSE_DASHES,
            zorder=1,
        )


def _draw_marks(axes: Axes, rows: pd.DataFrame, label: str | None, **look: Any) -> None:
    errors = standard_errors(rows["perplexity"], rows["stderr"])
    axes.errorbar(rows["perplexity"], rows["y"], xerr=errors, label=label, **look | {"linestyle": "none"})
    axes.hlines(rows["y"], *spread_ends(rows["perplexity"], rows["sd_over_seeds"]), color=look["color"], **SPREAD)


def _write_value(axes: Axes, row: pd.Series) -> Annotation:
    ends = [standard_errors(row["perplexity"], error)[1] for error in (row["stderr"], row["sd_over_seeds"])]
    return axes.annotate(
        number_text(row["perplexity"], 2),
        (row["perplexity"] + max(ends), row["y"]),
        xytext=(VALUE_DISTANCE, 0),
        textcoords="offset points",
        verticalalignment="center_baseline",
        fontsize=TEXT,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
    )


def _name_rows(axes: Axes, entries: Sequence[Entry], shown: bool) -> None:
    """Labels at the side of a panel, headings in bold; panels further right share those of the first."""
    axes.set_yticks([entry.y for entry in entries], [entry.text for entry in entries] if shown else [""] * len(entries))
    axes.tick_params(axis="y", length=0)
    for label, entry in zip(axes.get_yticklabels(), entries, strict=True):
        label.set_multialignment("right")
        if entry.row is None:
            label.set_fontweight("bold")


def _make_room(figure: Figure, panels: Sequence[Axes], values: Sequence[Sequence[Annotation]]) -> None:
    """Widen each panel's range until all values fit in, once the layout has settled how wide the panels are."""
    layout = figure.get_layout_engine()
    assert layout is not None  # `panel_grid` chose one
    layout.execute(figure)
    gap = VALUE_DISTANCE / 72 * figure.dpi
    for axes, texts in zip(panels, values, strict=True):
        scale, width = axes.xaxis.get_transform(), axes.get_window_extent().width
        low = min(scale.transform(axes.get_xlim()))
        ends = scale.transform(np.array([text.xy[0] for text in texts]))
        free = np.array([1 - MARGIN - (text.get_window_extent().width + gap) / width for text in texts])
        high = float((low + (ends - low) / free).max())
        axes.set_xlim(*scale.inverted().transform(np.array([low, high])))
        readable_ticks(axes.xaxis, TICKS_ALONG)

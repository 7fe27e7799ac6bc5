"""How figures are laid out: widths of a printed page, panels in rows, one legend and one title for all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

SINGLE_COLUMN, DOUBLE_COLUMN = 3.3, 6.8  # inches, of a page in two columns
PANELS_IN_A_ROW = 3
TITLE_CHARACTERS, NOTE_CHARACTERS = 14, 17  # that fit into an inch, at the sizes of title and legend
TITLE_LINE = 0.16  # inches
AROUND_LEGEND = 0.08  # inches
BETWEEN_PANELS = 0.06  # of a panel's width
SMOKE = "smoke run, not a measurement"


def columns_for(panels: int) -> int:
    """How many panels stand side by side: at most three, and four as two by two."""
    return 2 if panels == 4 else min(panels, PANELS_IN_A_ROW)


def width_for(columns: int) -> float:
    """Width of the figure in inches: one column of a page for one panel, else both."""
    return SINGLE_COLUMN if columns == 1 else DOUBLE_COLUMN


def panel_grid(panels: int, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """An empty figure with so many panels, row by row; title and legend add to its height.

    Args:
        panels: how many.
        height: of one row of panels with its titles and labels, in inches.
        columns: panels side by side; None: as many as suit their number.
    """
    columns = columns or columns_for(panels)
    rows = -(-panels // columns)
    # Without some space, the last tick of a panel and the first of the next would look like one number.
    layout = ConstrainedLayoutEngine(wspace=BETWEEN_PANELS)
    figure = Figure(figsize=(width_for(columns), rows * height), layout=layout)
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def label_axes(panels: Sequence[Axes], x: str, y: str = "") -> None:
    """Write what the axes are below the lowest panels and beside the first ones; all panels share it."""
    for axes in panels:
        place = axes.get_subplotspec()
        if place is None or place.is_first_col():
            axes.set_ylabel(y)
        below = [other for other in panels if _is_below(other, axes)]
        if not below:
            axes.set_xlabel(x)


def write_title(figure: Figure, title: str, smoke: bool) -> None:
    """The title, broken into lines of about one length, with the warning of a smoke run."""
    lines = balanced(title, int(figure.get_figwidth() * TITLE_CHARACTERS))
    if smoke:
        lines.append(SMOKE)
    figure.suptitle("\n".join(lines))
    figure.set_figheight(figure.get_figheight() + TITLE_LINE * len(lines))


def balanced(text: str, characters: int) -> list[str]:
    """The text in as few lines of at most so many characters as it needs, as equally long as words allow."""
    lines = textwrap.wrap(text, characters, break_on_hyphens=False)
    for narrower in range(characters - 1, 0, -1):
        shorter = textwrap.wrap(text, narrower, break_long_words=False, break_on_hyphens=False)
        if len(shorter) > len(lines) or max(map(len, shorter), default=0) > narrower:
            break
        lines = shorter
    return lines


def legend_entries(panels: Iterable[Axes]) -> dict[str, Any]:
    """Label -> handle of everything that some panel has a name for, each once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def legend_below(figure: Figure, entries: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """One legend below all panels, in as many columns as its names leave room for.

    Args:
        figure: with its final width.
        entries: label -> handle.
        notes: what a reader has to know besides, above the names.
    """
    if not entries and not notes:
        return
    heading = _note_lines(notes, int(figure.get_figwidth() * NOTE_CHARACTERS))
    for columns in range(max(len(entries), 1), 0, -1):
        legend = figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            frameon=False,
            ncols=columns,
            title=heading or None,
            borderpad=0.1,
        )
        legend.get_title().set_multialignment("center")
        size = legend.get_window_extent()
        if columns == 1 or size.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi + AROUND_LEGEND)
            return
        legend.remove()


def _note_lines(notes: Sequence[str], characters: int) -> str:
    """All notes in one line if they fit, else each in lines of its own."""
    together = "; ".join(notes)
    if len(together) <= characters:
        return together
    return "\n".join(line for note in notes for line in balanced(note, characters))


def _is_below(other: Axes, axes: Axes) -> bool:
    mine, theirs = axes.get_subplotspec(), other.get_subplotspec()
    if mine is None or theirs is None:
        return False
    return theirs.colspan == mine.colspan and theirs.rowspan.start > mine.rowspan.start

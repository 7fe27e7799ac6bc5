"""How all figures look, and how they are written: the same data gives the same bytes."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Locator, LogLocator, MaxNLocator, NullLocator
from matplotlib.typing import RcKeyType
from numpy.typing import ArrayLike

from lowrank.files import atomic_path, write_text

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is kept for the dense model, and
# their yellow, too pale on white, gives way to grey. Marker and dashes differ too, for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 2, 1, 2)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2)),
    (0, (8, 2, 1, 2, 1, 2)),
)
WIDE_RANGE = 3.0  # largest over smallest value from which on a logarithmic axis is used
RANGE_OF_STEPS = 5.0  # range from which on ticks at 1, 2, 5, 10, ... are enough
RANGE_OF_DECADES = 300.0  # range from which on ticks at 1, 10, 100, ... are enough
CHARACTERS_PER_INCH = 14  # of a title, at 9 points
SETTINGS: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures are equal on all machines
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # embeds TrueType fonts: text stays text, and journals accept it
    "svg.hashsalt": "rankwise",
}


@dataclass(frozen=True)
class Outputs:
    """The three files of a figure."""

    pdf: Path
    png: Path
    csv: Path


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults plus `SETTINGS`, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def series_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the series with that number: all three differ between neighbours."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "capsize": 2,
        "elinewidth": 0.8,
    }


def is_wide(values: Sequence[float]) -> bool:
    """Whether perplexities span so wide a range that a linear axis would hide the small ones."""
    return max(values) / min(values) >= WIDE_RANGE


def logarithmic_axis(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, with ticks at round numbers however wide the range is."""
    axes.set_yscale("log")
    span = max(values) / min(values)
    locator: Locator = MaxNLocator(6, steps=[1, 2, 5, 10])
    if span >= RANGE_OF_STEPS:
        locator = LogLocator(subs=(1.0,) if span >= RANGE_OF_DECADES else (1.0, 2.0, 5.0), numticks=12)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def perplexity_label(logarithmic: bool) -> str:
    """The label of a y axis."""
    return f"perplexity ± standard error{' (log scale)' if logarithmic else ''}"


def standard_errors(perplexity: ArrayLike, stderr: ArrayLike) -> np.ndarray:
    """Lengths of the error bars below and above, 2 x n.

    The error belongs to the mean log-likelihood, and the perplexity is its exponential: so the bars are equally long
    on a logarithmic axis, and never reach zero.
    """
    values, relative = np.asarray(perplexity), np.nan_to_num(np.asarray(stderr) / np.asarray(perplexity))
    return np.stack([values * (1 - np.exp(-relative)), values * np.expm1(relative)])


def draw_dense(axes: Axes, perplexity: float, stderr: float | None, label: str) -> None:
    """The dense model: a dotted line with a band of one standard error."""
    axes.axhline(perplexity, label=label, color="black", linewidth=1.0, linestyle=(0, (1, 3)), zorder=1)
    if stderr is not None and stderr > 0:
        below, above = standard_errors([perplexity], [stderr])[:, 0]
        axes.axhspan(perplexity - below, perplexity + above, color="black", alpha=0.08, linewidth=0)


def write_title(figure: Figure, title: str, smoke: bool) -> None:
    """The title, broken into lines that fit, with the warning of a smoke run."""
    lines = textwrap.wrap(title, int(figure.get_figwidth() * CHARACTERS_PER_INCH))
    if smoke:
        lines.append("smoke run, not a measurement")
    figure.suptitle("\n".join(lines), fontsize=9)


def save_figure(figure: Figure, frame: pd.DataFrame, outputs: Outputs) -> None:
    """Write vector PDF, PNG at 200 dpi and a CSV of exactly what is drawn."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports every glyph that it embeds
    with style():
        with atomic_path(outputs.pdf) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        with atomic_path(outputs.png) as temporary:
            figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})
    write_text(outputs.csv, frame.to_csv(index=False, lineterminator="\n"))

"""How all figures look, and how they are written: the same data gives the same bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from lowrank.files import atomic_path, write_text

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is kept for the dense model, and their
# yellow, too pale on white, gives way to grey. The last two are dark, for figures of eight and nine series.
# Marker and dashes differ too, for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666", "#332288", "#692D0F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 2, 1, 2)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2)),
    (0, (8, 2, 1, 2, 1, 2)),
    (0, (12, 2)),
)
HOMES = (
    *("svd", "lord", "bolaco", "rankwise", "flap", "slicegpt", "afm", "svd-llm", "modegpt"),
    *("llm-pruner", "aa-svd", "llrc", "skipcat", "fwsvd", "zs-svd", "asvd", "basis-sharing", "obd-llm"),
)
"""Each method's own look, by its number. There are fewer colours: methods of the second line have the colours of those
above them, with other markers and dashes. Pairs are such as seldom stand in one figure."""
DENSE_COLOUR = "black"
DENSE_DASHES = (0, (1, 3))
TEXT = 7.0  # points; no text of a figure is smaller when it is printed as wide as it is drawn
SETTINGS: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures are equal on all machines
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "figure.labelsize": 8,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "legend.title_fontsize": TEXT,
    "legend.handlelength": 2.6,  # long enough for every pattern of dashes
    "legend.columnspacing": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
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


def method_looks(methods: Iterable[str]) -> dict[str, int]:
    """Preset of a method -> number of its look for `line_style`; no two have the same.

    The first preset of a method has that method's look, in every figure. Others of the same method, and methods that
    are not in `HOMES`, take what is free in this figure: in their order, and first a colour that nothing else has.
    """
    looks: dict[str, int] = {}
    names = list(dict.fromkeys(methods))
    for name in names:
        homes = [home for home in HOMES if name == home or name.startswith(f"{home}-")]
        if homes and (number := HOMES.index(max(homes, key=len))) not in looks.values():
            looks[name] = number
    for name in names:
        if name not in looks:
            free = [number for number in range(len(HOMES) + len(names)) if number not in looks.values()]
            taken = [number % len(COLOURS) for number in looks.values()]
            looks[name] = min(free, key=lambda number: taken.count(number % len(COLOURS)))
    return {name: looks[name] for name in names}


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the series with that number.

    All three differ between the first nine; among all of `HOMES`, two of one colour have other markers and dashes.
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[(index + index // len(COLOURS)) % len(DASHES)],
    }


def series_style(index: int) -> dict[str, Any]:
    """`line_style` for a series with error bars."""
    return line_style(index) | {"capsize": 2, "elinewidth": 0.8, "markeredgewidth": 0.8}


def save_figure(figure: Figure, frame: pd.DataFrame, outputs: Outputs) -> None:
    """Write vector PDF, PNG at 200 dpi and a CSV of exactly what is drawn."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports every glyph that it embeds
    with style():
        with atomic_path(outputs.pdf) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        with atomic_path(outputs.png) as temporary:
            figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})
    write_text(outputs.csv, frame.to_csv(index=False, lineterminator="\n"))

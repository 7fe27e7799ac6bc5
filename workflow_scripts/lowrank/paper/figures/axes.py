"""What all figures do with perplexities: logarithmic axes where the range is wide, readable ticks, error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from lowrank.paper.figures.style import DENSE_COLOUR, DENSE_DASHES
from lowrank.paper.tables.rows import SCIENTIFIC

WIDE_RANGE = 3.0  # largest over smallest value from which on a logarithmic axis is used
RANGE_OF_STEPS = 5.0  # range from which on ticks at 1, 2, 5, 10, ... are enough
TICKS_UP, TICKS_ALONG = 8, 4  # most ticks of a y axis, and of the x axis of a narrow panel
ROOM, LEAST_ROOM = 0.07, 1.05  # of a logarithmic range, beyond the outermost marks; and its smallest factor
SPREAD: dict[str, Any] = {
    "alpha": 0.3,
    "linewidth": 4.5,
    "zorder": 1.5,
    "capstyle": "butt",
}  # the bar of the sd between seeds


def is_wide(values: Sequence[float]) -> bool:
    """Whether perplexities span so wide a range that a linear axis would hide the small ones."""
    return max(values) / min(values) >= WIDE_RANGE


def perplexity_label(logarithmic: bool) -> str:
    """The label of an axis of perplexities."""
    return f"perplexity ± standard error{scale_words(logarithmic)}"


def scale_words(logarithmic: bool) -> str:
    """What the label of a logarithmic axis adds."""
    return " (log scale)" if logarithmic else ""


def readable_ticks(axis: Axis, most: int) -> None:
    """Put ticks at round numbers; the last step of a panel, since it needs the axis's final limits."""
    logarithmic = axis.get_scale() == "log"
    low, high = sorted(axis.get_view_interval())
    ticks = round_ticks(low, high, most) if logarithmic else even_ticks(low, high, most)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers for a logarithmic axis however wide its range is: at least two, at most `most` (at least 4)."""
    if high / low < RANGE_OF_STEPS:
        return even_ticks(low, high, most)
    decades = list(range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1))
    steps: list[tuple[list[int], tuple[float, ...]]] = [
        (decades, (1, 1.5, 2, 3, 5, 7)),
        (decades, (1, 2, 5)),
        (decades, (1, 3)),
    ]
    steps += [([d for d in decades if d % stride == 0], (1,)) for stride in range(1, len(decades) + 1)]
    ticks: list[float] = []
    for exponents, factors in steps:
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks


def even_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers at equal distances, at most `most`."""
    ticks: list[float] = []
    for steps in ([1, 2, 5, 10], [1, 2, 4, 5, 10]):  # of some ranges the first leave one tick inside, or one too many
        places = MaxNLocator(most - 1, steps=steps).tick_values(low, high)
        ticks = [float(tick) for tick in places if low <= tick <= high]
        if 2 <= len(ticks) <= most:
            break
    return ticks


def tick_text(value: float) -> str:
    """A round number as tables write it: with an exponent where it is very large."""
    if abs(value) < SCIENTIFIC:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value / 10**exponent:g}e{exponent}"


def standard_errors(perplexity: ArrayLike, stderr: ArrayLike) -> np.ndarray:
    """Lengths of the error bars below and above, 2 x n.

    The error belongs to the mean log-likelihood, and the perplexity is its exponential: so the bars are equally long
    on a logarithmic axis, and never reach zero.
    """
    values, relative = np.asarray(perplexity), np.nan_to_num(np.asarray(stderr) / np.asarray(perplexity))
    return np.stack([values * (1 - np.exp(-relative)), values * np.expm1(relative)])


def limits_with_room(points: pd.DataFrame) -> tuple[float, float]:
    """Limits of a logarithmic axis of perplexities: around all marks and error bars, with some room at both ends.

    Args:
        points: with the columns `perplexity`, `stderr` and `sd_over_seeds`.
    """
    ends = [spread_ends(points["perplexity"], points[error]) for error in ("stderr", "sd_over_seeds")]
    low, high = min(float(below.min()) for below, _ in ends), max(float(above.max()) for _, above in ends)
    room = max((high / low) ** ROOM, LEAST_ROOM)
    return low / room, high * room


def draw_dense(axes: Axes, perplexity: float, stderr: float | None, label: str) -> None:
    """The dense model: a dotted line with a band of one standard error."""
    axes.axhline(perplexity, label=label, color=DENSE_COLOUR, linewidth=1.0, linestyle=DENSE_DASHES, zorder=1)
    if stderr is not None and stderr > 0:
        below, above = standard_errors([perplexity], [stderr])[:, 0]
        axes.axhspan(perplexity - below, perplexity + above, color=DENSE_COLOUR, alpha=0.08, linewidth=0)


def spread_notes(sd: ArrayLike) -> list[str]:
    """What a reader has to know where some value is a mean over seeds, else nothing."""
    several = bool(np.isfinite(np.asarray(sd, dtype=float)).any())
    return ["marks: means over seeds", "pale bars: ± standard deviation between seeds"] if several else []


def spread_ends(perplexity: ArrayLike, sd: ArrayLike) -> tuple[Any, Any]:
    """Both ends of the bars of the standard deviation between seeds, as far on a logarithmic axis as error bars are."""
    below, above = standard_errors(perplexity, sd)
    values = np.asarray(perplexity)
    return values - below, values + above

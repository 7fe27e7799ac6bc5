"""What truncating single matrices was predicted to cost, against what it was measured to cost: a panel a covariance."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.paper.figures.axes import TICKS_ALONG, TICKS_UP, readable_ticks
from lowrank.paper.figures.panels import label_axes, legend_below, legend_entries, panel_grid, write_title
from lowrank.paper.figures.style import DENSE_COLOUR, DENSE_DASHES, series_style, style
from lowrank.paper.tables.data import Json
from lowrank.ranks.predicted_loss import MEANING

PANEL_HEIGHT = 2.9  # inches
DECADES = 4.5  # of each axis at most; what is smaller stands at its lower end
MARGIN = 1.5  # factor between the outermost marks and the ends of the axes
EQUAL = "measured = predicted"
NUMBERS = dict.fromkeys(("predicted", "measured", "stderr", "spearman"), "float64")


def predicted_loss_frame(results: Mapping[str, Json]) -> pd.DataFrame:
    """What is drawn: covariance, model, module, type, layer, rank, largest rank, predicted and measured rise of the
    mean loss per token in nats, its standard error, and the rank correlation over all lines of a covariance.

    Args:
        results: covariance -> what was measured with its bases.

    Raises:
        RankwiseError: there is no result, or one is of another kind.
    """
    if not results:
        raise RankwiseError("a figure of predicted losses needs at least one covariance; name one in `covariance`.")
    records = []
    for covariance, result in results.items():
        if result.get("kind") != "truncations":
            raise RankwiseError(
                f"truncations with '{covariance}': a result of kind '{result.get('kind')}' was given to a figure of "
                "predicted losses. Delete it and run the workflow again."
            )
        about = {"covariance": covariance, "model": result["subject"]["model"]}
        found = {"spearman": result["spearman"]["all"]}
        records += [about | dict(record) | found for record in result["truncations"]]
    return pd.DataFrame(records).astype(NUMBERS)


def draw_predicted_loss(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `predicted_loss_frame`: both axes logarithmic and alike, a mark a truncation, looks by type.

    The dotted line is a perfect prediction. Where no rise was measured, or one too small for the axes, the mark stands
    at the end of the axis, hollow and without its bar of one standard error.
    """
    low, high = _limits(frame)
    order = _type_order(frame)
    presets = list(dict.fromkeys(frame["covariance"]))
    with style():
        figure, panels = panel_grid(len(presets), PANEL_HEIGHT)
        for axes, preset in zip(panels, presets, strict=True):
            part = frame[frame["covariance"] == preset]
            axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
            axes.plot([low, high], [low, high], label=EQUAL, color=DENSE_COLOUR, linewidth=1.0, dashes=DENSE_DASHES[1])
            for name, points in part.groupby("type", sort=False):
                _draw_type(axes, points, str(name), order[str(name)], low)
            axes.set_title(f"{preset}\n{_correlation(part)}")
            readable_ticks(axes.xaxis, TICKS_ALONG)
            readable_ticks(axes.yaxis, TICKS_UP)
        label_axes(panels, "predicted rise of the loss (nats per token)", "measured rise ± standard error")
        write_title(figure, title, smoke)
        found = legend_entries(panels)
        hollow = bool((np.minimum(frame["predicted"], frame["measured"]) <= low * MARGIN).any())
        notes = [f"predicted: {MEANING}; measured: on other text"]
        notes += ["hollow marks: at or beyond the end of an axis"] if hollow else []
        legend_below(figure, {name: found[name] for name in [EQUAL, *order]}, notes)
    return figure


def _limits(frame: pd.DataFrame) -> tuple[float, float]:
    """The ends of both axes."""
    values = frame[["predicted", "measured"]].to_numpy()
    positive = values[values > 0]
    if not len(positive):
        raise RankwiseError("a figure of predicted losses: no rise was predicted and none was measured")
    high = float(positive.max())
    return max(float(positive.min()), high / 10**DECADES) / MARGIN, high * MARGIN


def _type_order(frame: pd.DataFrame) -> dict[str, int]:
    """Type -> number of its look, the same as in figures of sensitivity."""
    known = dict.fromkeys(linear.name for family in FAMILIES.values() for linear in family.types)
    drawn = set(frame["type"])
    return {name: index for index, name in enumerate(known) if name in drawn}


def _draw_type(axes: Axes, points: pd.DataFrame, name: str, index: int, low: float) -> None:
    look = series_style(index) | {"linestyle": "none", "markersize": 3.5, "elinewidth": 0.5, "capsize": 0}
    end = low * MARGIN
    inside = (points["predicted"] > end) & (points["measured"] > end)
    shown, small = points[inside], points[~inside][["predicted", "measured"]].clip(lower=end)
    error = shown["stderr"].fillna(0.0)
    bars = np.stack([np.minimum(error, shown["measured"] - low), error])
    axes.errorbar(shown["predicted"], shown["measured"], yerr=bars, label=name, **look)
    axes.errorbar(small["predicted"], small["measured"], **look | {"markerfacecolor": "white"})


def _correlation(part: pd.DataFrame) -> str:
    value = part["spearman"].iloc[0]
    return "no rank correlation" if np.isnan(value) else f"rank correlation {value:.2f}"

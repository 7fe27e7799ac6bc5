"""Perplexity against the removed ratio, a line a method, a panel a corpus (Figure 3 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from lowrank.config.suites import PerplexitySuite
from lowrank.paper.figures.axes import (
    SPREAD,
    TICKS_UP,
    draw_dense,
    limits_with_room,
    perplexity_label,
    readable_ticks,
    spread_ends,
    spread_notes,
    standard_errors,
)
from lowrank.paper.figures.panels import label_axes, legend_below, legend_entries, panel_grid, write_title
from lowrank.paper.figures.style import TEXT, line_style, method_looks, series_style, style
from lowrank.paper.figures.values import NUMBERS, perplexity_over_seeds
from lowrank.paper.tables.data import Json, RowResults
from lowrank.paper.tables.rows import evaluations_of, kept_percent

DENSE_METHOD = "dense"
PANEL_HEIGHT = 2.3  # inches
GUESS = "no_better_than_a_guess"
BESIDE = 13.0  # points between marks at the edge that stand at one ratio
ARROW = 6.0  # points from the middle of a mark at the edge to that of its arrow


def perplexity_frame(
    dense: Sequence[Json], curves: Sequence[RowResults], name: str, suite: PerplexitySuite, vocabulary: int
) -> pd.DataFrame:
    """What is drawn, a line a corpus and point.

    Columns: corpus, method, removed percent, kept percent, perplexity, standard error, spread over seeds, whether a
    guess.

    Args:
        dense: evaluations of the dense model; none if the config has no dense preset.
        curves: the points of all methods, each with its evaluations and manifests, one a seed.
        name: the suite that judges them.
        suite: its corpora are the panels.
        vocabulary: number of tokens, the perplexity of a guess.

    Raises:
        RankwiseError: an evaluation is of another kind or lacks a corpus, or a point missed its ratio.
    """
    points = [(DENSE_METHOD, 0, 100.0, dense)] if dense else []
    points += [
        (each.row.method, each.row.ratio, kept_percent(each).value, evaluations_of(each, name, "perplexity"))
        for each in curves
    ]
    records = [
        {
            "corpus": corpus,
            "method": method,
            "removed_percent": ratio,
            "kept_percent": kept,
            **perplexity_over_seeds(evaluations, corpus),
        }
        for corpus in suite.corpora
        for method, ratio, kept, evaluations in points
    ]
    frame = pd.DataFrame(records).astype(NUMBERS)
    return frame.assign(**{GUESS: frame["perplexity"] >= vocabulary})


def draw_perplexity(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `perplexity_frame`.

    The dense model is a horizontal line with a band of its standard error; where a method has several seeds, a pale
    bar behind its mark is the standard deviation between them. What is no better than a guess does not stretch the
    axis: its mark stands at the upper edge, with an arrow.
    """
    corpora = list(dict.fromkeys(frame["corpus"]))
    with style():
        figure, panels = panel_grid(len(corpora), PANEL_HEIGHT)
        for axes, corpus in zip(panels, corpora, strict=True):
            _draw_panel(axes, frame[frame["corpus"] == corpus])
            axes.set_title(corpus)
        label_axes(panels, "removed linear weights (%)", perplexity_label(logarithmic=True))
        write_title(figure, title, smoke)
        legend_below(figure, legend_entries(panels), [*spread_notes(frame["sd_over_seeds"]), *_beyond_notes(frame)])
    return figure


def _beyond_notes(frame: pd.DataFrame) -> list[str]:
    """How many marks stand at the edge, and what that means."""
    count = sum(int(part[GUESS].sum()) for _, part in frame.groupby("corpus") if not part[GUESS].all())
    return [f"↑: beyond the axis, no better than a guess ({count} {'value' if count == 1 else 'values'})"] * (count > 0)


def _draw_panel(axes: Axes, frame: pd.DataFrame) -> None:
    axes.set_yscale("log")
    for dense in frame[frame["method"] == DENSE_METHOD].to_dict(orient="records"):
        draw_dense(axes, dense["perplexity"], dense["stderr"], DENSE_METHOD)
    compressed = frame[frame["method"] != DENSE_METHOD]
    looks = method_looks(map(str, compressed["method"]))
    for name, points in compressed.groupby("method", sort=False):
        points = points.sort_values("removed_percent")
        look = series_style(looks[str(name)])
        axes.errorbar(
            points["removed_percent"],
            points["perplexity"],
            yerr=standard_errors(points["perplexity"], points["stderr"]),
            label=str(name),
            **look,
        )
        axes.vlines(
            points["removed_percent"],
            *spread_ends(points["perplexity"], points["sd_over_seeds"]),
            color=look["color"],
            **SPREAD,
        )
    if not frame[GUESS].all():
        axes.set_ylim(*limits_with_room(frame[~frame[GUESS]]))
        _draw_beyond(axes, compressed[compressed[GUESS]], looks)
    ratios = sorted(set(compressed["removed_percent"]))
    axes.set_xticks(ratios)
    axes.set_xlim(ratios[0] - 5, ratios[-1] + 5)
    readable_ticks(axes.yaxis, TICKS_UP)


def _draw_beyond(axes: Axes, points: pd.DataFrame, looks: Mapping[str, int]) -> None:
    """Marks at the upper edge, those of one ratio side by side."""
    for ratio in map(int, points["removed_percent"].unique()):
        members = points.loc[points["removed_percent"] == ratio, "method"]
        for place, name in enumerate(map(str, members)):
            look, at = line_style(looks[name]), (place - (len(members) - 1) / 2) * BESIDE
            moved = axes.get_xaxis_transform() + ScaledTranslation(at / 72, 0, axes.figure.dpi_scale_trans)
            axes.plot(ratio, 1, transform=moved, clip_on=False, **look | {"linestyle": "none"})
            axes.annotate(
                "↑",
                (ratio, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(at + ARROW, 0),
                textcoords="offset points",
                color=look["color"],
                horizontalalignment="center",
                verticalalignment="center",
                fontsize=TEXT,
            )

"""Perplexity against the removed ratio, a line a method, a panel a corpus (Figure 3 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.paper.figures.style import (
    draw_dense,
    logarithmic_axis,
    perplexity_label,
    series_style,
    standard_errors,
    style,
    write_title,
)
from lowrank.paper.tables.data import Json
from lowrank.paper.tables.rows import over_seeds

DENSE_METHOD = "dense"
PANELS_IN_A_ROW = 3
PANEL_WIDTH, PANEL_HEIGHT = 2.5, 2.6  # inches


def perplexity_frame(
    dense: Sequence[Json], curves: Mapping[str, Mapping[str, Sequence[Json]]], suite: PerplexitySuite
) -> pd.DataFrame:
    """What is drawn: corpus, method, removed percent, perplexity, standard error, spread over seeds.

    Args:
        dense: evaluations of the dense model.
        curves: method -> removed percent -> evaluations, one a seed.
        suite: its corpora are the panels.

    Raises:
        RankwiseError: an evaluation is of another kind or lacks a corpus.
    """
    points = [(DENSE_METHOD, 0, dense)]
    points += [(method, int(ratio), found) for method, curve in curves.items() for ratio, found in curve.items()]
    records = [
        {"corpus": corpus, "method": method, "removed_percent": ratio, **_value(evaluations, corpus)}
        for corpus in suite.corpora
        for method, ratio, evaluations in points
    ]
    return pd.DataFrame(records).astype({"stderr": "float64", "sd_over_seeds": "float64"})


def draw_perplexity(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `perplexity_frame`; the dense model is a horizontal line with a band of its standard error."""
    corpora = list(dict.fromkeys(frame["corpus"]))
    columns = min(len(corpora), PANELS_IN_A_ROW)
    rows = -(-len(corpora) // columns)
    with style():
        size = (max(PANEL_WIDTH * columns, 3.6), PANEL_HEIGHT * rows + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for axes, corpus in zip(panels, corpora, strict=False):
            _draw_panel(axes, frame[frame["corpus"] == corpus])
            axes.set_title(corpus)
            axes.set_xlabel("removed linear weights (%)")
        for axes in panels[len(corpora) :]:
            axes.remove()
        figure.supylabel(perplexity_label(logarithmic=True), fontsize=8)
        write_title(figure, title, smoke)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=min(len(labels), 2 * columns))
    return figure


def _draw_panel(axes: Axes, frame: pd.DataFrame) -> None:
    logarithmic_axis(axes, list(frame["perplexity"]))
    (dense,) = frame[frame["method"] == DENSE_METHOD].to_dict(orient="records")
    draw_dense(axes, dense["perplexity"], dense["stderr"], DENSE_METHOD)
    compressed = frame[frame["method"] != DENSE_METHOD]
    for index, (name, points) in enumerate(compressed.groupby("method", sort=False)):
        points = points.sort_values("removed_percent")
        axes.errorbar(
            points["removed_percent"],
            points["perplexity"],
            yerr=standard_errors(points["perplexity"], points["stderr"]),
            label=str(name),
            **series_style(index),
        )
    ratios = sorted(set(compressed["removed_percent"]))
    axes.set_xticks(ratios)
    axes.set_xlim(ratios[0] - 5, ratios[-1] + 5)


def _value(evaluations: Sequence[Json], corpus: str) -> dict[str, float | None]:
    for evaluation in evaluations:
        if evaluation["kind"] != "perplexity" or corpus not in evaluation["corpora"]:
            raise RankwiseError(
                f"the evaluation of {evaluation['subject']} holds no perplexity on '{corpus}'; delete it and run again."
            )
    results = [evaluation["corpora"][corpus] for evaluation in evaluations]
    estimate = over_seeds([result["perplexity"] for result in results], [result["stderr"] for result in results])
    return {"perplexity": estimate.value, "stderr": estimate.stderr, "sd_over_seeds": estimate.sd_over_seeds}

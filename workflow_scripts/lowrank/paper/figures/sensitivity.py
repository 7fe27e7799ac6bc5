"""Perplexity when one type of matrix alone is compressed, against its kept ratio (Figure 1 of the paper)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lowrank.errors import RankwiseError
from lowrank.paper.figures.style import (
    draw_dense,
    is_wide,
    logarithmic_axis,
    perplexity_label,
    series_style,
    standard_errors,
    style,
    write_title,
)
from lowrank.paper.tables.data import Json

DENSE_TYPE = "dense"


def sensitivity_frame(result: Json) -> pd.DataFrame:
    """What is drawn: type, kept ratio, perplexity, standard error, removed share of all decoder linears.

    Raises:
        RankwiseError: the result is of another kind.
    """
    if result.get("kind") != "sensitivity":
        raise RankwiseError(f"a result of kind '{result.get('kind')}' was given to a figure of sensitivity.")
    dense = {"type": DENSE_TYPE, "kept": 1.0, "removed_of_linears": 0.0, **_value(result["dense"])}
    points = [
        {"type": name, "kept": point["kept"], "removed_of_linears": point["removed"], **_value(point)}
        for name, measured in result["types"].items()
        for point in sorted(measured, key=lambda point: float(point["kept"]))
    ]
    return pd.DataFrame([dense, *points])


def draw_sensitivity(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `sensitivity_frame`: a line a type, the dense model as a band of its standard error."""
    wide = is_wide(list(frame["perplexity"]))
    with style():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.add_subplot()
        if wide:
            logarithmic_axis(axes, list(frame["perplexity"]))
        (dense,) = frame[frame["type"] == DENSE_TYPE].to_dict(orient="records")
        draw_dense(axes, dense["perplexity"], dense["stderr"], DENSE_TYPE)
        series = frame[frame["type"] != DENSE_TYPE].groupby("type", sort=False)
        for index, (name, points) in enumerate(series):
            axes.errorbar(
                points["kept"],
                points["perplexity"],
                yerr=standard_errors(points["perplexity"], points["stderr"]),
                label=str(name),
                **series_style(index),
            )
        axes.set_xlabel("kept ratio of the compressed type")
        axes.set_ylabel(perplexity_label(wide))
        write_title(figure, title, smoke)
        figure.legend(loc="outside right center", frameon=False, title="compressed", alignment="left")
    return figure


def _value(measured: Json) -> Json:
    return {"perplexity": measured["perplexity"], "stderr": measured["stderr"]}

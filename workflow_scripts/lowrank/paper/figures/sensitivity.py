"""Perplexity when one type of matrix alone is compressed, against its kept ratio (Figure 1 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.paper.figures.axes import (
    TICKS_UP,
    draw_dense,
    is_wide,
    perplexity_label,
    readable_ticks,
    standard_errors,
)
from lowrank.paper.figures.panels import label_axes, legend_below, legend_entries, panel_grid, write_title
from lowrank.paper.figures.style import series_style, style
from lowrank.paper.tables.data import Json

DENSE_TYPE = "dense"
PANEL_HEIGHT = 2.5  # inches


def sensitivity_frame(results: Mapping[str, Json]) -> pd.DataFrame:
    """What is drawn: study, model, text, type, kept ratio, removed share of all decoder linears, perplexity, its error.

    Args:
        results: study -> what it measured.

    Raises:
        RankwiseError: there is no result, or one is of another kind.
    """
    if not results:
        raise RankwiseError("a figure of sensitivity needs at least one study; name one in its `sensitivity`.")
    records = [record for study, result in results.items() for record in _records(study, result)]
    return pd.DataFrame(records).astype({"perplexity": "float64", "stderr": "float64"})


def draw_sensitivity(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `sensitivity_frame`: a panel a study, a line a type that looks the same in all panels.

    The dense model is a horizontal line with a band of its standard error. All panels are logarithmic where one has
    a wide range, each with its own limits, since models differ in perplexity more than types do.
    """
    studies = list(dict.fromkeys(frame["study"]))
    parts = {study: frame[frame["study"] == study] for study in studies}
    wide = any(is_wide(list(part["perplexity"])) for part in parts.values())
    order = _type_order(frame)
    with style():
        figure, panels = panel_grid(len(studies), PANEL_HEIGHT)
        for axes, (study, part) in zip(panels, parts.items(), strict=True):
            _draw_panel(axes, part, order, wide)
            axes.set_title(_panel_title(frame, study))
        label_axes(panels, "kept ratio of the compressed type", perplexity_label(wide))
        write_title(figure, title, smoke)
        found = legend_entries(panels)
        legend_below(figure, {name: found[name] for name in [DENSE_TYPE, *order]}, _text_notes(frame))
    return figure


def _text_notes(frame: pd.DataFrame) -> list[str]:
    """On which text perplexities are; with the study where they are not all on one."""
    texts = {
        str(about["study"]): f"{about['corpus']}, {about['windows']} windows of {about['length']} tokens"
        for about in frame.drop_duplicates("study").to_dict(orient="records")
    }
    if len(set(texts.values())) == 1:
        return [f"text: {next(iter(texts.values()))}"]
    return [f"{study}: {text}" for study, text in texts.items()]


def _records(study: str, result: Json) -> list[Json]:
    if result.get("kind") != "sensitivity":
        raise RankwiseError(
            f"sensitivity.{study}: a result of kind '{result.get('kind')}' was given to a figure of sensitivity. "
            "Delete it and run the workflow again."
        )
    text = {key: result["protocol"][key] for key in ("corpus", "windows", "length")}
    about = {"study": study, "model": result["subject"]["model"], **text}
    dense = {"type": DENSE_TYPE, "kept": 1.0, "removed_of_linears": 0.0, **_value(result["dense"])}
    points = [
        {"type": name, "kept": point["kept"], "removed_of_linears": point["removed"], **_value(point)}
        for name, measured in result["types"].items()
        for point in sorted(measured, key=lambda point: float(point["kept"]))
    ]
    return [about | record for record in [dense, *points]]


def _type_order(frame: pd.DataFrame) -> dict[str, int]:
    """Type -> number of its look, the same in every figure: the order in which the families list their types."""
    known = dict.fromkeys(linear.name for family in FAMILIES.values() for linear in family.types)
    drawn = set(frame["type"]) - {DENSE_TYPE}
    return {name: index for index, name in enumerate(known) if name in drawn}


def _panel_title(frame: pd.DataFrame, study: str) -> str:
    """The model; with the study where several are about one model."""
    names = frame[["study", "model"]].drop_duplicates()
    (model,) = names[names["study"] == study]["model"]
    alone = list(names["model"]).count(model) == 1
    return str(model) if alone else f"{model}\n{study}"


def _draw_panel(axes: Axes, frame: pd.DataFrame, order: Mapping[str, int], wide: bool) -> None:
    if wide:
        axes.set_yscale("log")
    (dense,) = frame[frame["type"] == DENSE_TYPE].to_dict(orient="records")
    draw_dense(axes, dense["perplexity"], dense["stderr"], DENSE_TYPE)
    for name, points in frame[frame["type"] != DENSE_TYPE].groupby("type", sort=False):
        axes.errorbar(
            points["kept"],
            points["perplexity"],
            yerr=standard_errors(points["perplexity"], points["stderr"]),
            label=str(name),
            **series_style(order[str(name)]),
        )
    readable_ticks(axes.yaxis, TICKS_UP)


def _value(measured: Json) -> Json:
    return {"perplexity": measured["perplexity"], "stderr": measured["stderr"]}

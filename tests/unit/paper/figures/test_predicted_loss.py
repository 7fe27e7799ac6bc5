"""Predicted against measured losses: the CSV is what is drawn, marks beyond an axis are hollow, no texts collide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.paper.figures.panels import DOUBLE_COLUMN, SINGLE_COLUMN
from lowrank.paper.figures.predicted_loss import EQUAL, draw_predicted_loss, predicted_loss_frame
from tests.unit.paper.figures import figure_samples as samples
from tests.unit.paper.figures.figure_samples import Json


def truncations(
    family: str = "llama", seed: int = 0, stderr: float | None = 0.002, spearman: float | None = 0.9
) -> Json:
    """Rises that were predicted well but for noise; of small ones, some measured values are below zero."""
    draw = np.random.default_rng(seed)
    records = []
    for linear in FAMILIES[family].types:
        for layer in range(4):
            predicted = float(np.exp(draw.normal(-5, 1.5)))
            measured = predicted * float(np.exp(draw.normal(0, 0.4))) + float(draw.normal(0, 0.001))
            records.append(
                {
                    "module": f"layers.{layer}.{linear.path}",
                    "type": linear.name,
                    "layer": layer,
                    "rank": 16,
                    "of_rank": 64,
                    "predicted": predicted,
                    "measured": measured,
                    "stderr": stderr,
                }
            )
    records[0] |= {"measured": -0.001}
    records[1] |= {"predicted": 1e-12}
    found = {"all": spearman, "by_type": {}}
    return {"kind": "truncations", "subject": {"model": "m"}, "truncations": records, "spearman": found}


def frame_of(count: int = 2, **options: Any) -> Any:
    return predicted_loss_frame({f"preset-{index}": truncations(seed=index, **options) for index in range(count)})


def marks(axes: Axes) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Filled and hollow marks of a panel."""
    filled, hollow = [], []
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line = container[0]
        empty = line.get_markerfacecolor() == "white"
        (hollow if empty else filled).extend(zip(*map(np.asarray, line.get_data()), strict=True))
    return filled, hollow


def test_the_frame_holds_every_trial_and_the_correlation() -> None:
    frame = frame_of(spearman=0.875)
    assert list(frame.columns) == [
        *("covariance", "model", "module", "type", "layer", "rank", "of_rank"),
        *("predicted", "measured", "stderr", "spearman"),
    ]
    assert len(frame) == 2 * 7 * 4
    assert set(frame["spearman"]) == {0.875}
    expected = truncations(seed=1)["truncations"][5]
    row = frame[frame["covariance"] == "preset-1"].iloc[5]
    assert {key: row[key] for key in expected} == expected


def test_marks_stand_where_the_frame_says_or_hollow_at_the_end_of_an_axis() -> None:
    frame = frame_of()
    figure = draw_predicted_loss(frame, "Title")
    for axes, name in zip(figure.axes, ["preset-0", "preset-1"], strict=True):
        part = frame[frame["covariance"] == name]
        points = list(zip(part["predicted"], part["measured"], strict=True))
        filled, hollow = marks(axes)
        end = axes.get_xlim()[0] * 1.5
        assert axes.get_xlim() == axes.get_ylim() == figure.axes[0].get_xlim()
        assert sorted(filled) == sorted(point for point in points if min(point) > end)
        clipped = [(max(x, end), max(y, end)) for x, y in points if min(x, y) <= end]
        assert np.allclose(sorted(hollow), sorted(clipped))
        assert len(hollow) >= 2
        assert axes.get_title() == f"{name}\nrank correlation 0.90"
        (line,) = (line for line in axes.get_lines() if line.get_label() == EQUAL)
        assert list(line.get_xdata()) == list(line.get_ydata())


def test_types_look_alike_in_all_panels_and_the_legend_names_each_once() -> None:
    figure = draw_predicted_loss(frame_of(), "Title")
    legend = samples.legend(figure)
    assert legend == [EQUAL, "q", "k", "v", "o", "gate", "up", "down"]
    (box,) = figure.legends
    assert box.get_title().get_text().split("\n") == [
        "predicted: second order, on the calibration text; measured: on other text",
        "hollow marks: at or beyond the end of an axis",
    ]
    first, second = (samples.looks(axes) for axes in figure.axes)
    shared = set(legend[1:])
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}
    assert len({first[name][:2] for name in shared}) == 7


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_texts_collide_or_are_cut_off(count: int, family: str) -> None:
    figure = draw_predicted_loss(frame_of(count, family=family, stderr=None), "A title of some length", smoke=True)
    assert samples.texts_outside(figure) == []
    assert figure.get_figwidth() == (SINGLE_COLUMN if count == 1 else DOUBLE_COLUMN)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert samples.overlaps(samples.tick_boxes(axis)) == 0
            assert len(samples.tick_boxes(axis)) >= 2


def test_without_a_correlation_it_says_so() -> None:
    figure = draw_predicted_loss(frame_of(1, spearman=None), "Title")
    assert figure.axes[0].get_title() == "preset-0\nno rank correlation"


def test_what_is_no_result_of_truncations_is_refused() -> None:
    with pytest.raises(RankwiseError, match="at least one covariance"):
        predicted_loss_frame({})
    with pytest.raises(RankwiseError, match="truncations with 'a': a result of kind 'sensitivity'"):
        predicted_loss_frame({"a": truncations() | {"kind": "sensitivity"}})
    nothing = truncations()
    for record in nothing["truncations"]:
        record |= {"predicted": 0.0, "measured": 0.0}
    with pytest.raises(RankwiseError, match="no rise was predicted and none was measured"):
        draw_predicted_loss(predicted_loss_frame({"a": nothing}), "Title")

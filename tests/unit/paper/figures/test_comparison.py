"""The comparison of rows: numbers, order and names of rows, values beside their marks, texts that do not collide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation

from lowrank.errors import RankwiseError
from lowrank.paper.figures.comparison import comparison_frame, draw_comparison
from lowrank.paper.figures.panels import DOUBLE_COLUMN, SINGLE_COLUMN
from lowrank.paper.tables.data import RowResults
from tests.unit.paper.figures import figure_samples as samples
from tests.unit.paper.figures.figure_samples import compared, dense

OBJECTIVES = [
    dense(),
    compared([7.1, 7.3, 7.0], label="perplexity only"),
    compared([6.9, 7.0, 6.8], method="b", label="perplexity + forward KL, summed over a sequence of 4096 tokens"),
    compared([6.5], tuning="alpaca-scales"),
]
MANY = [
    *OBJECTIVES,
    compared([9.5], method="lord"),
    compared([12.5, 12.1, 14.0], ratio=30, label="transfer from opt-1.3b"),
    dense(10.8, "opt-6.7b"),
    compared([15.2], model="opt-6.7b", label="a name without any space that_is_longer_than_a_line_of_the_label_can_be"),
    compared([3e7], model="opt-6.7b", method="svd"),
]


def frame_of(rows: list[RowResults], corpora: int = 3) -> Any:
    return comparison_frame(rows, samples.SUITE, samples.suite(corpora))


def values(axes: Axes) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation)]


def names(axes: Axes) -> list[str]:
    return [label.get_text().replace("\n", " ").replace("\u00a0", " ") for label in axes.get_yticklabels()]


def test_the_frame_holds_every_row_and_corpus_with_its_errors() -> None:
    frame = frame_of(MANY)
    assert list(frame.columns) == [
        *("model", "label", "method", "tuning", "ratio", "kept_percent", "corpus"),
        *("perplexity", "stderr", "sd_over_seeds"),
    ]
    assert len(frame) == 3 * len(MANY)
    row = frame[(frame["label"] == "perplexity only") & (frame["corpus"] == "ptb-test")].iloc[0]
    levels = 4 * np.array([7.1, 7.3, 7.0])
    assert row["perplexity"] == pytest.approx(levels.mean())
    assert row["stderr"] == pytest.approx(0.02 * levels.mean())
    assert row["sd_over_seeds"] == pytest.approx(levels.std(ddof=1))
    assert frame[frame["label"] == "lord"]["sd_over_seeds"].isna().all()
    assert set(frame[frame["tuning"] == "alpaca-scales"]["label"]) == {"bolaco + alpaca-scales"}


def test_marks_stand_at_the_values_of_the_frame_beside_their_names() -> None:
    frame = frame_of(MANY)
    figure = draw_comparison(frame, "Title")
    for axes, corpus in zip(figure.axes, samples.CORPORA, strict=True):
        part = frame[frame["corpus"] == corpus]
        places = dict(zip(axes.get_yticks(), names(figure.axes[0]), strict=True))
        points = [point for container in axes.containers for point in zip(*container[0].get_data(), strict=True)]
        # A label without spaces is broken within words.
        marks = {x: places[y].replace(" ", "") for x, y in points}
        assert marks == dict(zip(part["perplexity"], part["label"].str.replace(" ", ""), strict=True))


def test_rows_stand_in_blocks_of_one_model_and_ratio_below_the_dense_row() -> None:
    shuffled = [MANY[index] for index in (4, 5, 0, 8, 1, 6)]
    figure = draw_comparison(frame_of(shuffled), "Title")
    axes = figure.axes[0]
    assert names(axes) == [
        *("llama-2-7b, 20 % removed", "dense", "lord", "perplexity only"),
        *("llama-2-7b, 30 % removed", "transfer from opt-1.3b"),
        *("opt-6.7b, 20 % removed", "dense", "svd"),
    ]
    weights = [label.get_fontweight() == "bold" for label in axes.get_yticklabels()]
    assert weights == [text.endswith("removed") for text in names(axes)]
    assert list(axes.get_yticks()) == sorted(axes.get_yticks())
    assert axes.yaxis_inverted()


def test_the_dense_line_runs_through_all_rows_of_its_model_and_no_others() -> None:
    figure = draw_comparison(frame_of(MANY, 1), "Title")
    (axes,) = figure.axes
    rows = dict(zip(names(axes), axes.get_yticks(), strict=True))
    lines = [
        segment for lines in axes.collections if lines.get_linewidth()[0] == 1.0 for segment in lines.get_segments()
    ]
    (llama, opt) = sorted(lines, key=lambda line: line[0][0])
    assert (llama[0][0], opt[0][0]) == (5.5, 10.8)
    assert rows["transfer from opt-1.3b"] < llama[1][1] < rows["opt-6.7b, 20 % removed"]
    assert opt[0][1] > rows["opt-6.7b, 20 % removed"]
    assert opt[1][1] > rows["svd"]


def test_values_are_printed_and_fit_between_their_mark_and_the_edge_of_the_panel() -> None:
    figure = draw_comparison(frame_of(MANY), "Title")
    samples.settle(figure)
    for axes in figure.axes:
        panel = axes.get_window_extent()
        assert len(values(axes)) == len(MANY)
        for text in values(axes):
            box = text.get_window_extent()
            assert panel.x0 <= box.x0
            assert box.x1 <= panel.x1 + 1
            assert box.x0 > axes.transData.transform(text.xy)[0]
    assert [text.get_text() for text in values(figure.axes[0])][-1] == "3.0e7"


@pytest.mark.parametrize(
    ("rows", "corpora"), [(OBJECTIVES, 1), (OBJECTIVES, 2), (MANY, 1), (MANY, 3), (MANY[1:2], 3), (MANY[:1], 1)]
)
def test_no_texts_collide_or_are_cut_off(rows: list[RowResults], corpora: int) -> None:
    figure = draw_comparison(frame_of(rows, corpora), "Title", smoke=True)
    assert samples.texts_outside(figure) == []
    assert min(text.get_fontsize() for text in samples.texts(figure)) >= 7
    assert figure.get_figwidth() == (SINGLE_COLUMN if corpora == 1 else DOUBLE_COLUMN)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert samples.overlaps(samples.tick_boxes(axis)) == 0
        assert samples.overlaps([text.get_window_extent() for text in values(axes)]) == 0
        assert len(samples.tick_boxes(axes.xaxis)) >= 2


def test_all_panels_are_logarithmic_where_one_is_wide() -> None:
    for rows, scale in ((OBJECTIVES, "linear"), (MANY, "log")):
        figure = draw_comparison(frame_of(rows), "Title")
        assert {axes.get_xscale() for axes in figure.axes} == {scale}
        assert ("log scale" in figure.axes[0].get_xlabel()) == (scale == "log")


def test_the_legend_names_tunings_only_where_they_differ() -> None:
    assert samples.legend(draw_comparison(frame_of(OBJECTIVES), "Title")) == ["as compressed", "+ alpaca-scales"]
    figure = draw_comparison(frame_of([dense(), compared([7.0])]), "Title")
    assert figure.legends == []
    looks = samples.looks(draw_comparison(frame_of(OBJECTIVES), "Title").axes[0])
    assert looks["as compressed"][:2] != looks["+ alpaca-scales"][:2]


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(RankwiseError, match="at least one row"):
        frame_of([])
    twice = [compared([7.0], place="figures.f.rows[0]"), compared([7.0], place="figures.f.rows[1]")]
    with pytest.raises(RankwiseError, match=r"figures\.f\.rows\[1\]: 'bolaco' of llama-2-7b at 20 %.*rows\[0\]"):
        frame_of(twice)
    other = compared([7.0])
    other.evaluations[samples.SUITE][0]["subject"]["method"] = "lord"
    with pytest.raises(RankwiseError, match=r"figures\.f\.rows\[0\]: the evaluation 'held-out'"):
        frame_of([other])
    with pytest.raises(RankwiseError, match="no evaluation with suite 'other'"):
        comparison_frame([compared([7.0])], "other", samples.suite())
    missed = compared([7.0])
    missed.manifests[0]["parameters"]["decoder_linears"] = 82
    with pytest.raises(RankwiseError, match=r"figures\.f\.rows\[0\]: bolaco removed 18\.00 %"):
        frame_of([missed])
    lacking = compared([7.0])
    del lacking.evaluations[samples.SUITE][0]["corpora"]["ptb-test"]
    with pytest.raises(RankwiseError, match="holds no perplexity on 'ptb-test'"):
        frame_of([lacking])

"""Drawings: values stand where the axes say, on the best measure of size that is known of all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lowrank.errors import RankwiseError
from lowrank.paper.page.board import leader_board
from lowrank.paper.page.results import checkpoints
from lowrank.paper.page.scatter import Axis, Scatter, scatters
from lowrank.paper.page.verdict import verdicts
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.measures import measures_of
from tests.unit.paper.paper_samples import PERPLEXITY, context, dense_results, evidence, row_results

MEASURES = measures_of(context())


def drawn(*rows: RowResults, vocabulary: int = 1000) -> list[Scatter]:
    found = checkpoints(evidence(*rows), ["tiny"], MEASURES)
    return scatters(found, MEASURES, {"tiny": vocabulary})["tiny"]["wiki_test"]


def unmeasured(results: RowResults) -> RowResults:
    del results.evaluations["cost"]  # type: ignore[attr-defined]
    return results


def test_a_value_stands_where_its_axis_says() -> None:
    axis = Axis(10, 1000, 300, 0, logarithmic=True)
    assert [axis.place(value) for value in (10, 100, 1000)] == [300, 150, 0]
    assert (150.0, "100") in axis.ticks
    assert Axis(0, 10, 50, 150).place(2.5) == 75


def test_points_have_error_bars_of_the_loss() -> None:
    size = drawn(dense_results(0.8), row_results(0.5))[0]
    point = size.points[1]
    assert point.title == "lord, 20 % removed: perplexity 20.00 ± 0.40, weights (MiB) 3.8"
    up, down = point.y - point.top, point.bottom - point.y
    assert up == pytest.approx(down, abs=0.2), "equally long on a logarithmic axis"
    scale = (size.y.start - size.y.end) / math.log(size.y.high / size.y.low)
    assert up == pytest.approx(0.02 * scale, abs=0.2)


@pytest.mark.parametrize(
    ("row", "label"),
    [
        (row_results(), "weights (MiB)"),
        (unmeasured(row_results()), "parameters (M)"),
    ],
)
def test_the_size_is_one_that_is_known_of_all(row: RowResults, label: str) -> None:
    assert drawn(dense_results(), row)[0].x_label == label


def test_a_row_without_its_manifest_is_not_taken_for_dense() -> None:
    for other, results in ((row_results(), dense_results()), (dense_results(), row_results())):
        with pytest.raises(RankwiseError, match="no manifest of the compression"):
            drawn(other, replace(unmeasured(results), manifests=[]))


def test_suites_of_one_corpus_are_drawn_each() -> None:
    suites = {"ppl": PERPLEXITY, "long": PERPLEXITY.model_copy(update={"length": 512})}
    measures = measures_of(context(suites=suites))
    rows = [dense_results(0.8), row_results(0.5)]
    for results in rows:
        results.evaluations["long"] = results.evaluations["ppl"]  # type: ignore[index]
    found = checkpoints(evidence(*rows), ["tiny"], measures)
    corpora = [f"{corpus} ({suite})" for suite in suites for corpus in PERPLEXITY.corpora]
    assert list(scatters(found, measures, {"tiny": 1000})["tiny"]) == corpora
    titles = [column.title for column in leader_board(found, measures).columns]
    assert [f"ppl {corpus}" for corpus in corpora] == [title for title in titles if title.startswith("ppl")]
    (verdict,) = verdicts(found, measures, {"tiny": 1000})
    assert [winner.corpus for winner in verdict.winners] == corpora


def test_speeds_are_drawn_of_those_that_have_one() -> None:
    plots = drawn(dense_results(), row_results(), unmeasured(row_results(method="svd")))
    assert [(plot.x_label, len(plot.points), plot.missing) for plot in plots] == [
        ("parameters (M)", 3, 0),
        ("generation (tokens/s)", 2, 1),
        ("prompt (tokens/s)", 2, 1),
    ]


def test_what_is_no_better_than_a_guess_does_not_stretch_the_axis() -> None:
    plot = drawn(dense_results(0.8), row_results(0.5), row_results(0.0001, method="svd"))[0]
    assert [point.beyond for point in plot.points] == [False, False, True]
    assert plot.points[2].y == plot.y.end
    assert plot.y.high < 30


def test_labels_stand_beside_their_marks_inside_the_axes_and_not_on_one_another() -> None:
    rows = [row_results(0.5), row_results(0.49, method="svd")]
    slow = row_results(0.5, removed=20.3, method="flap", tuning="scales")
    slow.evaluations["cost"][0]["measured"]["prefill_tokens_per_second"] = 100.0
    for plot in drawn(dense_results(0.8), *rows, slow):
        labelled = [point for point in plot.points if point.label is not None]
        assert [point.label.text for point in labelled if point.label] == ["20 %"] * 3, "none of the dense model"
        boxes = [point.label.box for point in labelled if point.label]
        assert all(plot.x.start <= box.left and box.right <= plot.x.end for box in boxes)
        assert all(one.overlap(other) == 0 for index, one in enumerate(boxes) for other in boxes[:index])
        for point, box in zip(labelled, boxes, strict=True):
            assert max(box.left - point.x, point.x - box.right) == 8, "beside its mark"

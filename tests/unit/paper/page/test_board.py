"""The leader board: columns of what was measured, and numbers to sort by."""

from __future__ import annotations

from dataclasses import replace

from lowrank.paper.page.board import leader_board
from lowrank.paper.page.results import checkpoints
from lowrank.paper.tables.measures import measures_of
from tests.unit.paper.paper_samples import ZERO_SHOT, context, dense_results, evidence, manifest, row_results

MEASURES = measures_of(context())


def test_a_line_has_all_that_was_measured_and_numbers_to_sort_by() -> None:
    rows = [dense_results(), row_results(0.5)]
    board = leader_board(checkpoints(evidence(*rows), ["tiny"], MEASURES), MEASURES)
    keys = [column.key for column in board.columns]
    assert keys[:4] == ["kept", "wiki_test_perplexity", "speeches_perplexity", "average"]
    cells = dict(zip(keys, board.lines[1].cells, strict=True))
    assert (cells["wiki_test_perplexity"].text, cells["wiki_test_perplexity"].value) == ("20.00 ± 0.40", 20.0)
    assert (cells["weight_bytes"].text, cells["weight_bytes"].value) == ("3.8 MiB", 4_000_000)
    rising = {column.key for column in board.columns if column.rising}
    assert rising == {"wiki_test_perplexity", "speeches_perplexity", "parameters", "weight_bytes"}


def test_columns_are_left_out_only_where_nobody_has_a_value() -> None:
    rows = [dense_results(), row_results()]
    del rows[1].evaluations["cost"]  # type: ignore[attr-defined]
    board = leader_board(checkpoints(evidence(*rows), ["tiny"], MEASURES), MEASURES)
    cells = dict(zip([column.key for column in board.columns], board.lines[1].cells, strict=True))
    assert (cells["weight_bytes"].text, cells["weight_bytes"].value) == ("–", None)
    del rows[0].evaluations["cost"]  # type: ignore[attr-defined]
    rows[0] = replace(rows[0], manifests=[manifest(rows[0].row, 0)])
    board = leader_board(checkpoints(evidence(*rows), ["tiny"], MEASURES), MEASURES)
    assert "weight_bytes" not in [column.key for column in board.columns]


def test_averages_of_several_suites_of_tasks_are_told_apart() -> None:
    measures = measures_of(context(suites={"zs": ZERO_SHOT, "few": ZERO_SHOT.model_copy(update={"limit": 5})}))
    rows = [dense_results(), row_results()]
    for results in rows:
        results.evaluations["few"] = results.evaluations["zs"]  # type: ignore[index]
    board = leader_board(checkpoints(evidence(*rows), ["tiny"], measures), measures)
    assert [column.title for column in board.columns][1:3] == ["tasks (zs, %)", "tasks (few, %)"]

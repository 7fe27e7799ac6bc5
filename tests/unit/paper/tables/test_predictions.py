"""Predicted rises of the loss in tables of accuracy: beside the measured ones, with a note that says what they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lowrank.config.outputs import RowTable
from lowrank.paper.tables import RowResults, TableData, build_table
from tests.unit.paper.paper_samples import ZERO_SHOT, context, dense_results, manifest, row_results

MEANING = "second order, on the calibration text"


def build(rows: list[RowResults], **changes: Any) -> TableData:
    table = RowTable(kind="accuracy", title="Title", rows=[results.row for results in rows])
    return build_table(table, rows, context(**changes))


def records(rows: list[RowResults]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = build(rows).frame.to_dict(orient="records")
    return found


def predicting(results: RowResults, *nats: float) -> RowResults:
    said = [{"predicted_loss_rise": {"nats_per_token": value, "meaning": MEANING}} for value in nats]
    return replace(results, manifests=[one | more for one, more in zip(results.manifests, said, strict=True)])


def test_a_prediction_stands_beside_what_was_measured() -> None:
    rows = [dense_results(0.6), predicting(row_results(0.5, method="rankwise"), 0.067), row_results(0.4)]
    dense, ours, other = records(rows)
    assert ours["predicted_loss_rise"] == 0.067
    for corpus in ("wiki_test", "speeches"):
        assert ours[f"{corpus}_loss_rise"] == pytest.approx(math.log(0.6 / 0.5), rel=1e-12)
        assert other[f"{corpus}_loss_rise"] == pytest.approx(math.log(0.6 / 0.4), rel=1e-12)
        assert dense[f"{corpus}_loss_rise"] is None
    assert dense["predicted_loss_rise"] is other["predicted_loss_rise"] is None
    (note,) = (note for note in build(rows).notes if "predicted_loss_rise" in note)
    assert MEANING in note
    assert "measured" in note


def test_seeds_are_averaged() -> None:
    rows = [dense_results(0.5), predicting(row_results(0.5, method="rankwise", seeds=2), 0.1, 0.2)]
    ours = records(rows)[1]
    assert ours["predicted_loss_rise"] == pytest.approx(0.15)
    values = [entry["corpora"]["wiki_test"]["perplexity"] for entry in rows[1].evaluations["ppl"]]
    assert ours["wiki_test_loss_rise"] == pytest.approx(sum(math.log(value / 20) for value in values) / 2)


def test_a_trained_row_has_no_prediction_and_none_is_measured_without_its_dense_model() -> None:
    tuned = predicting(row_results(0.5, method="rankwise", tuning="alpaca"), 0.067)
    tuned = replace(tuned, manifests=[*tuned.manifests, {**manifest(tuned.row, 20), "training": {}}])
    plain = predicting(row_results(0.4, method="rankwise", model="other"), 0.1)
    trained, alone, dense = records([tuned, plain, dense_results(0.6)])
    assert trained["predicted_loss_rise"] is None
    assert trained["wiki_test_loss_rise"] == pytest.approx(math.log(0.6 / 0.5))
    assert (alone["predicted_loss_rise"], alone["wiki_test_loss_rise"]) == (0.1, None)
    assert dense["wiki_test_loss_rise"] is None


def test_a_table_without_a_prediction_is_as_it_was() -> None:
    table = build([dense_results(), row_results()])
    assert not [name for name in table.frame.columns if "loss_rise" in name]
    assert not [note for note in table.notes if "loss_rise" in note]


def test_a_table_of_accuracy_alone_says_nothing_of_losses() -> None:
    rows = [dense_results(0.6), predicting(row_results(0.5, method="rankwise"), 0.067)]
    assert not [note for note in build(rows, suites={"zs": ZERO_SHOT}).notes if "loss" in note]

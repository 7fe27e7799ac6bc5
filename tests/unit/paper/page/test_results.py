"""Checkpoints of a run, collected from its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.paper.page.results import DECODE, PARAMETERS, PREFILL, SIZE, Checkpoint, checkpoints
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.measures import measures_of
from tests.unit.paper.paper_samples import context, dense_results, evidence, manifest, row_results, sensitivity

MEASURES = measures_of(context())


def collected(*rows: RowResults) -> list[Checkpoint]:
    found = evidence(*rows) | {Path("sensitivity/types.json"): sensitivity()}
    return checkpoints(found, ["tiny"], MEASURES)


def test_checkpoints_have_all_that_was_measured_of_them_over_seeds() -> None:
    found = collected(row_results(0.5, seeds=3, ratio=30), dense_results(0.6), row_results(0.5, removed=19.0))
    assert [(each.row.method, each.row.ratio) for each in found] == [("dense", 0), ("lord", 20), ("lord", 30)]
    assert found[2].values["wiki_test_perplexity"].value == pytest.approx(20.01)
    assert found[2].values["wiki_test_perplexity"].sd_over_seeds == pytest.approx(0.01)
    assert found[1].values["boolq"].value == pytest.approx(50)
    assert (found[0].kept, found[1].kept) == pytest.approx((100, 81))
    assert found[1].cost[SIZE] == 4 * (200_000 + 810_000)
    assert (found[1].cost[PREFILL], found[1].cost[DECODE]) == (269.0, 12.5)


def test_without_a_cost_the_manifest_counts() -> None:
    results = row_results(removed=20)
    del results.evaluations["cost"]  # type: ignore[attr-defined]
    (found,) = collected(results)
    assert found.cost == {PARAMETERS: 1_000_000}
    assert found.kept == pytest.approx(80)


def test_what_was_tuned_counts_by_its_own_manifest() -> None:
    before, after = row_results(removed=20), row_results(removed=20, tuning="scales")
    del after.evaluations["cost"]  # type: ignore[attr-defined]
    after.manifests[:] = [manifest(after.row, 19.5) | {"training": {}}]  # type: ignore[index]
    assert [each.kept for each in collected(before, after)] == pytest.approx([80, 80.5])


def test_a_checkpoint_that_nobody_judged_is_left_out() -> None:
    results = row_results()
    results.evaluations.clear()  # type: ignore[attr-defined]
    assert collected(results) == []

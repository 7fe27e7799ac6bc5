"""What came out: winners that stand out, prices, and what they change."""

from __future__ import annotations

import math

import pytest

from lowrank.paper.page.results import checkpoints
from lowrank.paper.page.verdict import Change, Verdict, verdicts
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.measures import measures_of
from tests.unit.paper.paper_samples import context, dense_results, evidence, row_results

MEASURES = measures_of(context())


def told(*rows: RowResults, vocabulary: int = 1000) -> list[Verdict]:
    return verdicts(checkpoints(evidence(*rows), ["tiny"], MEASURES), MEASURES, {"tiny": vocabulary})


def test_the_lowest_perplexity_of_each_ratio_its_price_and_what_it_changes() -> None:
    (at_20, at_30) = told(
        dense_results(0.8), row_results(0.5), row_results(0.4, method="svd"), row_results(0.25, ratio=30)
    )
    assert (at_20.ratio, at_20.compared, at_30.ratio) == (20, 2, 30)
    winner = at_20.winners[0]
    assert (winner.corpus, winner.title, winner.perplexity) == ("wiki_test", "lord", "20.00 ± 0.40")
    assert winner.price == "× 1.60", "20.0 of 12.5"
    assert winner.rise == f"+{math.log(1.6):.3f} ± 0.000", "windows rise alike"
    assert (winner.ahead, winner.by) == ("svd", f"by {math.log(1.25):.3f} ± 0.000")
    assert winner.clear
    assert at_20.changes["lord"][:2] == [
        Change("weights in memory", "4.6 MiB", "3.8 MiB", "−17 %", worse=False, counted=True),
        Change("tokens/s of a prompt", "250.0", "270.0", "× 1.08", worse=False, counted=False),
    ]
    assert at_30.winners[0].ahead == "no other row to compare with"
    assert not at_30.winners[0].clear


def test_rows_that_the_windows_do_not_tell_apart_are_named() -> None:
    rows = [row_results(0.5), row_results(0.499, method="svd"), row_results(0.3, method="afm")]
    for found in rows[1].evaluations["ppl"][0]["corpora"].values():
        found["window_nll"] = found["window_nll"][::-1]
    winner = told(*rows)[0].winners[0]
    assert winner.ahead == "not told apart from svd"
    assert not winner.clear


def test_even_the_best_may_be_a_guess() -> None:
    (verdict,) = told(dense_results(), row_results(0.5), row_results(0.4, method="svd"), vocabulary=20)
    assert verdict.winners[0].guess
    assert not verdict.winners[0].clear
    assert verdict.changes == {}, "it buys nothing"


@pytest.mark.parametrize(("speed", "worse"), [(11.0, True), (12.49, False), (14.0, False)])
def test_what_became_slower_is_a_cost(speed: float, worse: bool) -> None:
    row = row_results(0.5)
    row.evaluations["cost"][0]["measured"]["decode_tokens_per_second"] = speed
    (verdict,) = told(dense_results(0.8), row)
    assert verdict.changes["lord"][2].worse == worse, "of 12.5"


def test_a_row_that_keeps_too_much_is_not_ranked() -> None:
    (verdict,) = told(row_results(0.9, removed=10.0, method="svd"), row_results(0.5))
    assert {winner.title for winner in verdict.winners} == {"lord"}
    assert verdict.compared == 1


@pytest.mark.parametrize("missing", ["dense", "cost"])
def test_what_was_not_measured_is_not_told(missing: str) -> None:
    rows = [dense_results(0.8), row_results(0.5)]
    if missing == "dense":
        (verdict,) = told(rows[1])
        assert (verdict.winners[0].price, verdict.changes) == ("", {})
    else:
        del rows[1].evaluations["cost"]  # type: ignore[attr-defined]
        (verdict,) = told(*rows)
        assert verdict.changes["lord"] == [Change("parameters", "1.2 M", "1.0 M", "−17 %", worse=False, counted=True)]

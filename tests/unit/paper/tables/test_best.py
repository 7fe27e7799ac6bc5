"""The value in bold: only where the test set tells it apart from the others, and from a guess."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from lowrank.config.outputs import RowTable
from lowrank.paper.tables import RowResults, build_table
from lowrank.paper.tables.best import best_row, difference, is_ahead
from lowrank.paper.tables.data import Context
from lowrank.paper.tables.differences import Difference
from lowrank.paper.tables.measures import measures_of
from lowrank.paper.tables.rows import Estimate
from tests.unit.paper.paper_samples import PERPLEXITY, SHAPE, context, row_results


def bold(*rows: RowResults, given: Context | None = None) -> dict[str, list[int]]:
    """Heading -> the lines whose value is bold."""
    made = build_table(RowTable(kind="accuracy", title="T", rows=[r.row for r in rows]), rows, given or context())
    return {
        column.title: [number for number, line in enumerate(made.lines) if line.cells[index].best]
        for index, column in enumerate(made.columns)
    }


def losses(level: float, noise: list[float], method: str, tokens: str = "same") -> RowResults:
    """A row whose windows have these losses above `level`, on one corpus."""
    results = row_results(method=method)
    windows = [level + each for each in noise]
    mean = sum(windows) / len(windows)
    stderr = math.sqrt(sum((w - mean) ** 2 for w in windows) / (len(windows) - 1) / len(windows))
    for found in results.evaluations["ppl"][0]["corpora"].values():
        found |= {"perplexity": math.exp(mean), "stderr": stderr * math.exp(mean)}
        found |= {"window_nll": windows, "window_tokens": [255] * len(windows), "tokens_sha256": tokens}
    return results


WIDE = [-1.0, 1.0, -0.5, 0.5]
"""Spread of windows: a standard error of 0.46, of which pairs know nothing."""


def test_a_small_difference_counts_where_all_windows_have_it() -> None:
    same = bold(losses(3.0, WIDE, "lord"), losses(3.1, WIDE, "svd"))
    assert same["wiki_test"] == [0]
    unlike = bold(losses(3.0, WIDE, "lord"), losses(3.1, WIDE[::-1], "svd"))
    assert unlike["wiki_test"] == [], "as large, but windows do not agree on it"


def test_of_other_windows_both_errors_count() -> None:
    assert bold(losses(3.0, WIDE, "lord", "a"), losses(3.1, WIDE, "svd", "b"))["wiki_test"] == []
    assert bold(losses(3.0, WIDE, "lord", "a"), losses(5.0, WIDE, "svd", "b"))["wiki_test"] == [0]


def test_the_best_must_stand_out_from_every_other() -> None:
    rows = [losses(3.0, WIDE, "lord"), losses(3.5, WIDE, "svd"), losses(3.01, WIDE[::-1], "afm")]
    assert bold(*rows[:2])["wiki_test"] == [0]
    assert bold(*rows)["wiki_test"] == []


def test_a_tie_has_no_winner() -> None:
    assert not any(bold(row_results(0.8), row_results(0.8, method="svd")).values())


def zeros(results: RowResults) -> RowResults:
    for found in results.evaluations["zs"][0]["tasks"].values():
        found |= {found["metric"]: 0.0, f"{found['metric']}_stderr": 0.0, "scores": [0] * 20}
    return results


def test_what_a_guess_gets_is_never_bold() -> None:
    found = bold(row_results(0.30), zeros(row_results(0.25, method="svd")))
    assert found["BoolQ"] == found["PIQA"] == found["WinoG."] == [], "of two answers half are right by chance"
    assert found["HellaS."] == found["OBQA"] == [0]


def test_an_accuracy_within_two_errors_of_a_guess_is_not_above_it() -> None:
    rows = [row_results(0.8), row_results(0.7, method="svd")]
    rows[0].evaluations["zs"][0]["tasks"]["piqa"]["acc_stderr"] = 0.2
    assert bold(*rows)["PIQA"] == []
    assert bold(*rows)["BoolQ"] == [0]


def test_a_perplexity_as_large_as_the_vocabulary_is_a_guess() -> None:
    rows = [losses(math.log(SHAPE.vocabulary) + 0.1, WIDE, "lord"), losses(9.0, WIDE, "svd")]
    assert bold(*rows)["wiki_test"] == []
    assert bold(losses(4.0, WIDE, "lord"), rows[1])["wiki_test"] == [0]


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_spread_between_seeds_adds_to_the_error(seeds: int) -> None:
    (measure, *_) = measures_of(Context(suites={"ppl": PERPLEXITY}))
    ours, theirs = row_results(0.5, seeds=seeds), row_results(0.4, method="svd")
    given: tuple[Any, Any] = (Estimate(20.0, 0.4, sd_over_seeds=2.0), Estimate(25.0, 0.5))
    found = difference(ours, theirs, measure, *given)
    losses = [math.log(20 + 0.01 * seed) for seed in range(seeds)]
    expected = statistics.stdev(losses) / math.sqrt(seeds)
    assert found.stderr == pytest.approx(expected), "the pairs of the samples have no error"
    for part in theirs.evaluations["ppl"][0]["corpora"].values():
        part["tokens_sha256"] = "others"
    apart = difference(ours, theirs, measure, *given)
    assert apart.stderr == pytest.approx(math.hypot(0.4 / 20, 0.5 / 25, 2.0 / 20.0 / math.sqrt(seeds)))


def test_a_lower_mean_perplexity_with_a_higher_mean_loss_is_no_winner() -> None:
    (measure, *_) = measures_of(Context(suites={"ppl": PERPLEXITY}))
    assert is_ahead(Difference(-0.5, 0.1), measure)
    assert not is_ahead(Difference(0.5, 0.1), measure)
    assert not is_ahead(Difference(-0.15, 0.1), measure)
    rows = [losses(3.0, [0.0] * 4, "lord"), losses(3.2, [0.0] * 4, "svd")]
    assert best_row(rows, measure, {0: Estimate(20.0), 1: Estimate(21.0)}, {0: False, 1: False}) == 0
    assert best_row(rows, measure, {0: Estimate(22.0), 1: Estimate(21.0)}, {0: False, 1: False}) is None


def test_perplexities_stand_before_tasks_whatever_the_order_of_suites() -> None:
    suites = context().suites
    for given in (suites, dict(reversed(suites.items()))):
        groups = [measure.kind for measure in measures_of(Context(suites=given))]
        assert groups == ["perplexity"] * 2 + ["zero-shot"] * 8

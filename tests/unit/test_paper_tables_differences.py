"""Paired differences between methods, against a plain computation."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_samples import PERPLEXITY, context, row_results

from lowrank.config.outputs import RowTable
from lowrank.errors import RankwiseError
from lowrank.paper.render import to_markdown
from lowrank.paper.tables import RowResults, TableData, build_table

LOSSES = st.lists(st.floats(0.1, 12), min_size=6, max_size=6)


def results_of(method: str, *seeds: list[float], ratio: int = 20, tokens: str = "a") -> RowResults:
    """A row with these losses by window on the first corpus, one list a seed, and the same less 0.05 on the second."""
    results = row_results()
    row = results.row.model_copy(update={"method": method, "ratio": ratio, "label": None})
    evaluations: list[dict[str, Any]] = []
    for seed, losses in enumerate(seeds):
        subject = {"model": row.model, "method": method, "ratio": ratio, "tuning": row.tuning, "seed": seed}
        corpora = {
            corpus: {"window_nll": [loss - 0.05 * index for loss in losses], "tokens_sha256": tokens}
            for index, corpus in enumerate(PERPLEXITY.corpora)
        }
        evaluations.append({"kind": "perplexity", "subject": subject, "corpora": corpora})
    kept = [{"parameters": {"decoder_linears": 1000 - 10 * ratio, "decoder_linears_dense": 1000}}] * len(seeds)
    return RowResults(row=row, evaluations={"ppl": evaluations}, manifests=kept, place=f"rows.{method}")


def build(*rows: RowResults) -> TableData:
    table = RowTable(kind="differences", title="Title", suites=["ppl"], rows=[results.row for results in rows])
    return build_table(table, rows, context(suites={"ppl": PERPLEXITY}))


def by_hand(one: list[float], other: list[float]) -> tuple[float, float]:
    pairs = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))


@settings(deadline=None, max_examples=40)
@given(ours=LOSSES, theirs=LOSSES, again=LOSSES)
def test_differences_are_paired_by_windows_and_averaged_over_seeds(
    ours: list[float], theirs: list[float], again: list[float]
) -> None:
    table = build(results_of("first", ours), results_of("second", theirs, again))
    first, second = table.frame.to_dict(orient="records")
    mean = [(a + b) / 2 for a, b in zip(theirs, again, strict=True)]
    value, stderr = by_hand(mean, ours)
    corpus = PERPLEXITY.corpora[0]
    assert second[f"{corpus}_difference"] == pytest.approx(value, abs=1e-12)
    assert second[f"{corpus}_difference_stderr"] == pytest.approx(stderr, abs=1e-12)
    assert second[f"{corpus}_perplexity_ratio"] == pytest.approx(math.exp(value))
    assert first[f"{corpus}_difference"] == 0
    assert second["reference"] == "first"


def test_what_is_common_to_all_windows_is_no_uncertainty() -> None:
    losses = [1.0, 5.0, 2.0, 9.0]
    worse = [1.51, 5.5, 2.49, 9.5]
    table = build(results_of("first", losses), results_of("second", worse), results_of("third", [5.0, 1.0, 9.0, 2.1]))
    shown = [[cell.text for cell in line.cells] for line in table.lines]
    assert shown[0][3:] == ["reference", "reference"]
    assert shown[1][3] == "0.500 ± 0.004 *"
    assert shown[2][3].startswith("0.025 ±")
    assert not shown[2][3].endswith("*")
    assert "positive: the first is better" in to_markdown(table)


def test_every_ratio_has_its_own_reference() -> None:
    rows = [results_of(m, [x, x + 1], ratio=r) for r in (20, 30) for m, x in (("first", 2.0), ("second", 3.0))]
    table = build(*rows)
    assert list(table.frame["reference"]) == ["first"] * 4
    assert [line.cells[3].text == "reference" for line in table.lines] == [True, False, True, False]
    assert [line.starts_block for line in table.lines] == [False, False, True, False]


def test_one_window_has_no_error_and_other_windows_no_difference() -> None:
    table = build(results_of("first", [1.0]), results_of("second", [1.25]))
    assert table.lines[1].cells[3].text == "0.250"
    with pytest.raises(RankwiseError, match=r"rows\.second: 'wiki_test' was scored on other windows than for 'first'"):
        build(results_of("first", [1.0, 2.0]), results_of("second", [1.0, 2.0], tokens="b"))

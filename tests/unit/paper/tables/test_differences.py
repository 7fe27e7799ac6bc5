"""Paired differences between methods, against a plain computation."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.outputs import RowTable
from lowrank.errors import RankwiseError
from lowrank.paper.render import to_markdown
from lowrank.paper.tables import RowResults, TableData, build_table
from tests.unit.paper.paper_samples import COST, PERPLEXITY, ZERO_SHOT, context, row_results

LOSSES = st.lists(st.floats(0.1, 12), min_size=6, max_size=6)
SCORES = st.fixed_dictionaries({task: st.lists(st.integers(0, 1), min_size=5, max_size=5) for task in ZERO_SHOT.tasks})


def results_of(
    method: str, *seeds: list[float], ratio: int = 20, tokens: str = "a", counts: list[int] | None = None
) -> RowResults:
    """A row with these losses by window on the first corpus, one list a seed, and the same less 0.05 on the second."""
    results = row_results()
    row = results.row.model_copy(update={"method": method, "ratio": ratio, "label": None})
    evaluations: list[dict[str, Any]] = []
    for seed, losses in enumerate(seeds):
        subject = {"model": row.model, "method": method, "ratio": ratio, "tuning": row.tuning, "seed": seed}
        corpora = {
            corpus: {
                "window_nll": [loss - 0.05 * index for loss in losses],
                "perplexity": math.exp(statistics.fmean(losses) - 0.05 * index),
                "window_tokens": list(counts or [255] * len(losses)),
                "tokens_sha256": tokens,
            }
            for index, corpus in enumerate(PERPLEXITY.corpora)
        }
        evaluations.append({"kind": "perplexity", "subject": subject, "corpora": corpora})
    return RowResults(row, {"ppl": evaluations}, kept_by(ratio), place=f"rows.{method}")


def scored(method: str, *seeds: dict[str, list[int]], documents: str = "a") -> RowResults:
    """A row with these scores by task and document, one dict a seed."""
    row = row_results().row.model_copy(update={"method": method, "ratio": 20, "label": None})
    evaluations: list[dict[str, Any]] = []
    for seed, scores in enumerate(seeds):
        subject = {"model": row.model, "method": method, "ratio": 20, "tuning": row.tuning, "seed": seed}
        tasks = {task: {"scores": found, "documents_sha256": documents} for task, found in scores.items()}
        evaluations.append({"kind": "zero-shot", "subject": subject, "tasks": tasks})
    return RowResults(row, {"zs": evaluations}, kept_by(20), place=f"rows.{method}")


def kept_by(ratio: int) -> list[dict[str, Any]]:
    return [{"parameters": {"decoder_linears": 1000 - 10 * ratio, "decoder_linears_dense": 1000}}]


def build(*rows: RowResults, suite: str = "ppl", reference: Literal["first", "dense"] = "first") -> TableData:
    shown = [results.row for results in rows]
    table = RowTable(kind="differences", title="Title", suites=[suite], rows=shown, reference=reference)
    return build_table(table, rows, context(suites={suite: {"ppl": PERPLEXITY, "zs": ZERO_SHOT}[suite]}))


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
    value, paired = by_hand(mean, ours)
    seeds = abs(statistics.fmean(theirs) - statistics.fmean(again)) / 2  # sd of two over sqrt(2)
    stderr = math.hypot(paired, seeds)
    corpus = PERPLEXITY.corpora[0]
    assert second[f"{corpus}_difference"] == pytest.approx(value, abs=1e-12)
    assert second[f"{corpus}_difference_stderr"] == pytest.approx(stderr, abs=1e-12)
    assert second[f"{corpus}_perplexity_ratio"] == pytest.approx(math.exp(value))
    assert first[f"{corpus}_difference"] == 0
    assert second["reference"] == "first"


@settings(deadline=None, max_examples=40)
@given(ours=LOSSES, theirs=LOSSES, counts=st.lists(st.integers(1, 2047), min_size=6, max_size=6))
def test_windows_count_by_their_tokens(ours: list[float], theirs: list[float], counts: list[int]) -> None:
    rows = [results_of("first", ours, counts=counts), results_of("second", theirs, counts=counts)]
    second = build(*rows).frame.to_dict(orient="records")[1]
    corpus = PERPLEXITY.corpora[0]
    tokens = [(a - b, n) for a, b, n in zip(theirs, ours, counts, strict=True)]
    mean = sum(d * n for d, n in tokens) / sum(counts)
    spread = sum((n * (d - mean)) ** 2 for d, n in tokens) * 6 / 5
    assert second[f"{corpus}_difference"] == pytest.approx(mean, abs=1e-9)
    assert second[f"{corpus}_difference_stderr"] == pytest.approx(math.sqrt(spread) / sum(counts), abs=1e-9)


def test_seeds_that_differ_make_no_difference_clear() -> None:
    steady, wild = [2.0, 2.1, 2.2], [[2.1, 2.2, 2.3], [2.7, 2.8, 2.9]]
    shown = build(results_of("first", *wild), results_of("second", steady)).lines[1].cells[3].text
    assert shown == "-0.400 ± 0.300"


def test_what_is_common_to_all_windows_is_no_uncertainty() -> None:
    losses = [1.0, 5.0, 2.0, 9.0]
    worse = [1.51, 5.5, 2.49, 9.5]
    table = build(results_of("first", losses), results_of("second", worse), results_of("third", [5.0, 1.0, 9.0, 2.1]))
    shown = [[cell.text for cell in line.cells] for line in table.lines]
    assert shown[0][3:] == ["reference", "reference", "70.11", "66.69"]
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


@settings(deadline=None, max_examples=20)
@given(dense=LOSSES, ours=LOSSES, theirs=LOSSES, place=st.integers(0, 2))
def test_all_ratios_may_be_compared_with_the_dense_model(
    dense: list[float], ours: list[float], theirs: list[float], place: int
) -> None:
    rows = [results_of("first", ours), results_of("first", theirs, ratio=30)]
    rows.insert(place, results_of("dense", dense, ratio=0))
    table = build(*rows, reference="dense")
    records = table.frame.to_dict(orient="records")
    corpus = PERPLEXITY.corpora[0]
    assert {record["reference"] for record in records} == {"dense"}
    assert [line.cells[3].text == "reference" for line in table.lines] == [number == place for number in range(3)]
    found = {results.row.ratio: record for results, record in zip(rows, records, strict=True)}
    for ratio, losses in ((20, ours), (30, theirs)):
        value, stderr = by_hand(losses, dense)
        assert found[ratio][f"{corpus}_difference"] == pytest.approx(value, abs=1e-12)
        assert found[ratio][f"{corpus}_difference_stderr"] == pytest.approx(stderr, abs=1e-12)
    assert found[0]["kept_percent"] == 100
    assert "Loss less that of the dense model" in to_markdown(table)


def test_one_window_has_no_error_and_other_windows_no_difference() -> None:
    table = build(results_of("first", [1.0]), results_of("second", [1.25]))
    assert table.lines[1].cells[3].text == "0.250"
    with pytest.raises(RankwiseError, match=r"rows\.second: 'wiki_test' was scored on other texts than for 'first'"):
        build(results_of("first", [1.0, 2.0]), results_of("second", [1.0, 2.0], tokens="b"))


@settings(deadline=None, max_examples=40)
@given(ours=SCORES, theirs=SCORES, again=SCORES)
def test_accuracy_is_paired_by_documents_and_averaged_over_tasks(
    ours: dict[str, list[int]], theirs: dict[str, list[int]], again: dict[str, list[int]]
) -> None:
    table = build(scored("first", ours), scored("second", theirs, again), suite="zs")
    second = table.frame.to_dict(orient="records")[1]
    by_task = [
        by_hand([(a + b) / 2 for a, b in zip(theirs[task], again[task], strict=True)], [*map(float, ours[task])])
        for task in ours
    ]
    mean = statistics.fmean(value for value, _ in by_task)
    paired = math.sqrt(sum(error**2 for _, error in by_task)) / len(by_task)
    accuracies = [statistics.fmean(statistics.fmean(found) for found in seed.values()) for seed in (theirs, again)]
    stderr = math.hypot(paired, abs(accuracies[0] - accuracies[1]) / 2)
    assert second["zs_difference"] == pytest.approx(100 * mean, abs=1e-9)
    assert second["zs_difference_stderr"] == pytest.approx(100 * stderr, abs=1e-9)
    for task, (value, error) in zip(ours, by_task, strict=True):
        assert second[f"zs.{task}_difference"] == pytest.approx(100 * value, abs=1e-9)
        seeds = abs(statistics.fmean(theirs[task]) - statistics.fmean(again[task])) / 2
        assert second[f"zs.{task}_difference_stderr"] == pytest.approx(100 * math.hypot(error, seeds), abs=1e-9)


def test_the_reference_differs_from_itself_by_nothing_whatever_its_seeds() -> None:
    seeds = [{task: [seed] * 5 for task in ZERO_SHOT.tasks} for seed in (0, 1)]
    first = build(scored("first", *seeds), scored("second", *seeds), suite="zs").frame.to_dict(orient="records")[0]
    assert {value for key, value in first.items() if "_difference" in key} == {0.0}


def test_how_differences_of_accuracy_are_shown() -> None:
    right = {task: [1] * 9 + [0] for task in ZERO_SHOT.tasks}
    wrong = {task: [0, *scores[1:]] for task, scores in right.items()}
    table = build(scored("first", right), scored("second", wrong), suite="zs")
    assert [line.cells[3].text for line in table.lines] == ["reference", "-10.0 ± 3.8 *"]
    assert "negative: the first is better" in to_markdown(table)
    assert "nats" not in to_markdown(table)
    with pytest.raises(RankwiseError, match=r"rows\.second: 'boolq' was scored on other texts than for 'first'"):
        build(scored("first", right), scored("second", wrong, documents="b"), suite="zs")


def with_speed(results: RowResults, *tokens_per_second: float) -> RowResults:
    """The same row, and how fast each seed's checkpoint reads a prompt."""
    subject = results.evaluations["ppl"][0]["subject"]
    costs = [
        {"kind": "cost", "subject": subject, "measured": {"prefill_tokens_per_second": speed}}
        for speed in tokens_per_second
    ]
    made = [manifest | {"seconds": 10.0} for manifest in results.manifests]
    searched = [{"variables": [], "seconds": 5.0}] if results.row.method == "second" else []
    return replace(results, evaluations={**results.evaluations, "cost": costs}, manifests=[*made, *searched])


def test_perplexities_and_speeds_against_the_dense_model_stand_beside() -> None:
    dense = with_speed(results_of("dense", [2.0, 2.5], ratio=0), 200.0)
    rows = [
        with_speed(results_of("first", [3.0, 3.5]), 240.0),
        dense,
        with_speed(results_of("second", [3.1, 3.7], [3.3, 3.9]), 90.0, 110.0),
    ]
    table = RowTable(kind="differences", title="T", suites=["ppl", "cost"], rows=[results.row for results in rows])
    suites = {"ppl": PERPLEXITY, "cost": COST}
    built = build_table(table, rows, context(suites=suites))
    shown = [[cell.text for cell in line.cells][3:] for line in built.lines]
    perplexities = [math.exp(mean) for mean in (3.25, 2.25)]
    assert shown[0][:3] == ["reference", "reference", f"{perplexities[0]:.2f}"]
    assert shown[1][:3] == ["–", "–", f"{perplexities[1]:.2f}"]  # nothing else stands at its ratio
    assert [cells[-2:] for cells in shown] == [["1.20", "10"], ["1.00", "–"], ["0.50", "15"]]
    first, *_, second = built.frame.to_dict(orient="records")
    assert (first["cost_prefill_of_dense"], second["cost_prefill_tokens_per_second"]) == (1.2, 100.0)
    assert (first["seconds"], second["seconds"]) == (10.0, 15.0)
    with pytest.raises(RankwiseError, match="manifest of the compression lacks `seconds`"):
        build_table(table, [replace(rows[0], manifests=kept_by(20)), *rows[1:]], context(suites=suites))
    corpus = PERPLEXITY.corpora[0]
    assert second[f"{corpus}_perplexity"] == pytest.approx((math.exp(3.4) + math.exp(3.6)) / 2)
    assert [(column.title, column.group) for column in built.columns[-2:]] == [
        ("Prefill (× dense)", ""),
        ("Seconds", ""),
    ]
    assert "against the dense model; above 1 is faster" in to_markdown(built)

"""Tables with the mean of the tasks, and published perplexities: under a corpus of that name, or apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.outputs import PublishedRow, RowTable
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.paper.render import to_markdown
from lowrank.paper.tables import Context, RowResults, TableData, build_table
from lowrank.paper.tables.measures import match_corpora, measures_of
from tests.unit.paper.paper_samples import PERPLEXITY, TASKS, ZERO_SHOT, context, dense_results, row_results

PUBLISHED = Path(__file__).parents[4] / "config" / "published"
ABLATION = {"file": "table_2", "model": "llama-2-7b", "method": "pooled", "ratio": 20}


def build(rows: list[RowResults], given_context: Context, tasks: str = "mean") -> TableData:
    table = RowTable(kind="accuracy", title="Title", tasks=tasks, rows=[results.row for results in rows])
    return build_table(table, rows, given_context)


def shown(table: TableData, line: int) -> dict[str, str]:
    return {column.title: cell.text for column, cell in zip(table.columns, table.lines[line].cells, strict=True)}


def with_published(results: RowResults, **reference: Any) -> RowResults:
    cited = PublishedRow(**{**ABLATION, **reference})
    return replace(results, row=results.row.model_copy(update={"published": cited}))


def on_corpora(*corpora: str, **suites: Any) -> tuple[RowResults, Context]:
    """A row whose perplexities are on these corpora, 1.5 on the first, 2.5 on the second, ..."""
    results = row_results()
    entries = {
        name: {"perplexity": i + 1.5, "stderr": 0.1, "tokens": 9, "windows": 3} for i, name in enumerate(corpora)
    }
    results.evaluations["ppl"][0]["corpora"] = entries
    suite = PerplexitySuite(kind="perplexity", corpora=list(corpora), length=256)
    given_context = context(suites={"ppl": suite, "zs": ZERO_SHOT, **suites}, published_folder=PUBLISHED)
    return with_published(results), given_context


def test_the_mean_stands_for_all_tasks() -> None:
    table = build([dense_results(), row_results(0.5)], context(suites={"ppl": PERPLEXITY, "zs": ZERO_SHOT}))
    assert [column.title for column in table.columns] == [
        *("Removed (%)", "Method", "Kept (%)", "wiki_test", "speeches", "Average"),
    ]
    assert shown(table, 1)["Average"] == "53.0 ± 1.2"
    record = table.frame.to_dict(orient="records")[1]
    assert record["average"] == pytest.approx(53.0)
    assert not set(TASKS) & set(table.frame.columns)
    assert any("acc_norm for HellaS., ARC-c, OBQA; average: their plain mean" in note for note in table.notes)


def test_published_perplexities_stand_under_the_corpus_that_continues_their_name() -> None:
    results, given_context = on_corpora("wikitext-test", "ptb", "c4.validation")
    table = build([results], given_context)
    line = shown(table, 1)
    assert [line[name] for name in ("wikitext-test", "ptb", "c4.validation", "Average")] == [
        *("9.93", "54.68", "11.45", "60.6"),
    ]
    theirs = table.frame.to_dict(orient="records")[1]
    assert (theirs["wikitext-test_perplexity"], theirs["average"], theirs["row"]) == (9.93, 60.64, 0)
    (note,) = [note for note in table.notes if "under our corpus of that name" in note]
    assert "wikitext under wikitext-test, ptb under ptb, c4 under c4.validation; text and windows may differ" in note


def test_a_published_perplexity_on_another_text_has_a_column_of_its_own() -> None:
    results, given_context = on_corpora("wikitext103", "speeches")
    table = build([results, dense_results()][:1], given_context)
    ours, theirs = shown(table, 0), shown(table, 1)
    assert (ours["wikitext103"], theirs["wikitext103"], theirs["speeches"]) == ("1.50 ± 0.10", "–", "–")
    assert [(ours[name], theirs[name]) for name in ("wikitext", "ptb", "c4")] == [
        *(("–", "9.93"), ("–", "54.68"), ("–", "11.45")),
    ]
    assert {column.group for column in table.columns[-3:]} == {"Perplexity, published only"}
    records = table.frame.to_dict(orient="records")
    assert records[1]["c4_perplexity"] == 11.45
    assert "wikitext (ppl, published only)" in to_markdown(table)
    assert "No single corpus of ours answers to the published wikitext, ptb, c4." in table.notes


def test_of_two_corpora_of_one_name_neither_is_chosen() -> None:
    results, given_context = on_corpora("c4-test", "c4-validation")
    line = shown(build([results], given_context), 1)
    assert (line["c4-test"], line["c4-validation"], line["c4"]) == ("–", "–", "11.45")


def test_one_corpus_in_two_suites_is_not_decided_either() -> None:
    longer = PerplexitySuite(kind="perplexity", corpora=["wikitext-test"], length=512)
    results, given_context = on_corpora("wikitext-test", "c4-test", long=longer)
    results.evaluations["long"] = results.evaluations["ppl"]  # type: ignore[index]
    table = build([results], given_context)
    theirs = [cell.text for cell in table.lines[1].cells]
    assert theirs[3:] == ["–", "11.45", "–", "60.6", "9.93", "54.68"]
    assert to_markdown(table).count("wikitext-test (ppl: ") == 2, "each says its suite"


def test_a_table_without_perplexity_shows_none_of_the_published() -> None:
    results, _ = on_corpora("wikitext-test")
    table = build([results], context(suites={"zs": ZERO_SHOT}, published_folder=PUBLISHED))
    assert [column.title for column in table.columns] == ["Removed (%)", "Method", "Kept (%)", "Average"]
    assert shown(table, 1)["Average"] == "60.6"


@pytest.mark.parametrize("tasks", [{name: TASKS[name] for name in list(TASKS)[:3]}, TASKS | {"mathqa": "acc"}])
def test_a_published_mean_of_seven_is_not_beside_a_mean_of_others(tasks: dict[str, Any]) -> None:
    others = ZeroShotSuite(kind="zero-shot", tasks=tasks)
    results, _ = on_corpora("wikitext-test")
    table = build([results], context(suites={"zs": others}, published_folder=PUBLISHED))
    assert shown(table, 1)["Average"] == "–"
    assert table.frame["average"].isna().tolist() == [False, True]


def test_rows_of_ours_and_published_are_numbered_alike() -> None:
    results, given_context = on_corpora("wikitext-test")
    table = build([row_results(), results, results], replace_suites(given_context))
    assert table.frame[["source", "row"]].values.tolist() == [
        *(["ours", 0], ["ours", 1], ["published", 1], ["ours", 2], ["published", 2]),
    ]


def replace_suites(given_context: Context) -> Context:
    return replace(given_context, suites={"zs": ZERO_SHOT})


def test_a_corpus_named_like_a_task_is_no_accuracy() -> None:
    measures = measures_of(Context(suites={"p": PerplexitySuite(kind="perplexity", corpora=["boolq-test"], length=8)}))
    assert match_corpora(measures, ["boolq", "average"]) == ({}, [])


NAMES = st.text(alphabet="ab-_", min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True), st.lists(NAMES, max_size=4, unique=True))
def test_no_column_takes_the_numbers_of_two_texts(corpora: list[str], columns: list[str]) -> None:
    suite = PerplexitySuite.model_construct(kind="perplexity", corpora=corpora, length=8, windows=None, stride=None)
    placed, alone = match_corpora(measures_of(Context(suites={"p": suite})), columns)
    owners = [key.removesuffix("_perplexity") for key in placed.values()]
    assert len(set(owners)) == len(owners), "a column of ours takes one published column at most"
    assert not set(placed) & set(alone)
    for name, owner in zip(placed, owners, strict=True):
        assert owner == name or owner[: len(name) + 1] in {f"{name}{mark}" for mark in "-_."}
        rivals = [c for c in corpora if c == name or c[: len(name) + 1] in {f"{name}{mark}" for mark in "-_."}]
        better = [c for c in columns if len(c) > len(name)]
        assert owner in rivals
        assert all(any(r == b or r.startswith((f"{b}-", f"{b}_")) for b in better) for r in rivals if r != owner)

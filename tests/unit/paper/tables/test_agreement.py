"""Tables of agreement: the right pairs, the right differences, and what cannot be compared left out and counted."""

from __future__ import annotations

import io
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.outputs import AgreementTable, PublishedRow, RowTable
from lowrank.errors import RankwiseError
from lowrank.paper.render import to_csv, to_html, to_latex, to_markdown
from lowrank.paper.tables import Context, RowResults, TableData, build_table
from lowrank.paper.tables.agreement import combined_error, pairs_of, read_table
from tests.unit.paper.paper_samples import COST, context, row_results

PUBLISHED = Path(__file__).parents[4] / "config" / "published"
LORD = {"file": "table_1", "model": "llama-2-7b", "method": "lord", "ratio": 20}


def ours(level: float = 0.6, model: str = "llama-2-7b", **options: Any) -> RowResults:
    """A row with published values beside it."""
    published = {**LORD, **options.pop("published", {})}
    results = row_results(level, model=model, **options)
    return replace(results, row=results.row.model_copy(update={"published": PublishedRow(**published)}))


def csv_of(kind: str, rows: list[RowResults]) -> pd.DataFrame:
    """The table's CSV, as the next stage reads it."""
    suites = {"suites": {"cost": COST}} if kind == "statistics" else {}
    table = RowTable(kind=kind, title="T", rows=[results.row for results in rows])
    data = build_table(table, rows, context(published_folder=PUBLISHED, **suites))
    return pd.read_csv(io.StringIO(to_csv(data)), keep_default_na=False, na_values=[""])


def build(smoke: bool = False, **tables: pd.DataFrame) -> TableData:
    table = AgreementTable(kind="agreement", title="Title", tables=list(tables))
    return build_table(table, [], Context(compared=tables, smoke=smoke))


def records(table: TableData) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.frame.to_dict(orient="records")]


def test_every_cell_with_both_values_is_compared() -> None:
    table = build(t=csv_of("accuracy", [row_results(0.5, model="llama-2-7b"), ours(0.6)]))
    found = records(table)
    assert [record["column"] for record in found] == [
        *("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "average"),
    ]
    first = found[0]
    assert (first["table"], first["row"], first["method"], first["published_method"]) == ("t", 1, "lord", "lord")
    assert (first["ours"], first["published"]) == (60.0, 72.60)
    assert first["difference"] == pytest.approx(-12.6)
    assert first["standard_errors"] == pytest.approx(-12.6 / 1.0)
    assert first["difference_percent"] == pytest.approx(100 * (60 / 72.60 - 1))
    assert first["status"] == "compared"
    assert "arXiv:2405.10616" in first["citation"]
    assert (first["evidence"], first["source"]) == ("t.csv", "comparison")


def test_a_row_is_paired_with_its_own_published_line_only() -> None:
    """Two rows of one method, model and ratio: their numbers tell them apart, not their names."""
    rows = [ours(0.6), row_results(0.1, model="llama-2-7b"), ours(0.7, published={"method": "asvd"})]
    found = records(build(t=csv_of("accuracy", rows).sample(frac=1, random_state=0)))
    pairs = {(record["row"], record["ours"], record["published"]) for record in found if record["column"] == "boolq"}
    assert pairs == {(0, 60.0, 72.60), (2, 70.0, 73.61)}


def test_with_several_seeds_their_spread_is_part_of_the_error() -> None:
    (first, *_) = records(build(t=csv_of("accuracy", [ours(0.6, seeds=3)])))
    values = [60.0, 61.0, 62.0]
    error = math.sqrt(1.0**2 + statistics.stdev(values) ** 2 / 3)
    assert first["stderr"] == pytest.approx(error)
    assert first["standard_errors"] == pytest.approx((61.0 - 72.60) / error)


def test_counts_have_no_standard_error() -> None:
    table = build(t=csv_of("statistics", [ours(published={"file": "table_7"})]))
    found = {record["column"]: record for record in records(table)}
    assert set(found) == {"parameters", "macs", "weight_bytes"}
    assert found["macs"]["published"] == 370_120_000_000
    assert all(record["standard_errors"] is None for record in found.values())
    texts = [[cell.text for cell in line.cells] for line in table.lines]
    assert texts[1] == ["", "", "", "MACs (G)", "0.06", "370.12", "-370.06", "-100.0", ""]
    assert table.notes[0] == "3 cells are compared, none of them with a standard error."


def test_a_perplexity_of_one_window_is_compared_without_an_error() -> None:
    results = ours(published={"file": "table_2", "method": "naive"})
    entry = {"perplexity": 10.0, "stderr": None, "tokens": 9, "windows": 1}
    results.evaluations["ppl"][0]["corpora"] = {"wiki_test": entry, "speeches": entry}
    frame = csv_of("accuracy", [results]).rename(columns=lambda name: name.replace("wiki_test", "wikitext-test"))
    frame.loc[frame["source"] == "published", "wikitext-test_perplexity"] = 9.96
    table = build(t=frame)
    (found,) = [record for record in records(table) if record["column"] == "wikitext-test_perplexity"]
    assert (found["ours"], found["stderr"], found["standard_errors"]) == (10.0, None, None)
    assert any(line.cells[3].text == "wikitext-test (ppl)" for line in table.lines)


def test_another_model_or_ratio_is_not_compared_and_counted() -> None:
    rows = [ours(), ours(model="tiny"), ours(published={"ratio": 30})]
    table = build(t=csv_of("accuracy", rows))
    found = records(table)
    assert Counter(record["status"] for record in found) == {
        "compared": 8,
        "not comparable: other model": 8,
        "not comparable: other ratio": 8,
    }
    others = [record for record in found if record["status"] != "compared"]
    assert {(record["model"], record["published_model"]) for record in others} == {
        *(("tiny", "llama-2-7b"), ("llama-2-7b", "llama-2-7b")),
    }
    assert all(record["difference"] is None and record["standard_errors"] is None for record in others)
    assert len(table.lines) == 8
    assert any(
        note == "8 cells are not comparable: other model (ours tiny, published llama-2-7b); they are in the CSV only."
        for note in table.notes
    )


def test_a_study_of_another_model_gives_an_empty_table_that_says_why() -> None:
    table = build(smoke=True, t=csv_of("accuracy", [ours(model="tiny")]))
    assert (table.lines, len(table.frame)) == ((), 8)
    assert table.notes[0] == "No cell can be compared."
    assert table.caption == "Title. Smoke run, not a measurement."
    for text in (to_markdown(table), to_latex(table, "t"), to_html(table, "t")):
        assert "No cell can be compared." in text
    assert len(to_csv(table).splitlines()) == 1 + 8


def test_a_table_without_published_values_gives_a_csv_with_headings() -> None:
    table = build(t=csv_of("accuracy", [row_results()]))
    assert to_csv(table).startswith("source,table,row,model,")
    assert len(to_csv(table).splitlines()) == 1


def test_the_summary_counts_cells_within_standard_errors() -> None:
    frame = pd.DataFrame(
        [
            {"source": "ours", "row": 0, **NAMES, "a": 10.0, "b": 10.0, "c": 10.0, "d": 10.0, "e": 5.0},
            {"source": "published", "row": 0, **NAMES, "a": 10.9, "b": 8.1, "c": 12.9, "d": 14.0, "e": 4.0},
        ]
    ).assign(a_stderr=[1.0, None], b_stderr=[1.0, None], c_stderr=[1.0, None], d_stderr=[1.0, None])
    table = build(t=frame)
    assert table.notes[0] == (
        "5 cells are compared. Of 4 with a standard error, 1 within 1, 2 within 2, 3 within 3 standard errors."
    )
    assert [line.cells[-1].text for line in table.lines] == ["-0.9", "+1.9", "-2.9", "-4.0", ""]


NAMES = {"model": "m", "method": "x", "label": "x", "tuning": "none", "target_removed_percent": 20, "citation": "c"}


def test_a_row_is_named_once_and_starts_a_block() -> None:
    table = build(
        t=csv_of("accuracy", [ours(0.6), ours(0.5, label="LoRD, again")]),
        s=csv_of("statistics", [ours(published={"file": "table_7"})]),
    )
    named = [(index, line.cells[2].text) for index, line in enumerate(table.lines) if line.cells[0].text]
    assert named == [(0, "lord"), (8, "LoRD, again"), (16, "lord")]
    assert [index for index, line in enumerate(table.lines) if line.starts_block] == [8, 16]
    assert "Model" not in [column.title for column in table.columns]
    two = build(t=csv_of("accuracy", [ours(), ours(model="llama-2-13b", published=THIRTEEN)]))
    assert [line.cells[1].text for line in two.lines if line.cells[0].text] == ["llama-2-7b", "llama-2-13b"]


THIRTEEN = {"file": "table_5", "model": "llama-2-13b"}


def test_tables_of_ranks_are_refused() -> None:
    rows = [ours(seeds=2, published={"file": "table_8", "method": "bolaco-5x4"})]
    table = RowTable(kind="allocations", title="T", rows=[rows[0].row])
    shapes = {"llama-2-7b": context().shapes["tiny"]}
    data = build_table(table, rows, context(suites={}, shapes=shapes, published_folder=PUBLISHED))
    frame = pd.read_csv(io.StringIO(to_csv(data)))
    with pytest.raises(RankwiseError, match="table 't' has several lines for a row"):
        list(pairs_of("t", frame))
    with pytest.raises(RankwiseError, match="does not number the rows"):
        list(pairs_of("t", frame.drop(columns="row")))


def test_a_published_zero_has_no_percentage() -> None:
    frame = csv_of("accuracy", [ours(0.6)])
    frame.loc[frame["source"] == "published", "boolq"] = 0.0
    table = build(t=frame)
    record = next(record for record in records(table) if record["column"] == "boolq")
    assert record["difference_percent"] is None
    line = next(line for line in table.lines if any(cell.text == "BoolQ" for cell in line.cells))
    assert line.cells[-2].text == ""


def test_a_model_called_na_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("source,row,model,x\nours,0,NA,1\npublished,0,null,\n")
    frame = read_table(tmp_path / "t.csv")
    assert frame["model"].tolist() == ["NA", "null"]
    assert frame["x"].isna().tolist() == [False, True]
    with pytest.raises(RankwiseError, match=r"gone\.csv: cannot be read"):
        read_table(tmp_path / "gone.csv")


@given(
    st.floats(0, 10),
    st.lists(st.floats(-100, 100), min_size=2, max_size=6),
)
def test_independent_errors_add_up_in_variance(stderr: float, values: list[float]) -> None:
    k = len(values)
    spread = statistics.variance(values)
    error = combined_error(stderr, statistics.stdev(values), k)
    assert error is not None
    assert error**2 == pytest.approx(stderr**2 + spread / k, rel=1e-9, abs=1e-12)
    assert error >= stderr
    assert combined_error(stderr, None, 1) == stderr
    assert combined_error(None, 1.0, k) is None

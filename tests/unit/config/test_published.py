"""The published values: typed right, cited, and found or refused with a hint."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from lowrank.config.outputs import PublishedRow, RowTable
from lowrank.config.published import find_published, published_problems, read_comments, read_published
from lowrank.errors import RankwiseError

FOLDER = Path(__file__).parents[3] / "config" / "published"
FILES = sorted(FOLDER.glob("*.csv"))
TASKS = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


def reference(**changes: object) -> PublishedRow:
    return PublishedRow(**{"file": "table_1", "model": "llama-2-7b", "method": "bolaco-5x1", "ratio": 20, **changes})


def tables_with(columns: list[str]) -> list[Path]:
    return [path for path in FILES if set(columns) <= set(read_published(path).columns)]


@pytest.mark.parametrize("path", tables_with([*TASKS, "average"]), ids=lambda path: path.stem)
def test_printed_averages_are_the_means_of_their_seven_columns(path: Path) -> None:
    frame = read_published(path)
    off = (frame[TASKS].mean(axis="columns") - frame["average"]).abs()
    assert off.max() < 0.011, frame[off >= 0.011]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_cites_what_it_is_from_and_names_each_row_once(path: Path) -> None:
    citation, _ = read_comments(path)
    frame = read_published(path)
    keys = ["model", "ratio", "method"] + (["group"] if "group" in frame else [])
    later = path.stem == "field"
    assert all(f"arXiv:{number}" in citation for number in (["2512.13494", "2604.00821"] if later else ["2405.10616"]))
    assert not frame.duplicated(keys).any()
    assert len(frame) > 0


def test_the_tables_of_accuracy_are_those_of_the_paper() -> None:
    assert [path.stem for path in tables_with(TASKS)] == ["table_1", "table_5", "table_6"]


@pytest.mark.parametrize(("name", "model"), [("table_1", "llama-2-7b"), ("table_5", "llama-2-13b")])
def test_all_rows_of_the_main_tables_are_there(name: str, model: str) -> None:
    frame = read_published(FOLDER / f"{name}.csv")
    assert set(frame["model"]) == {model}
    assert frame.groupby("ratio").size().to_dict() == {0: 1, 20: 10, 30: 10}
    assert len(frame["method"].unique()) == 11


@pytest.mark.parametrize("name", ["table_2", "table_3", "table_4", "table_5"])
def test_a_number_of_a_table_that_was_inferred_says_so(name: str) -> None:
    citation, notes = read_comments(FOLDER / f"{name}.csv")
    assert f"Table {name[-1]}" in citation
    assert any(f"That it is Table {name[-1]} was inferred" in note for note in notes)


def test_rows_that_several_tables_print_agree() -> None:
    """The ablations repeat rows of the main table: LoRD is the naive covariance, 5x4 the search on the top 100."""

    def row(file: str, method: str) -> dict[str, float | None]:
        return find_published(FOLDER, reference(file=file, method=method), "x").values[0]

    assert row("table_2", "naive")["average"] == row("table_1", "lord")["average"]
    assert row("table_4", "validation-wikipedia-top100")["average"] == row("table_1", "bolaco-5x4")["average"]
    assert row("table_2", "pooled") == row("table_3", "samples-1024")


def test_printed_ranks_give_the_printed_parameters() -> None:
    """LLaMA-2-7B by its shapes: the ranks of table 8 give the parameters of table 7 (5x1, both ratios)."""
    hidden, intermediate, layers, rest = 4096, 11008, 32, 262_410_240
    for ratio in (20, 30):
        (ranks,) = find_published(FOLDER, reference(file="table_8", ratio=ratio), "x").values
        (counts,) = find_published(FOLDER, reference(file="table_7", ratio=ratio), "x").values
        block = hidden * hidden  # v stays dense
        for name, copies, m, n in (
            ("qk", 2, hidden, hidden),
            ("o", 1, hidden, hidden),
            ("gate", 1, intermediate, hidden),
            ("up", 1, intermediate, hidden),
            ("down", 1, hidden, intermediate),
        ):
            rank = ranks[name]
            block += copies * (m * n if rank is None else int(rank) * (m + n))
        assert (layers * block + rest) / 1e9 == pytest.approx(counts["parameters_billion"], abs=0.011)


def test_a_row_is_found_with_its_values() -> None:
    found = find_published(FOLDER, reference(method="bolaco-5x1+pt"), "x")
    assert found.values == (
        {
            **dict(zip(TASKS, [73.79, 77.53, 72.72, 68.11, 73.19, 42.24, 43.60], strict=True)),
            "average": 64.45,
        },
    )


def test_left_dense_is_none_and_groups_are_in_order() -> None:
    found = find_published(FOLDER, reference(file="table_8", method="bolaco-5x4"), "x")
    assert [values["group"] for values in found.values] == [1, 2, 3, 4]
    assert found.values[0]["up"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "tabel_1"}, "there is no .*tabel_1.csv - did you mean 'table_1'"),
        ({"model": "llama-2-7"}, r"published.model: 'llama-2-7' is not in .* - did you mean 'llama-2-7b'"),
        ({"ratio": 25}, r"published.ratio: '25' is not in .* with model 'llama-2-7b'"),
        ({"method": "bolcao-5x1"}, r"published.method: 'bolcao-5x1' .* ratio '20' - did you mean 'bolaco-5x1'"),
    ],
)
def test_an_unknown_row_is_refused_with_its_place_and_a_hint(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RankwiseError, match=message) as caught:
        find_published(FOLDER, reference(**changes), "tables.table_1.rows[2].published")
    assert "tables.table_1.rows[2].published" in str(caught.value)


def test_all_wrong_references_are_listed_before_anything_runs() -> None:
    wrong = [
        {"model": "m", "method": "x", "ratio": 20, "published": reference(method=name)} for name in ("a", "lord", "b")
    ]
    table = RowTable(kind="accuracy", title="t", rows=wrong)
    problems = published_problems({"table_1": table}, FOLDER)
    assert [problem.split(".published")[0] for problem in problems] == [
        "tables.table_1.rows[0]",
        "tables.table_1.rows[2]",
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (
            *("accuracy", {"file": "table_8", "method": "bolaco-5x4"}),
            "4 lines of table_8.csv answer to it, and a table of accuracy shows one; name another `file` (",
        ),
        (
            *("statistics", {"file": "table_8", "method": "bolaco-5x4", "model": "llama-2-13b"}),
            "4 lines of table_8.csv answer to it, and a table of statistics shows one; name another `file` (",
        ),
        ("allocations", {}, "table_1.csv prints no ranks (it has no column `group`); name another `file` (table_8)"),
        ("allocations", {"method": "flap"}, "table_1.csv prints no ranks (it has no column `group`); leave it out"),
    ],
)
def test_what_a_table_cannot_show_is_found_before_anything_runs(
    kind: str, changes: dict[str, object], says: str
) -> None:
    """Each file that is offered is accepted."""

    def problems(**more: object) -> list[str]:
        row = {"model": "m", "method": "x", "ratio": 20, "published": reference(**{**changes, **more})}
        return published_problems({"t": RowTable(kind=kind, title="t", rows=[row])}, FOLDER)

    (problem,) = problems()
    assert problem.startswith(f"tables.t.rows[0].published: {says}"), problem
    offered = re.search(r"`file` \((.*?)\)", problem)
    assert offered is not None or "leave it out" in says
    for file in offered[1].split(", ") if offered else ():
        assert problems(file=file) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model,ratio,method\na,20,b\n", "first line must cite"),
        ("# source: x\nmodel,ratio,boolq\na,20,1\n", "method must be there"),
        ("# source: x\nmodel,ratio,method,boolq\na,20,b,good\n", "'boolq' holds something that is no number"),
        ("# source: x\nmodel,ratio,method,boolq\na,20,b,1\na,20,b, c,1\n", r"in line 4, saw 5\s*\)\.$"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(RankwiseError, match=message):
        find_published(tmp_path, PublishedRow(file="mine", model="a", method="b", ratio=20), "x")


def test_a_file_of_a_spreadsheet_is_read_and_another_encoding_is_named(tmp_path: Path) -> None:
    row = PublishedRow(file="mine", model="a", method="b", ratio=20)
    text = "# source: Müller, 2026\nmodel,ratio,method,boolq\na,20,b,1\n"
    (tmp_path / "mine.csv").write_text(text, encoding="utf-8-sig")
    assert find_published(tmp_path, row, "x").citation == "Müller, 2026"
    (tmp_path / "mine.csv").write_text(text, encoding="latin-1")
    with pytest.raises(RankwiseError, match=r"mine\.csv: no readable CSV file .* must be UTF-8"):
        find_published(tmp_path, row, "x")


def test_comments_do_not_become_rows() -> None:
    assert isinstance(read_published(FOLDER / "table_7.csv"), pd.DataFrame)
    assert set(read_published(FOLDER / "table_7.csv")["model"]) == {"llama-2-7b", "llama-2-13b"}

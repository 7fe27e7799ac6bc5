"""Tables as files: nothing is lost, everything is escaped, equal tables give equal bytes."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.outputs import RowTable
from lowrank.paper.latex import LONG, latex_cell, latex_text
from lowrank.paper.render import to_csv, to_html, to_latex, to_markdown, value_parts
from lowrank.paper.tables import TableData, build_table
from lowrank.paper.tables.data import Cell, Column, Line
from tests.unit.paper.paper_samples import context, dense_results, row_results

REPOSITORY = Path(__file__).parents[3]


class Cells(HTMLParser):
    """Rows of cell texts of a page's tables, and the scopes of its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.scopes: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")
        if tag == "th":
            self.scopes.append(dict(attrs)["scope"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def sample(title: str = "Accuracy & perplexity, 100 %", label: str = "a_b <5×1>") -> TableData:
    rows = [dense_results(), row_results(0.7, label=label), row_results(0.6, method="svd"), row_results(0.3, ratio=30)]
    return build_table(RowTable(kind="accuracy", title=title, rows=[r.row for r in rows]), rows, context())


def test_csv_reads_back_in_full_precision() -> None:
    table = sample()
    records = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(records) == len(table.lines)
    assert float(records[1]["wiki_test_perplexity"]) == 10 / 0.7
    assert records[0]["boolq_documents"] == "20", "whole numbers stay whole"


def test_markdown_has_a_row_a_line_and_marks_the_best() -> None:
    text = to_markdown(sample())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "**70.0 ± 1.0**" in rows[3]
    assert "a\\_b \\<5×1\\>" in rows[3]


def test_html_holds_each_cell_under_headings_with_a_scope() -> None:
    table = sample()
    html = to_html(table, "table_1")
    parser = Cells()
    parser.feed(html)
    assert parser.rows[2:] == [[cell.text for cell in line.cells] for line in table.lines]
    assert set(parser.scopes) == {"col", "colgroup", "row"}
    assert html.isascii()
    assert "<5" not in html
    assert "http" not in html, "no outside assets"


def test_latex_is_a_balanced_booktabs_table() -> None:
    table = sample()
    text = to_latex(table, "table_1")
    body = text[text.index("\\begin{tabular}") : text.index("\\end{tabular}")]
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 2 + 4
    assert all(len(re.findall(r"(?<!\\)&", row)) == len(table.columns) - 1 for row in rows[1:])
    assert len(re.search(r"begin\{tabular\}\{([lr]+)\}", body)[1]) == len(table.columns)  # type: ignore[index]
    assert r"\textbf{70.0 $\pm$ 1.0}" in body
    assert r"Accuracy \& perplexity, 100 \%" in text
    assert text.isascii(), "compiles whatever the input encoding is"
    assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 3, 1]
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended)
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0


@given(st.text(alphabet=st.sampled_from("ab\\&%$#_{}~^±<>|`"), max_size=30))
def test_no_special_character_reaches_latex_bare(text: str) -> None:
    escaped = latex_text(text)
    commands = r"\\text(backslash|asciitilde|asciicircum|asciigrave|bar|less|greater)\{\}|\\[&%$#_{}]|\$\\pm\$"
    assert not set(re.sub(commands, "", escaped)) & set("\\&%$#_{}~^<>|`")


@given(st.text(max_size=30))
def test_latex_is_ascii_on_one_line_whatever_the_text(text: str) -> None:
    assert latex_text(text).isascii()
    assert latex_text(text).isprintable()


def test_characters_that_plain_latex_lacks_are_named_and_accents_are_kept() -> None:
    assert latex_text("naïve Café, größe") == r"na\"{\i}ve Caf\'{e}, gr\"{o}\ss{}e"
    assert latex_text("57.4 ± 1.6 †") == r"57.4 $\pm$ 1.6 $\dagger$"
    assert latex_text("你\x07") == "[U+4F60][U+0007]"


def test_a_row_of_latex_never_begins_with_what_its_end_takes_for_an_argument() -> None:
    text, name = Column("x", "text"), Column("x", "left")
    assert latex_cell("[1] a", text) == "{}[1] a"
    assert latex_cell("* a", name) == "{}* a"
    assert latex_cell("你", name) == "{}[U+4F60]"
    assert latex_cell("a\n\nb", text) == r"a\newline ~\newline b", "an empty line would end a paragraph"
    assert latex_cell("a\nb", name) == "a b"


def long_table(lines: int) -> TableData:
    cells = tuple(Line((Cell(f"name {i}"), Cell(str(i)))) for i in range(lines))
    return TableData("Title", ("Note.",), pd.DataFrame(), (Column("Name", "left"), Column("Number")), cells)


@pytest.mark.parametrize(("lines", "environment"), [(LONG - 1, "table"), (LONG, "longtable")])
def test_a_table_that_no_page_holds_is_broken_over_several(lines: int, environment: str) -> None:
    text = to_latex(long_table(lines), "t")
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert begun[0] == environment
    assert sorted(begun) == sorted(ended)
    assert all(f"name {i} & {i} \\\\\n" in text for i in range(lines))
    assert text.count("Name & Number") == (2 if environment == "longtable" else 1), "headings on each page"
    assert text.count(r"\begingroup") == text.count(r"\endgroup")


def test_a_table_without_lines_is_rendered() -> None:
    table = long_table(0)
    assert "| Name" in to_markdown(table)
    assert r"\midrule" in to_latex(table, "t")
    assert "<tbody>" in to_html(table, "t")


@pytest.mark.parametrize("render", [to_csv, to_markdown, lambda t: to_latex(t, "t"), lambda t: to_html(t, "t")])
def test_equal_tables_give_equal_bytes(render: object) -> None:
    assert render(sample()) == render(sample())  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["statistics", "times", "allocations"])
def test_all_kinds_are_rendered(kind: str) -> None:
    from tests.unit.paper.paper_samples import COST

    rows = [dense_results(), row_results()]
    table = RowTable(kind=kind, title="Title", rows=[r.row for r in rows])
    data = build_table(table, rows, context(suites={} if kind == "allocations" else {"cost": COST}))
    for text in (to_csv(data), to_markdown(data), to_latex(data, "t"), to_html(data, "t")):
        assert "lord" in text


def test_making_a_table_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, lowrank.jobs.stage, lowrank.paper.tables, lowrank.paper.render, lowrank.paper.report, "
        "lowrank.paper.provenance, lowrank.paper.show;"
        "sys.exit(', '.join({'torch', 'transformers', 'matplotlib', 'botorch', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(REPOSITORY / "workflow_scripts")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_table_that_scrolls_keeps_its_methods_in_sight() -> None:
    html = to_html(sample(), "t")
    fixed = re.findall(r'<th scope="(?:col|row)" class="left fixed">([^<]+)', html)
    assert fixed == ["Method", "dense", "a_b &lt;5&#215;1&gt;", "svd", "lord"]
    assert '<th scope="col" class="left fixed">Name' in to_html(long_table(1), "t"), "without methods, the first column"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("62.1 ± 1.3 †", ("62.1", " ± 1.3 †")),
        ("(7.9 ± 3.6)e6", ("(7.9 ± 3.6)e6", "")),
        ("77.7", ("77.7", "")),
        ("", ("", "")),
    ],
)
def test_an_error_is_set_apart_from_its_value(text: str, parts: tuple[str, str]) -> None:
    assert value_parts(text) == parts

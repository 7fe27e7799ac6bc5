"""Tables of generated texts: each text in its cell, whatever it holds, in every format."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.config.outputs import Row, RowTable
from lowrank.config.suites import GenerationSuite
from lowrank.errors import RankwiseError
from lowrank.paper.render import to_csv, to_html, to_latex, to_markdown
from lowrank.paper.tables import Context, RowResults, TableData, build_table
from tests.unit.paper.paper_samples import ENVIRONMENT, manifest, subject
from tests.unit.paper.test_render import Cells

PROMPTS = ["The river", "Bread:\n- flour | water"]
SUITE = GenerationSuite(kind="generation", prompts=PROMPTS, new_tokens=16)
DENSE = {"method": "dense"}
SMALL = {"method": "bolaco", "ratio": 20}
TUNED = {**SMALL, "tuning": "scales"}


def generation(row: Row, texts: list[str], seed: int = 0, prompts: list[str] | None = None) -> dict[str, Any]:
    return {
        "kind": "generation",
        "subject": subject(row, seed),
        "protocol": SUITE.plain(),
        "completions": [
            {"prompt": prompt, "completion": text, "tokens": len(text), "token_ids": [], "ended": False}
            for prompt, text in zip(prompts or PROMPTS, texts, strict=True)
        ],
        "environment": ENVIRONMENT,
        "seconds": 1.0,
    }


def results(texts: list[str], *more_seeds: list[str], prompts: list[str] | None = None, **row: Any) -> RowResults:
    chosen = Row(**{"model": "tiny", **row})
    found = [generation(chosen, given, seed, prompts) for seed, given in enumerate((texts, *more_seeds))]
    manifests = [manifest(chosen, chosen.ratio)] if chosen.ratio else []
    return RowResults(chosen, {"g": found}, manifests, place="tables.t.rows[0]", evidence=["../e/g.json"])


def build(*rows: RowResults, **changes: Any) -> TableData:
    table = RowTable(kind="generations", title="Texts", suites=["g"], rows=[row.row for row in rows])
    return build_table(table, list(rows), Context(**{"suites": {"g": SUITE}, **changes}))


def sample() -> TableData:
    return build(
        results([" flows on.", " salt"], **DENSE),
        results([" river river", "\n- salt\n\n- 5 % & $6\n"], **SMALL),
        results(["", " <b>yeast</b> | `x_1` {y} \\ ~ ^ #"], **TUNED),
    )


def html_cells(table: TableData) -> list[list[str]]:
    parser = Cells()
    parser.feed(to_html(table, "t"))
    return parser.rows


def test_html_shows_a_line_a_prompt_and_a_column_a_row() -> None:
    assert html_cells(sample()) == [
        ["Prompt", "dense", "bolaco, 20 % removed", "bolaco + scales, 20 % removed"],
        ["The river", "flows on.", "river river", "(ends at once)"],
        [PROMPTS[1], "salt", "- salt\n\n- 5 % & $6", "<b>yeast</b> | `x_1` {y} \\ ~ ^ #"],
    ]
    assert "<b>" not in to_html(sample(), "t")


def test_other_formats_have_a_block_a_prompt_and_a_line_a_row() -> None:
    table = sample()
    texts = [[cell.text for cell in line.cells] for line in table.lines]
    assert [line[0] for line in texts] == [PROMPTS[0], "", "", PROMPTS[1], "", ""]
    assert texts[1][1:] == ["20", "bolaco", "river river"]
    assert [line.starts_block for line in table.lines] == [False, False, False, True, False, False]


def test_the_csv_holds_the_texts_as_they_are() -> None:
    records = list(csv.DictReader(io.StringIO(to_csv(sample()))))
    assert [record["completion"] for record in records][3:] == [
        *(" salt", "\n- salt\n\n- 5 % & $6\n", " <b>yeast</b> | `x_1` {y} \\ ~ ^ #"),
    ]
    assert [(record["row"], record["prompt"]) for record in records] == [
        (str(row), prompt) for prompt in PROMPTS for row in range(3)
    ]
    assert (records[2]["tuning"], records[2]["tokens"], records[2]["evidence"]) == ("scales", "0", "../e/g.json")


def test_a_text_stays_in_its_cell_of_markdown() -> None:
    rows = [line for line in to_markdown(sample()).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert "- salt<br><br>- 5 % \\& \\$6" in rows[6]
    assert r"\<b\>yeast\</b\> \| \`x\_1\` {y} \\ \~ ^ #" in rows[7]
    bare = [row.replace("\\\\", "").replace("\\|", "").count("|") for row in rows]
    assert set(bare) == {5}


def test_a_text_stays_in_its_cell_of_latex() -> None:
    text = to_latex(sample(), "t")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 6
    assert r"- salt\newline ~\newline - 5 \% \& \$6" in rows[5]
    assert r"\textless{}b\textgreater{}yeast" in rows[6]
    assert all(row.replace(r"\&", "").count("&") == 3 for row in rows)
    assert text.count(r"p{0.39\linewidth}") == 2


ANY = st.text(max_size=12) | st.text(alphabet="a|\\\n\r&%$#_{}~^<>`*[]\"',\x0b\x0c\x1c\u2028\x85", max_size=12)


@settings(deadline=None)
@given(st.lists(ANY, min_size=2, max_size=2))
def test_no_text_breaks_a_format(texts: list[str]) -> None:
    table = build(results(texts, **DENSE))
    assert len(list(csv.reader(io.StringIO(to_csv(table), newline="")))) == 1 + 2
    cells = html_cells(table)
    assert [len(row) for row in cells] == [2, 2, 2]
    latex = to_latex(table, "t")
    assert latex.isascii()
    assert len([line for line in latex.splitlines() if line.endswith(r"\\")]) == 1 + 2
    assert not [line for line in latex.splitlines() if line.startswith(("[", "*"))]
    # by line feeds alone, as readers of Markdown do
    assert len([line for line in to_markdown(table).split("\n") if line.startswith("|")]) == 2 + 2


def test_one_seed_is_shown_and_the_note_says_which() -> None:
    table = build(results([" a", " b"], [" c", " d"], **TUNED))
    assert html_cells(table)[1] == ["The river", "a"]
    assert table.frame["seed"].tolist() == [0, 0]
    assert "Of rows with several seeds the first is shown, seed 0." in table.notes
    assert not any("seed" in note for note in sample().notes)


def test_models_are_named_where_there_are_several() -> None:
    table = build(results([" a", " b"], **DENSE), results([" c", " d"], **DENSE, model="other"))
    assert html_cells(table)[0] == ["Prompt", "tiny, dense", "other, dense"]
    assert [line.cells[1].text for line in table.lines] == ["tiny", "other"] * 2


def test_the_notes_say_how_the_texts_were_made() -> None:
    assert any("Greedy decoding: " in note and "at most 16 of them" in note for note in sample().notes)
    assert build(results([" a", " b"], **DENSE), smoke=True).caption == "Texts. Smoke run, not a measurement."


def test_texts_after_other_prompts_are_refused() -> None:
    stale = results([" a", " b"], prompts=["The river", "Bread"], **DENSE)
    with pytest.raises(RankwiseError, match=r"tables\.t\.rows\[0\]: the evaluation 'g' is of other prompts"):
        build(stale)


def test_texts_of_another_row_are_refused() -> None:
    other = RowResults(Row(model="tiny", method="svd", ratio=20), results([" a", " b"], **SMALL).evaluations)
    with pytest.raises(RankwiseError, match=r"the evaluation 'g' is of kind generation for .*'bolaco'"):
        build(other)


def test_a_row_that_missed_its_ratio_is_refused() -> None:
    missed = results([" flows on.", " salt"], **SMALL)
    missed = replace(missed, manifests=[manifest(missed.row, 25)])
    with pytest.raises(RankwiseError, match=r"removed 25\.00 % .* not 20 %.*write `tolerance: 5` on the row"):
        build(missed)
    build(replace(missed, row=missed.row.model_copy(update={"tolerance": 5.0})))

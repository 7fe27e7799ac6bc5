"""A `TableData` as CSV (full precision), Markdown, LaTeX and HTML. Equal tables give equal bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from lowrank.paper.tables.data import Cell, Column, Line, TableData

TEMPLATES = Path(__file__).with_name("templates")

_LATEX_CHARACTERS = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "–": "--",
        "…": r"\ldots{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)
_MARKDOWN_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_|<>"})


@dataclass(frozen=True)
class Heading:
    """A heading above `span` columns, the first of which is column number `start` (from 1)."""

    title: str
    start: int
    span: int


def to_csv(table: TableData) -> str:
    """All values in full precision, one row a line of ours or of published values (column `source`)."""
    text: str = table.frame.to_csv(index=False, lineterminator="\n")
    return text


def to_markdown(table: TableData) -> str:
    """Title, table and notes; the best values are bold, published lines italic."""
    frame = pd.DataFrame(
        [[_markdown_cell(cell, line) for cell in line.cells] for line in table.lines],
        columns=[_markdown_text(_full_title(column)) for column in table.columns],
    )
    body = frame.to_markdown(
        index=False,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=[column.align for column in table.columns],
    )
    notes = "".join(f"\n- {_markdown_text(note)}" for note in table.notes)
    return f"**{_markdown_text(table.caption)}**\n\n{body}\n{notes}\n"


def to_latex(table: TableData, label: str) -> str:
    """A `table` environment to `\\input`; needs the packages booktabs and graphicx."""
    environment = jinja2.Environment(  # noqa: S701 - LaTeX, not HTML: the filter `latex` escapes
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["latex"] = latex_text
    return environment.get_template("table.tex.j2").render(table=table, groups=groups_of(table.columns), label=label)


def to_html(table: TableData, name: str) -> str:
    """A fragment with its own style, in ASCII so that it reads right in any page's encoding."""
    html = (
        html_environment().get_template("table.html.j2").render(table=table, groups=groups_of(table.columns), name=name)
    )
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii")


def html_environment() -> jinja2.Environment:
    """Templates of HTML: everything is escaped unless a template says otherwise."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def safe_html(text: str) -> Markup:
    """Marks HTML that this module made as safe to embed."""
    return Markup(text)  # noqa: S704 - the template that made it escaped all values


def groups_of(columns: tuple[Column, ...]) -> list[Heading]:
    """Headings above runs of columns with the same group; an empty title where there is none."""
    groups: list[Heading] = []
    for number, column in enumerate(columns, start=1):
        if groups and groups[-1].title == column.group:
            groups[-1] = Heading(column.group, groups[-1].start, groups[-1].span + 1)
        else:
            groups.append(Heading(column.group, number, 1))
    return groups


def latex_text(value: Any) -> str:
    """Text with LaTeX's special characters escaped."""
    return str(value).translate(_LATEX_CHARACTERS)


def _full_title(column: Column) -> str:
    """Markdown has one row of headings, so perplexities say there what they are."""
    return f"{column.title} (ppl)" if column.group.startswith("Perplexity") else column.title


def _markdown_text(text: str) -> str:
    return text.translate(_MARKDOWN_SPECIAL)


def _markdown_cell(cell: Cell, line: Line) -> str:
    text = _markdown_text(cell.text)
    if not text:
        return ""
    if line.source == "published":
        return f"*{text}*"
    return f"**{text}**" if cell.best else text

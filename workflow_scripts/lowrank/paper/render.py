"""A `TableData` as CSV (full precision), Markdown, LaTeX and HTML. Equal tables give equal bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from tabulate import tabulate

from lowrank.paper.latex import LONG, latex_cell, latex_columns, latex_text
from lowrank.paper.tables.data import Cell, Column, Grid, Line, TableData
from lowrank.paper.tables.measures import ACCURACY

TEMPLATES = Path(__file__).with_name("templates")

_MARKDOWN_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_|<>[]~&$"})
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_VISIBLE = "\ufffd"  # the replacement character


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
    body = tabulate(
        [[_markdown_cell(cell, line) for cell in line.cells] for line in table.lines]
        or [[""] * len(table.columns)],  # it cannot align what has no lines
        headers=[_markdown_text(_full_title(column)) for column in table.columns],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if column.align == "right" else "left" for column in table.columns],
    )
    notes = "".join(f"\n- {_markdown_text(note)}" for note in table.notes)
    return f"**{_markdown_text(table.caption)}**\n\n{body}\n{notes}\n"


def to_latex(table: TableData, label: str) -> str:
    """A `table` to `\\input`, or a `longtable` where a page does not hold it; its first line names the packages."""
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
    environment.filters |= {"latex": latex_text, "cell": latex_cell}
    return environment.get_template("table.tex.j2").render(
        table=table,
        groups=groups_of(table.columns),
        label=label,
        types=latex_columns(table.columns),
        long=len(table.lines) >= LONG,
    )


def to_html(table: TableData, name: str) -> str:
    """A fragment with its own style, in ASCII so that it reads right in any page's encoding."""
    template = html_environment().get_template("table.html.j2")
    grid = table.grid
    html = template.render(table=table, grid=grid, groups=groups_of(grid.columns), name=name, fixed=fixed_column(grid))
    html = _CONTROL.sub(_VISIBLE, html)
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii")


def fixed_column(grid: Grid) -> int:
    """Number of the column that stays in sight while the others scroll (from 1): the methods, else the first."""
    titles = [column.title for column in grid.columns[: grid.heading]]
    return titles.index("Method") + 1 if "Method" in titles else 1


def value_parts(text: str) -> tuple[str, str]:
    """`62.1 ± 1.3` as the value and its error, which a page may print smaller; together they are the text."""
    value, mark, error = text.partition(" ±")
    return (value, mark + error) if not text.startswith("(") else (text, "")


def html_environment() -> jinja2.Environment:
    """Templates of HTML: everything is escaped unless a template says otherwise."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["value_parts"] = value_parts
    return environment


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


def _full_title(column: Column) -> str:
    """Markdown has one row of headings, so perplexities say there what they are, and equal tasks their suites."""
    if not column.group.startswith("Perplexity"):
        accuracy, mark, suite = column.group.partition(f"{ACCURACY}: ")
        return f"{column.title} ({suite})" if mark and not accuracy else column.title
    return f"{column.title} ({column.group.replace('Perplexity', 'ppl')})"


def _markdown_text(text: str) -> str:
    """Text as it is: no mark-up, no second line, nothing that a terminal obeys."""
    return _CONTROL.sub(_VISIBLE, text).translate(_MARKDOWN_SPECIAL).replace("\n", "<br>")


def _markdown_cell(cell: Cell, line: Line) -> str:
    text = _markdown_text(cell.text)
    if not text:
        return ""
    if line.source == "published":
        return f"*{text}*"
    return f"**{text}**" if cell.best else text

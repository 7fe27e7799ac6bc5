"""Text for LaTeX: ASCII only, so that it compiles whatever the input encoding and fonts are."""

from __future__ import annotations

import unicodedata
from typing import Any

from lowrank.paper.tables.data import Column

LONG = 45
"""From so many lines on, a table is too long for a page and is broken over several."""

_CHARACTERS = str.maketrans(
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
        "`": r"\textasciigrave{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "†": r"$\dagger$",
        "²": r"\textsuperscript{2}",
        "°": r"\textdegree{}",
        "–": "--",
        "—": "---",
        "…": r"\ldots{}",
        "•": r"\textbullet{}",
        "‘": r"\textquoteleft{}",
        "’": "'",
        "“": r"\textquotedblleft{}",
        "”": r"\textquotedblright{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "ß": r"\ss{}",
        "æ": r"\ae{}",
        "Æ": r"\AE{}",
        "ø": r"\o{}",
        "Ø": r"\O{}",
        "\n": " ",
        "\t": " ",
        "\u00a0": " ",
    }
)
_ACCENTS = {
    "\u0300": r"\`",
    "\u0301": r"\'",
    "\u0302": r"\^",
    "\u0303": r"\~",
    "\u0308": r"\"",
    "\u030a": r"\r",
    "\u030c": r"\v",
    "\u0327": r"\c",
}


def latex_text(value: Any) -> str:
    """Text with special characters escaped; a character that plain LaTeX has no sign for is named: `[U+4E2D]`."""
    return "".join(map(_plain, str(value).translate(_CHARACTERS)))


def latex_cell(text: str, column: Column) -> str:
    """A cell of a table. Only columns of sentences have lines.

    The end of a row and rules take a bracket or star that follows them for an argument: they must not meet one.
    """
    parts = [latex_text(line.strip()) for line in text.split("\n")]
    joined = r"\newline ".join(part or "~" for part in parts) if column.align == "text" and text else " ".join(parts)
    return f"{{}}{joined}" if joined.startswith(("[", "*")) else joined


def latex_columns(columns: tuple[Column, ...]) -> str:
    """Types of columns: sentences share the width that names and numbers leave, about a tenth of the line each."""
    texts = sum(column.align == "text" for column in columns)
    width = max(0.15, (0.95 - 0.09 * (len(columns) - texts)) / texts) if texts else 0
    paragraph = rf">{{\raggedright\arraybackslash}}p{{{width:.2f}\linewidth}}"
    return "".join(paragraph if column.align == "text" else column.align[0] for column in columns)


def _plain(character: str) -> str:
    if character.isascii() and character.isprintable():
        return character
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        letter = {"i": r"\i", "j": r"\j"}.get(parts[0], parts[0])  # dotless below an accent
        return f"{_ACCENTS[parts[1]]}{{{letter}}}"
    return f"[U+{ord(character):04X}]"

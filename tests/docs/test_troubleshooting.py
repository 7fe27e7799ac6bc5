"""docs/troubleshooting.md quotes messages as the code has them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import snakemake.exceptions

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [message.strip() for _, message in re.findall(r"^### (`+)(.*?)\1$", PAGE, re.MULTILINE)]
GAP = "…"


def texts(file: Path) -> list[str]:
    """All strings of a file, with a gap for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@cache
def all_texts() -> list[str]:
    files = [*(REPOSITORY / "workflow_scripts").rglob("*.py"), Path(snakemake.exceptions.__file__)]
    return [text for file in files for text in texts(file)]


def says(text: str, quoted: str) -> bool:
    """Whether a text of the code has the fixed parts of a quoted message, in their order."""
    pattern = ".*".join(re.escape(part.strip()) for part in quoted.split(GAP) if part.strip())
    return re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_says_what_is_quoted(quoted: str) -> None:
    assert any(says(text, quoted) for text in all_texts())


def test_a_message_that_the_code_has_not_would_be_noticed() -> None:
    assert not any(says(text, "the text is too long: it has … tokens") for text in all_texts())


def test_every_message_has_its_cure() -> None:
    assert len(QUOTED) >= 20
    sections = re.split(r"^### .*$", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) == len(QUOTED)
    assert all(len(section.partition("\n## ")[0].split()) > 10 for section in sections)

"""What `make docs` adds to mkdocs: pages of the repository that lie outside of docs/, and links that lead out of it.

On a host of git repositories the links of all pages work as they are written. On the site those to other pages lead
there, and those to code lead to the host that `SOURCES` names; without it they become the path.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "config/README.md": "studies.md",
    "profiles/README.md": "profiles.md",
}
"""Pages outside of docs/ -> where they are on the site."""
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages that lie outside of docs/ (an event of mkdocs)."""
    from mkdocs.structure.files import File

    for page, there in PAGES.items():
        files.append(File.generated(config, there, content=(REPOSITORY / page).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn a page's links into those of the site (an event of mkdocs)."""
    here = {there: name for name, there in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return with_links(markdown, here, config["extra"]["sources"])


def with_links(markdown: str, here: str, sources: str) -> str:
    """The text of a page with the links of the site.

    Args:
        markdown: the page, whose links are relative to the repository's folder that it lies in.
        here: its path in the repository.
        sources: the address under which a host shows the repository's files; empty: there is none.

    Links to what is not in the repository stay as they are, so that mkdocs names them.
    """

    def moved(found: re.Match[str]) -> str:
        label, link, anchor = found[1], found[2], found[3] or ""
        target = os.path.normpath(os.path.join(os.path.dirname(here), link))
        if target in PAGES or target.startswith("docs/"):
            there = PAGES.get(target) or target.removeprefix("docs/")
            return f"[{label}]({there}{anchor})"
        if not (REPOSITORY / target).exists():
            return found[0]
        if sources:
            return f"[{label}]({sources.rstrip('/')}/{target}{anchor})"
        return label if label.strip("`") in (target, link) else f"{label}, `{target}`"

    return "".join(text if code else LINK.sub(moved, text) for code, text in _parts(markdown))


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """The parts of a page in their order: whether each is a block of code, and its text."""
    end = 0
    for block in FENCED.finditer(markdown):
        yield False, markdown[end : block.start()]
        yield True, block[0]
        end = block.end()
    yield False, markdown[end:]

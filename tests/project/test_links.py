"""Links between pages lead to files and headings that are there, on a host of git repositories and on the site."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md", "profiles/README.md")
PAGES = [*(REPOSITORY / name for name in OTHERS), *sorted((REPOSITORY / "docs").glob("*.md"))]
HOOK = runpy.run_path(str(REPOSITORY / "docs/site_pages.py"))
CODE = re.compile(r"^( *```).*?^\1$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Untagged(yaml.SafeLoader):
    """YAML whose tags, which mkdocs knows, are left out."""


Untagged.add_multi_constructor("!", lambda *_: "")
Untagged.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: "")


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links: letters, digits and hyphens, counted where they come again."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{number}" if number else slug for slug, last in found.items() for number in range(last + 1)}


def problems(path: Path, text: str) -> list[str]:
    """Links of a page's text that lead nowhere."""
    found = []
    for link in LINK.findall(text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" in link:
            continue
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    assert problems(path, prose(path)) == []


def test_links_that_lead_nowhere_are_found() -> None:
    text = "[a](cluster.md#locks) [b](cluster.md#keys) [c](nowhere.md) [d](#nothing) [e](../README.md#licences)"
    assert problems(REPOSITORY / "docs/reruns.md", text) == ["cluster.md#keys", "nowhere.md", "#nothing"]


# --- the site ---


def entries(nav: Any) -> list[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]


def test_every_page_has_one_place_on_the_site() -> None:
    nav = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), Untagged)["nav"]
    pages = [HOOK["PAGES"].get(name) or Path(name).name for name in (str(p.relative_to(REPOSITORY)) for p in PAGES)]
    assert sorted(entries(nav)) == sorted(pages)


def test_links_of_the_site_lead_to_its_pages_or_to_the_code() -> None:
    text = "[a](../config/README.md#before-a-run) [b](cluster.md) [`c`](../rules/data.smk) [d](#x) [e](https://x.org)"
    moved = HOOK["with_links"](text, "docs/new.md", "https://host/blob/main/")
    assert moved == (
        "[a](studies.md#before-a-run) [b](cluster.md) [`c`](https://host/blob/main/rules/data.smk) [d](#x) "
        "[e](https://x.org)"
    )


def test_without_a_host_links_to_the_code_become_its_path() -> None:
    code = "```\n[in code](../Makefile)\n```\n"
    moved = HOOK["with_links"](f"[the targets](../Makefile) [`Makefile`](../Makefile)\n{code}", "docs/new.md", "")
    assert moved == f"the targets, `Makefile` `Makefile`\n{code}"


def test_pages_outside_of_docs_are_linked_from_there() -> None:
    moved = HOOK["with_links"]("![x](docs/figure_3.png) [y](profiles/README.md)", "README.md", "")
    assert moved == "![x](figure_3.png) [y](profiles.md)"
    assert HOOK["with_links"]("[z](slurm/nothing.yaml)", "profiles/README.md", "") == "[z](slurm/nothing.yaml)"

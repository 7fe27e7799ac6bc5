"""The commands of the documents: Snakemake reads them as they are meant."""

from __future__ import annotations

import re
import shlex

import pytest
from snakemake.cli import get_argument_parser

from tests.config.wrong import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "config/README.md", "profiles/README.md")]
PAGES += [*sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = [
    (path.name, command)
    for path in PAGES
    for command in re.findall(r"^(?:    |\t)(snakemake .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
TARGETS = {"all", "checkpoints", "data"}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_options_take_what_is_meant_for_them(page: str, command: str) -> None:
    """`--configfile FILE data` would read `data` as a second file."""
    read = get_argument_parser().parse_args(shlex.split(command, comments=True)[1:])
    assert set(read.targets) <= TARGETS
    for name in read.configfile or []:
        known = (REPOSITORY / name).is_file()
        assert known or str(name) in ("FILE", "config/mine.yaml"), (
            "a config of this repository, or a name to be replaced"
        )
    for name in read.profile or []:
        assert (REPOSITORY / name).is_dir(), name
    if not read.dryrun and not read.unlock:
        assert read.profile, "without a profile Snakemake asks for --cores"


def test_there_are_commands_to_read() -> None:
    assert {page for page, _ in COMMANDS} >= {"README.md", "paper.md", "cluster.md"}

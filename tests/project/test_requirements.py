"""What is imported or listed is pinned, in every environment that is shipped."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENTS = sorted((REPOSITORY / "envs").glob("*.yaml"))


def plain(name: str) -> str:
    """A distribution's name as the package index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def listed() -> set[str]:
    lines = (REPOSITORY / "envs/requirements.in").read_text(encoding="utf-8").splitlines()
    return {plain(words[0]) for line in lines if (words := line.split("#")[0].split())}


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "envs/requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    assert len({plain(name) for name, _ in pins}) == len(pins)
    return {plain(name): version for name, version in pins}


def imported() -> set[str]:
    """Distributions whose modules the library and its stages import."""
    modules: set[str] = set()
    for path in (REPOSITORY / "workflow_scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    owners = packages_distributions()
    others = {module for module in modules if module not in sys.stdlib_module_names and module in owners}
    return {plain(owners[module][0]) for module in others}


def test_every_import_is_pinned() -> None:
    """Some are there only because what is listed needs them."""
    assert {"torch", "peft"} <= imported() <= set(pinned())


def test_everything_listed_is_pinned() -> None:
    assert listed() <= set(pinned())


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_every_environment_installs_the_pins(path: Path) -> None:
    """Written out, since Snakemake gives conda the file alone."""
    dependencies = yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    pins = (REPOSITORY / "envs/requirements.txt").read_text(encoding="utf-8").splitlines()
    assert pip == [line for line in pins if line and not line.startswith("#")]
    assert not any("==" in entry for entry in dependencies if isinstance(entry, str))


def test_the_site_has_pins_of_its_own() -> None:
    lines = (REPOSITORY / "envs/docs.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "mkdocs-material" in {plain(pin.split("==")[0]) for pin in pins}

"""The container's recipe is in step with the pins and with the conda environment."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ENVS = Path(__file__).parents[2] / "envs"
RECIPE = (ENVS / "rankwise.def").read_text(encoding="utf-8")


def section(name: str) -> str:
    """The text of a section of the recipe."""
    return re.split(r"^%\w+$", RECIPE.partition(f"\n%{name}\n")[2], flags=re.MULTILINE)[0]


def test_the_image_installs_the_pins_and_nothing_else() -> None:
    source, target = section("files").split()
    assert (ENVS.parent / source).samefile(ENVS / "requirements.txt")
    installed = [line.split("install", 1)[1].split() for line in section("post").splitlines() if "pip install" in line]
    assert [[word for word in words if not word.startswith("--")] for words in installed] == [["-r", target]]


def test_the_image_has_the_python_of_the_conda_environment() -> None:
    dependencies = yaml.safe_load((ENVS / "rankwise.yaml").read_text(encoding="utf-8"))["dependencies"]
    (python,) = [entry for entry in dependencies if isinstance(entry, str) and entry.startswith("python=")]
    assert f"\nFrom: python:{python.removeprefix('python=')}-" in RECIPE


def test_the_image_is_tried_with_packages_that_are_pinned() -> None:
    pins = {
        line.split("==")[0].lower().replace("-", "_") for line in (ENVS / "requirements.txt").read_text().splitlines()
    }
    (names,) = re.findall(r'"import ([\w, ]+)"', section("test"))
    assert set(names.split(", ")) <= pins

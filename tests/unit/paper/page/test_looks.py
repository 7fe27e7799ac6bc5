"""A method looks the same in all drawings."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowrank.methods
from lowrank.config.load import load_study
from lowrank.paper.figures.style import COLOURS, HOMES, MARKERS, line_style, method_looks
from lowrank.paper.page.looks import colours, looks_of
from tests.config.wrong import REPOSITORY

METHODS = Path(lowrank.methods.__file__).parent


def test_a_method_keeps_its_look_whatever_stands_beside_it() -> None:
    alone = method_looks(["bolaco-5x1"])
    assert method_looks(["svd", "lord", "bolaco-5x1", "svd-llm"])["bolaco-5x1"] == alone["bolaco-5x1"]
    assert method_looks(["svd-llm"])["svd-llm"] != method_looks(["svd"])["svd"]


def test_every_method_that_ships_has_a_look_of_its_own() -> None:
    kinds = {path.stem.replace("_", "-") for path in METHODS.glob("[a-z]*.py")} - {"dense"}
    assert set(HOMES) == kinds
    assert len(HOMES) == len(kinds)
    alone = {kind: method_looks([kind])[kind] for kind in HOMES}
    assert method_looks(reversed(HOMES)) == alone
    looks = [line_style(number) for number in alone.values()]
    assert len({(look["color"], look["marker"]) for look in looks}) == len(HOMES)
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == len(HOMES)


@pytest.mark.parametrize("config", ["paper", "mini-paper", "quickstart"])
def test_in_the_figures_that_ship_no_two_methods_have_one_colour(config: str) -> None:
    figures = load_study(REPOSITORY / f"config/{config}.yaml").figures.values()
    drawn = [methods for figure in figures if (methods := getattr(figure, "methods", None))]
    assert drawn
    for methods in drawn:
        looks = method_looks(method for method in methods if method != "dense").values()
        assert len({line_style(number)["color"] for number in looks}) == len(looks)


def test_looks_differ_as_long_as_there_are_any() -> None:
    names = ["bolaco-5x1", "bolaco-5x4", "rankwise-a", "svd", "lord", "rankwise", "own", "rankwise-b", "lord-2"]
    looks = method_looks(names)
    assert len({line_style(number)["color"] for number in looks.values()}) == len(COLOURS) == len(names)
    assert list(looks) == names
    assert len(set(method_looks([*names, "one", "more"]).values())) == len(names) + 2


def test_every_marker_has_a_path_and_the_dense_model_none_of_these_looks() -> None:
    looks = looks_of(["dense", *(f"m{number}" for number in range(len(MARKERS)))])
    assert len({look.path for look in looks.values()}) == len(MARKERS)
    assert "dense" not in looks
    assert colours() == COLOURS

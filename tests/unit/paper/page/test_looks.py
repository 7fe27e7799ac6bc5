"""A method looks the same in all drawings."""

from __future__ import annotations

from lowrank.paper.figures.style import COLOURS, HOMES, MARKERS, method_looks
from lowrank.paper.page.looks import colours, looks_of


def test_a_method_keeps_its_look_whatever_stands_beside_it() -> None:
    alone = method_looks(["bolaco-5x1"])
    assert method_looks(["svd", "lord", "bolaco-5x1", "svd-llm"])["bolaco-5x1"] == alone["bolaco-5x1"]
    assert method_looks(["svd-llm"])["svd-llm"] != method_looks(["svd"])["svd"]


def test_looks_differ_as_long_as_there_are_any() -> None:
    names = ["bolaco-5x1", "bolaco-5x4", "asvd", "fwsvd", "obd-llm", "zs-svd", "svd", "lord", "rankwise"]
    looks = method_looks(names)
    assert sorted(looks.values()) == list(range(len(COLOURS)))
    assert list(looks) == names
    assert len(set(method_looks([*names, "one", "more"]).values())) == len(names) + 2
    assert len(HOMES) == len(COLOURS)


def test_every_marker_has_a_path_and_the_dense_model_none_of_these_looks() -> None:
    looks = looks_of(["dense", *(f"m{number}" for number in range(len(MARKERS)))])
    assert len({look.path for look in looks.values()}) == len(MARKERS)
    assert "dense" not in looks
    assert colours() == COLOURS

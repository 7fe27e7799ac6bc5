"""How searches went: what each evaluation found, and the best so far, as points of a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from pathlib import Path

from lowrank.config.outputs import Row
from lowrank.paper.page.scatter import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axis_of
from lowrank.paper.tables.data import Json

BOTTOM = 110
"""Below the axes: these drawings are half as high as the others."""


@dataclass(frozen=True)
class Progress:
    """One search.

    Attributes:
        row: the method and ratio that it is of.
        seed: its seed; of several the first is shown.
        x, y: number of the evaluation, and the objective, which is logarithmic.
        points: place of each evaluation that did not break the model, with its origin and value in words.
        line: SVG path of the best so far, in steps.
        best: the smallest objective.
    """

    row: Row
    seed: int
    x: Axis
    y: Axis
    points: Sequence[tuple[float, float, str]]
    line: str
    best: float


def searches(evidence: Mapping[Path, Json]) -> list[Progress]:
    """The searches behind the results that evaluated more than one allocation, by their logs.

    Args:
        evidence: file -> content; the log of a search, `trials.csv`, lies beside its `allocation.json`.

    Raises:
        RankwiseError: a log is missing or damaged.
    """
    from lowrank.paper.figures.search import read_trials

    found: dict[tuple[str, str, int], Progress] = {}
    for path, content in evidence.items():
        if content.get("kind") != "allocation":
            continue
        subject = content["subject"]
        key = (subject["model"], subject["method"], int(subject["ratio"]))
        trials = read_trials(path.with_name("trials.csv"))
        if key not in found and len(trials) > 1:
            row = Row(model=key[0], method=key[1], ratio=key[2])
            found[key] = _progress(row, subject["seed"], list(trials["origin"]), list(trials["objective"]))
    return list(found.values())


def _progress(row: Row, seed: int, origins: Sequence[str], objectives: Sequence[float]) -> Progress:
    x = Axis(0, len(objectives) + 1, LEFT, WIDTH - RIGHT)
    evaluations = enumerate(zip(origins, objectives, strict=True), start=1)
    working = [(number, origin, value) for number, (origin, value) in evaluations if isfinite(value)]
    y = axis_of([value for *_, value in working], HEIGHT - BOTTOM, TOP, logarithmic=True)
    points = [
        (x.place(number), y.place(value), f"evaluation {number} ({origin}): {value:.4g}")
        for number, origin, value in working
    ]
    best = list(accumulate((value for *_, value in working), min))
    line = f"M{points[0][0]},{points[0][1]}" + "".join(
        f"H{point[0]}V{y.place(value)}" for point, value in zip(points[1:], best[1:], strict=True)
    )
    return Progress(row, seed, x, y, points, line, best[-1])

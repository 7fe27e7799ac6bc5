"""What matrices that choose together may become: every combination that is worth having, as one curve.

The combinations of several matrices are too many to list, but those that some multiplier prefers are not: they walk
along the convex hulls of the matrices' curves, one step after another by what a parameter gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lowrank.ranks.curves import Curve

Indices = npt.NDArray[np.int64]


def combined(curves: Sequence[Curve]) -> tuple[Curve, Indices]:
    """The combinations of one choice a curve that minimise loss + multiplier x parameters for some multiplier.

    Args:
        curves: k of them.

    Returns:
        Sums of parameters and losses, from the smallest combination to the largest, and c x k indices of choices.
    """
    hulls = [_hull(curve) for curve in curves]
    at = [0] * len(curves)
    picks = [[hull[0] for hull in hulls]]
    steps = [
        (_gain(curve, *ends), owner)
        for owner, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for ends in pairwise(hull)
    ]
    for _, owner in sorted(steps, key=lambda step: -step[0]):  # slopes of one hull decrease: its steps keep their order
        at[owner] += 1
        picks.append([hull[place] for hull, place in zip(hulls, at, strict=True)])
    indices = np.array(picks, dtype=np.int64)
    chosen = [curve.at(indices[:, owner]) for owner, curve in enumerate(curves)]
    return Curve.of_all(chosen), indices


def worth_having(curve: Curve) -> Indices:
    """Indices of the choices, in any order so far, that no other beats in both; by growing parameters."""
    order = np.lexsort((curve.losses, curve.parameters))
    least = np.minimum.accumulate(np.concatenate([[np.inf], curve.losses[order][:-1]]))
    better: Indices = order[curve.losses[order] < least]
    return better


def _hull(curve: Curve) -> list[int]:
    """Indices of the lower convex hull of losses over parameters, from the smallest choice to that of least loss."""
    hull: list[int] = []
    for index in worth_having(curve).tolist():
        while len(hull) > 1 and _gain(curve, hull[-2], hull[-1]) <= _gain(curve, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _gain(curve: Curve, first: int, second: int) -> float:
    """Loss that a parameter gains between two choices."""
    gained = curve.losses[first] - curve.losses[second]
    return float(gained / (curve.parameters[second] - curve.parameters[first]))

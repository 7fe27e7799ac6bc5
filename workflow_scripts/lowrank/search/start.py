"""The points that a search begins with."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from lowrank.config.presets import Search
from lowrank.errors import RankwiseError
from lowrank.search.allocation import lord_point
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.space import Space

log = logging.getLogger(__name__)

POOL = 256
"""Random points of which the spread ones are chosen."""


@dataclass(frozen=True)
class Start:
    """A point to evaluate before there is a model of the objective.

    Attributes:
        origin: `transfer`, `uniform`, `lord`, `given`, `predicted` or `spread`.
        x: the variables, d, within bounds and budget.
    """

    origin: str
    x: np.ndarray


def initial_points(space: Space, settings: Search, seed: int, transferred: np.ndarray | None = None) -> list[Start]:
    """The first points of a search: those that are given, then points far from all before, up to `initial` in all.

    Given are, in this order, the transferred allocation, those of `start` and that of `start_at`, each scaled onto
    the budget; all are evaluated, even if they are more than `initial`. An allocation that does not exist in this
    space is left out with a log line. A search over loss scales begins with the prediction itself.

    Args:
        space: variables and budget.
        settings: `start`, `start_at` and `initial`.
        seed: of the spread points.
        transferred: ratios found for another model, d.

    Raises:
        RankwiseError: `start_at` names other types than are searched.
    """
    if isinstance(space, SearchSpace):
        given = _given_ratios(space, settings, transferred)
    else:
        given = [("predicted", np.zeros(len(space.names)))]
    starts = [Start(origin, space.onto_budget(x)) for origin, x in given]
    more = settings.initial - len(starts)
    return starts + [Start("spread", x) for x in spread_points(space, [start.x for start in starts], more, seed)]


def spread_points(space: Space, given: list[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
    """Points far from each other and from those given: of a random pool, always the one farthest from all so far.

    The paper's authors begin in this way. A Sobol sequence would not do: it fills a box evenly, and points under a
    budget lie on a slanted face of the box, which it does not know. Distances are in units of the variables' ranges.

    Args:
        space: variables and budget.
        given: points to stay away from; if there are none, the first of the pool is the first one chosen.
        count: how many; none if it is not positive.
        seed: of the pool.
    """
    if count < 1:
        return []
    pool = space.sample(max(POOL, count), seed)
    unit = pool / (space.upper - space.lower)
    distance = np.full(len(pool), np.inf)
    for x in given:
        distance = np.minimum(distance, np.linalg.norm(unit - x / (space.upper - space.lower), axis=1))
    chosen = []
    for _ in range(count):
        farthest = int(np.argmax(distance))
        chosen.append(pool[farthest])
        distance = np.minimum(distance, np.linalg.norm(unit - unit[farthest], axis=1))
    return chosen


def _given_ratios(space: SearchSpace, settings: Search, transferred: np.ndarray | None) -> list[tuple[str, np.ndarray]]:
    """Where they come from -> kept ratios, not yet on the budget."""
    given: list[tuple[str, np.ndarray]] = []
    if transferred is not None:
        given.append(("transfer", transferred))
    for word in settings.start:
        try:
            given.append((word, space.uniform() if word == "uniform" else lord_point(space)))
        except RankwiseError as error:
            log.info("search: does not start at `%s`: %s", word, error)
    if settings.start_at is not None:
        given.append(("given", _point_of(space, settings.start_at)))
    return given


def _point_of(space: SearchSpace, ratios: dict[str, float]) -> np.ndarray:
    """One ratio a tied type, the same in all groups of layers."""
    tied = list(dict.fromkeys(name.split("/")[0] for name in space.names))
    if set(ratios) != set(tied):
        raise RankwiseError(
            f"`start_at` must name every type that is searched, {', '.join(tied)}, and no other; "
            f"it names {', '.join(ratios) or 'none'}"
        )
    return np.array([ratios[name.split("/")[0]] for name in space.names])

"""Bayesian optimisation of the rank allocation (paper, Section 3.3).

A Gaussian process models the objective over the kept ratios, and the next allocation is the one that it expects to
improve most; `surrogate` says how. Every evaluation is appended to a CSV; a search that was killed reads it back and
goes on, and makes the same choices as one that was not, since each step seeds its generators anew and sees the same
numbers.
"""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from botorch.exceptions.errors import BotorchError, ModelFittingError

from lowrank.config.presets import Search
from lowrank.errors import RankwiseError
from lowrank.ranks.budget import Ranks
from lowrank.search.objective import Score
from lowrank.search.space import Space
from lowrank.search.start import initial_points
from lowrank.search.surrogate import candidates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One evaluated allocation.

    Attributes:
        origin: `transfer`, `uniform`, `lord`, `predicted`, `given` or `spread` for initial points; then
            `improvement`, where the model expects most, or `random`.
        x: the variables, d.
        score: what it scored.
        kept: share of the decoder's linear parameters kept after rounding.
    """

    origin: str
    x: np.ndarray
    score: Score
    kept: float


class TrialLog:
    """The CSV of all evaluations, appended to line by line and read back after a kill."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        self.columns = ["trial", "origin", "perplexity", "kl", "objective", "kept", *names]
        self.names = names

    def read(self) -> list[Trial]:
        """All complete lines; a last line that a kill cut short is dropped from the file.

        Raises:
            RankwiseError: the file is damaged, or it has other columns.
        """
        if not self.path.is_file():
            return []
        try:
            text = self.path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]
            if complete != text:
                self.path.write_text(complete, encoding="utf-8")
            rows = list(csv.DictReader(complete.splitlines()))
            if [row["trial"] for row in rows] != [str(index) for index in range(len(rows))]:
                raise ValueError("the trials are not numbered from 0")
            return [self._trial(row) for row in rows]
        except (KeyError, TypeError, ValueError) as error:  # of decoding too
            raise RankwiseError(
                f"{self.path}: damaged ({error}). Delete {self.path.parent} and run the workflow again."
            ) from error

    def _trial(self, row: Mapping[str, str]) -> Trial:
        return Trial(
            row["origin"],
            np.array([float(row[name]) for name in self.names]),
            Score(float(row["perplexity"]), float(row["kl"]) if row["kl"] else None, float(row["objective"])),
            float(row["kept"]),
        )

    def append(self, index: int, trial: Trial) -> None:
        """Add one line; numbers are written so that they read back exactly."""
        new = not self.path.is_file() or not self.path.stat().st_size
        with open(self.path, "a", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if new:
                writer.writerow(self.columns)
            score = trial.score
            numbers = [score.perplexity, score.kl, score.objective, trial.kept, *trial.x.tolist()]
            writer.writerow([index, trial.origin, *("" if n is None else repr(float(n)) for n in numbers)])


def search_allocation(
    space: Space,
    evaluate: Callable[[Mapping[str, int | None]], Score],
    settings: Search,
    seed: int,
    trials_file: Path,
    transferred: np.ndarray | None = None,
) -> list[Trial]:
    """Run the search to its last evaluation.

    Args:
        space: variables and budget.
        evaluate: scores an allocation; smaller is better.
        settings: of the search.
        seed: of the initial points and of every step.
        trials_file: read first, appended to after each evaluation.
        transferred: kept ratios found for another model, d, to begin with.

    Returns:
        All trials in order.

    Raises:
        RankwiseError: no allocation that it begins with, or none at all, has a finite score.
    """
    trial_log = TrialLog(trials_file, space.names)
    trials = trial_log.read()
    if trials:
        log.info("search: %d of %d evaluations were finished before", len(trials), settings.evaluations)
    starts = initial_points(space, settings, seed, transferred)
    ranks_of = _remembered(space)
    for index in range(len(trials), settings.evaluations):
        started = time.monotonic()
        if index < len(starts):
            origin, x = starts[index].origin, starts[index].x
        else:
            _require_a_finite_score(trials)
            origin, x = propose(space, trials, settings, seed * 100_003 + index, ranks_of)
        ranks = ranks_of(x)
        trial = Trial(origin, x, evaluate(ranks), space.budget.kept(ranks))
        trial_log.append(index, trial)
        trials.append(trial)
        log.info(
            "search %d/%d (%s): objective %.4f, best %.4f, %.1f s",
            index + 1,
            settings.evaluations,
            origin,
            trial.score.objective,
            trials[best_trial(trials)].score.objective,
            time.monotonic() - started,
        )
    _require_a_finite_score(trials)
    return trials


def _require_a_finite_score(trials: list[Trial]) -> None:
    if not any(math.isfinite(trial.score.objective) for trial in trials):
        raise RankwiseError(
            f"none of {len(trials)} allocations has a finite loss, so the search has nothing to go by; set `dtype: "
            "float32` (or `bfloat16`) for this model in the config"
        )


def best_trial(trials: list[Trial]) -> int:
    """Index of the trial with the smallest objective (the first of equals)."""
    return min(range(len(trials)), key=lambda index: trials[index].score.objective)


def objective_of(trials: list[Trial], origin: str) -> float | None:
    """What the first trial of an origin scored, or None if there was none, or none that is finite."""
    first = next((trial.score.objective for trial in trials if trial.origin == origin), math.inf)
    return first if math.isfinite(first) else None


def propose(
    space: Space, trials: list[Trial], settings: Search, seed: int, ranks_of: Callable[[np.ndarray], Ranks]
) -> tuple[str, np.ndarray]:
    """The point to try next: where the model expects most, or, in a share of the steps, a random one.

    A point whose ranks were evaluated before teaches nothing, so the best of those with new ranks is taken, if there
    is one.

    Args:
        space: variables and budget.
        trials: those so far, at least one with a finite score.
        settings: of the search.
        seed: of this step.
        ranks_of: the space's ranks of a point; it is asked for all trials each time.

    Returns:
        The point, after the word that the log of trials has for where it comes from: `improvement`, or `random`,
        also where the model could not be fitted or the acquisition not be optimised.
    """
    if np.random.default_rng((seed, 1)).random() < settings.random_share:  # not the numbers that `sample` begins with
        return "random", space.sample(1, seed)[0]
    if (only := space.only_point) is not None:
        return "improvement", only
    points = np.array([trial.x for trial in trials])
    objectives = np.array([trial.score.objective for trial in trials])
    finite = np.isfinite(objectives)
    objectives[~finite] = objectives[finite].max()  # the model has to learn that such allocations are bad
    try:
        best = list(candidates(space, points, objectives, settings, seed))
    except (RuntimeError, ValueError, BotorchError, ModelFittingError) as error:
        # A resumed search would fail at the same evaluation again, so it must be able to go on.
        log.warning("search: no model of the objective could be fitted (%s); taking a random allocation", error)
        return "random", space.sample(1, seed)[0]
    known = {_key(ranks_of(x)) for x in points}
    return "improvement", next((x for x in best if _key(ranks_of(x)) not in known), best[0])


def _remembered(space: Space) -> Callable[[np.ndarray], Ranks]:
    """The ranks of points, each computed once: those of a search over loss scales are an allocation of the model."""
    found: dict[bytes, Ranks] = {}

    def ranks_of(x: np.ndarray) -> Ranks:
        if (point := x.tobytes()) not in found:
            found[point] = space.ranks(x)
        return found[point]

    return ranks_of


def _key(ranks: Ranks) -> tuple[int | None, ...]:
    return tuple(ranks.values())

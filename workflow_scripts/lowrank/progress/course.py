"""The course of a run that goes on: steps done of all, what runs now, and about how long the rest will take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowrank.cluster.plan import THREADS
from lowrank.cluster.planned_jobs import planned_jobs
from lowrank.cluster.resources import Estimator
from lowrank.config.load import models_without_shape
from lowrank.config.study import Study
from lowrank.progress.words import duration, named

SHOWN = 2
"""Jobs that the line names, of those that run."""
ENOUGH = 0.1
"""Share of the planned work that must be measured for the time left to be more than a guess."""


def planned_seconds(study: Study) -> dict[str, float]:
    """Rule -> what the plan expects of one of its jobs without a GPU, on average.

    Right to an order of magnitude: it counts operations of a study whose models are large. Empty if the config leaves
    out the shape of a model.
    """
    if models_without_shape(study):
        return {}
    estimator = Estimator(study)
    found: dict[str, list[float]] = {}
    for job in planned_jobs(study):
        found.setdefault(job.rule, []).append(estimator.need(job.rule, job.wildcards).seconds(0, THREADS))
    return {rule: sum(each) / len(each) for rule, each in found.items()}


@dataclass(frozen=True)
class Running:
    """A job that runs: its rule, its wildcards, and when it was started."""

    rule: str
    wildcards: Mapping[str, str]
    since: float


class Course:
    """What has been done of a run, told event by event; one thread may tell events while another reads.

    Attributes:
        waiting: rule -> jobs that have not ended yet.
        plan: rule -> seconds that a job is expected to take, before any has been measured.
        running: number of a job -> the job.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.waiting: dict[str, int] = {}
        self.plan: Mapping[str, float] = {}
        self.running: dict[int, Running] = {}
        self.measured: dict[str, list[float]] = {}
        self._lock = threading.RLock()

    def will_run(self, jobs: Mapping[str, int]) -> None:
        """How many jobs of each rule are to run."""
        with self._lock:
            self.waiting = dict(jobs)

    def starts(self, number: int, rule: str, wildcards: Mapping[str, str]) -> None:
        """A job has been started, or started once more."""
        with self._lock:
            self.running[number] = Running(rule, wildcards, self.clock())

    def ends(self, number: int, well: bool = True) -> None:
        """A job has ended; one that failed may be started again."""
        with self._lock:
            if (job := self.running.pop(number, None)) is None or not well:
                return
            self.waiting[job.rule] -= 1
            self.measured.setdefault(job.rule, []).append(self.clock() - job.since)

    @property
    def done(self) -> int:
        """Jobs that are finished."""
        with self._lock:
            return sum(map(len, self.measured.values()))

    @property
    def total(self) -> int:
        """All jobs of this run."""
        with self._lock:
            return self.done + sum(self.waiting.values())

    def left(self) -> float | None:
        """Seconds until the end, about; None before a job has been measured that the plan knows.

        A rule's jobs take as long as those of it that were measured; of other rules, as long as the plan says, times
        what measured ones took longer than planned. As many run side by side as did so far.
        """
        with self._lock:
            return self._left()

    def _left(self) -> float | None:
        known = [rule for rule in self.measured if rule in self.plan]
        if not known:
            return None
        spent = {rule: sum(self.measured[rule]) for rule in known}
        slower = sum(spent.values()) / sum(self.plan[rule] * len(self.measured[rule]) for rule in known)
        now = self.clock()
        each = {
            rule: spent[rule] / len(self.measured[rule]) if rule in known else slower * self.plan.get(rule, 0)
            for rule in self.waiting
        }
        work = sum(count * each[rule] for rule, count in self.waiting.items())
        so_far = {number: now - job.since for number, job in self.running.items()}
        work -= sum(min(so_far[number], each[job.rule]) for number, job in self.running.items())
        busy = sum(spent.values()) + sum(so_far.values())
        return work / max(1.0, busy / max(now - self.began, 1e-9))

    def _measured_share(self) -> float:
        done = sum(self.plan.get(rule, 0) * len(each) for rule, each in self.measured.items())
        return done / max(done + sum(self.plan.get(rule, 0) * count for rule, count in self.waiting.items()), 1e-9)

    def __str__(self) -> str:
        with self._lock:
            return self._line()

    def _line(self) -> str:
        parts = [f"{self.done} of {self.total} steps"]
        if running := list(self.running.values()):
            names = [named(job.rule, job.wildcards) for job in running[:SHOWN]]
            more = f" and {len(running) - SHOWN} more" if len(running) > SHOWN else ""
            parts.append(" + ".join(names) + more)
        left = self.left()
        word = "about" if self._measured_share() >= ENOUGH else "at a guess"
        parts.append(
            duration(self.clock() - self.began) + (f", {word} {duration(left)} left" if left is not None else "")
        )
        return " | ".join(parts)

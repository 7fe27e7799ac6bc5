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
"""Share of the planned computing that must be measured for the time left to be more than a guess."""
STARTING = 10
"""Seconds at most that a job takes beside what it computes: to start, to open a small model."""
BELIEVED = 20
"""Seconds of computing for which the plan is believed until more has been measured."""


@dataclass(frozen=True)
class Planned:
    """What the plan expects of a job of a rule on average, in seconds: to start, and to compute."""

    starting: float
    computing: float


def planned_seconds(study: Study) -> dict[str, Planned]:
    """What the plan expects of each rule's jobs without a GPU, to an order of magnitude.

    What it allows a job of a cluster for its start is ten times what a small model takes. Empty if the config leaves
    out the shape of a model.
    """
    if models_without_shape(study):
        return {}
    estimator = Estimator(study)
    found: dict[str, list[Planned]] = {}
    for job in planned_jobs(study):
        need = estimator.need(job.rule, job.wildcards)
        allowed = need.work.seconds
        planned = Planned(min(allowed / 10, STARTING), need.seconds(0, THREADS) - allowed)
        found.setdefault(job.rule, []).append(planned)
    return {
        rule: Planned(sum(one.starting for one in each) / len(each), sum(one.computing for one in each) / len(each))
        for rule, each in found.items()
    }


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
        plan: rule -> what a job is expected to take, before any has been measured.
        running: number of a job -> the job.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.waiting: dict[str, int] = {}
        self.plan: Mapping[str, Planned] = {}
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

        A rule's jobs take as long as those of it that were measured; those of other rules as long as the plan says,
        with all computing as much slower than planned as it has been so far. Of those that ran beside another so far
        half will do so, since the last ones wait for each other.
        """
        with self._lock:
            return self._left()

    def _left(self) -> float | None:
        if not any(rule in self.plan for rule in self.measured):
            return None
        now, slower = self.clock(), self._slower()
        each = {rule: self._expected(rule, slower) for rule in self.waiting}
        work = sum(count * each[rule] for rule, count in self.waiting.items())
        so_far = {number: now - job.since for number, job in self.running.items()}
        work -= sum(min(so_far[number], each[job.rule]) for number, job in self.running.items())
        busy = sum(map(sum, self.measured.values())) + sum(so_far.values())
        return work / (1 + max(0.0, busy / max(now - self.began, 1e-9) - 1) / 2)

    def _expected(self, rule: str, slower: float) -> float:
        """Seconds of a job."""
        if rule in self.measured:
            return sum(self.measured[rule]) / len(self.measured[rule])
        planned = self.plan.get(rule, Planned(0, 0))
        return planned.starting + slower * planned.computing

    def _slower(self) -> float:
        """How many times as long as planned computing takes here: of jobs that ended, and of those that are late."""
        taken = expected = float(BELIEVED)
        for rule, seconds in self.measured.items():
            planned = self.plan.get(rule, Planned(0, 0))
            if planned.computing:
                taken += sum(max(0.0, one - planned.starting) for one in seconds)
                expected += len(seconds) * planned.computing
        slower = taken / expected
        for job in self.running.values():
            planned = self.plan.get(job.rule, Planned(0, 0))
            late = self.clock() - job.since - planned.starting
            if planned.computing and late > slower * planned.computing:
                taken += late
                expected += planned.computing
        return taken / expected

    def _measured_share(self) -> float:
        done, still = (
            sum(planned.computing * count for rule, count in jobs.items() if (planned := self.plan.get(rule)))
            for jobs in ({rule: len(each) for rule, each in self.measured.items()}, self.waiting)
        )
        return done / (done + still) if done else 0.0

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

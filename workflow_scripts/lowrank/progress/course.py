"""The course of a run that goes on: steps done of all, what runs now, and about how long the rest will take."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowrank.cluster.plan import THREADS
from lowrank.cluster.planned_jobs import Job, planned_jobs
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
ALIKE = 2
"""Planned computing of a rule's jobs that differs by no more is the same: then they take as long as one another."""


@dataclass(frozen=True)
class Planned:
    """What the plan expects of a job, in seconds: to start, and to compute."""

    starting: float = 0.0
    computing: float = 0.0


UNPLANNED = Planned()


def planned_seconds(study: Study, gpu: bool = False) -> dict[Job, Planned]:
    """What the plan expects of each job, to an order of magnitude.

    What it allows a job of a cluster for its start is ten times what a small model takes. Empty if the config leaves
    out the shape of a model.

    Args:
        study: what runs.
        gpu: whether jobs that compute on a GPU have one, and not the processor.
    """
    if models_without_shape(study):
        return {}
    estimator = Estimator(study)
    found = {}
    for job in planned_jobs(study):
        need = estimator.need(job.rule, job.wildcards)
        allowed = need.work.seconds
        found[job] = Planned(min(allowed / 10, STARTING), need.seconds(int(gpu and need.gpu), THREADS) - allowed)
    return found


@dataclass(frozen=True)
class Running:
    """A job that runs: its rule, its wildcards, and when it was started."""

    rule: str
    wildcards: Mapping[str, str]
    since: float

    @property
    def job(self) -> Job:
        """Its name in the plan."""
        return Job.of(self.rule, **self.wildcards)


class Course:
    """What has been done of a run, told event by event; one thread may tell events while another reads.

    Attributes:
        waiting: rule -> jobs that have not ended yet.
        plan: job -> what it is expected to take, before any like it has been measured.
        running: number of a job -> the job.
        measured: rule -> its jobs that have ended well, with the seconds that they took.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = clock()
        self.waiting: dict[str, int] = {}
        self.plan: Mapping[Job, Planned] = {}
        self.running: dict[int, Running] = {}
        self.measured: dict[str, dict[Job, float]] = {}
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
            self.measured.setdefault(job.rule, {})[job.job] = self.clock() - job.since

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

        A job takes as long as those of its rule that were measured, if the plan has them alike; else as long as the
        plan says, with all computing as much slower than planned as that of its rule has been so far, or of all. Of
        those that ran beside another so far half will do so, since the last ones wait for each other.
        """
        with self._lock:
            return self._left()

    def _left(self) -> float | None:
        if not any(job in self.plan for jobs in self.measured.values() for job in jobs):
            return None
        now, slower = self.clock(), self._slower()
        work = 0.0
        for rule, (still, count) in self._still().items():
            expects = self._expects(rule, slower)
            seconds = [expects(job) for job in still] or list(self.measured.get(rule, {}).values())
            work += count * _mean(seconds)
        for running in self.running.values():
            expected = self._expects(running.rule, slower)(running.job)
            work += max(0.0, expected - (now - running.since))
        busy = sum(sum(jobs.values()) for jobs in self.measured.values())
        busy += sum(now - running.since for running in self.running.values())
        return work / (1 + max(0.0, busy / max(now - self.began, 1e-9) - 1) / 2)

    def _still(self) -> dict[str, tuple[list[Job], int]]:
        """Rule -> its jobs that may not have begun yet, and how many have not; some may have ended before this run."""
        begun = {running.job for running in self.running.values()}.union(*self.measured.values())
        jobs: dict[str, list[Job]] = {rule: [] for rule in self.waiting}
        for job in self.plan:
            if job.rule in jobs and job not in begun:
                jobs[job.rule].append(job)
        running = Counter(job.rule for job in self.running.values())
        return {rule: (jobs[rule], count - running[rule]) for rule, count in self.waiting.items()}

    def _expects(self, rule: str, slower: float) -> Callable[[Job], float]:
        """What gives the seconds of a job of a rule."""
        measured = self.measured.get(rule, {})
        planned = [planned.computing for job, planned in self.plan.items() if job.rule == rule]
        if measured and (not planned or max(planned) <= ALIKE * min(planned)):
            mean = _mean(list(measured.values()))
            return lambda job: mean
        own = self._slower_than(slower, [(self._planned(job), seconds) for job, seconds in measured.items()])
        return lambda job: self._planned(job).starting + own * self._planned(job).computing

    def _planned(self, job: Job) -> Planned:
        return self.plan.get(job, UNPLANNED)

    @staticmethod
    def _slower_than(before: float, measured: Iterable[tuple[Planned, float]]) -> float:
        """How many times as long as planned computing takes: as before, as far as what was measured does not say."""
        taken, expected = before * BELIEVED, float(BELIEVED)
        for planned, seconds in measured:
            if planned.computing:
                taken += max(0.0, seconds - planned.starting)
                expected += planned.computing
        return taken / expected

    def _slower(self) -> float:
        """The same, of all jobs that ended, and of those that are late."""
        found = [(self._planned(job), seconds) for jobs in self.measured.values() for job, seconds in jobs.items()]
        slower = self._slower_than(1.0, found)
        so_far = [(self._planned(job.job), self.clock() - job.since) for job in self.running.values()]
        late = [(planned, now) for planned, now in so_far if now - planned.starting > slower * planned.computing]
        return self._slower_than(1.0, [*found, *late])

    def _measured_share(self) -> float:
        done = sum(self._planned(job).computing for jobs in self.measured.values() for job in jobs)
        still = sum(self._planned(job.job).computing for job in self.running.values())
        for jobs, count in self._still().values():
            still += count * _mean([self._planned(job).computing for job in jobs])
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

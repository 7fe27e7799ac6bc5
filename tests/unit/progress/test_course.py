"""What the line of progress says, event by event, with a clock that is set by hand."""

from __future__ import annotations

import pytest

from lowrank.config.load import load_study
from lowrank.progress.course import Course, planned_seconds
from tests.config.wrong import QUICKSTART

OF = {"model": "m", "seed": "0"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def course(clock: Clock) -> Course:
    course = Course(clock)
    course.will_run({"fetch": 1, "search": 2, "judge": 4})
    course.plan = {"fetch": 10.0, "search": 60.0, "judge": 20.0}
    return course


def test_before_anything_is_measured_no_time_is_told(course: Course) -> None:
    course.starts(1, "fetch", OF)
    assert course.left() is None
    assert str(course) == "0 of 7 steps | fetch: m, seed 0 | 0 s"


def test_jobs_take_what_the_plan_says_times_what_measured_ones_took_longer(course: Course, clock: Clock) -> None:
    course.starts(1, "fetch", OF)
    clock.now += 5  # half of what was planned
    course.ends(1)
    assert course.left() == pytest.approx(2 * 30 + 4 * 10)
    course.starts(2, "search", OF)
    clock.now += 90  # half as long again
    course.ends(2)
    assert course.left() == pytest.approx(90 + 4 * 20 * (95 / 70))
    assert (course.done, course.total) == (2, 7)


def test_what_runs_counts_as_far_as_it_is_and_side_by_side_is_faster(course: Course, clock: Clock) -> None:
    course.will_run({"judge": 4})
    course.starts(1, "judge", OF)
    course.starts(2, "judge", OF)
    clock.now += 30
    course.ends(1)
    course.ends(2)
    assert course.left() == pytest.approx(2 * 30 / 2)
    course.starts(3, "judge", OF)
    course.starts(4, "judge", OF)
    clock.now += 20
    assert course.left() == pytest.approx(2 * 10 / 2)
    assert str(course) == "2 of 4 steps | judge: m, seed 0 + judge: m, seed 0 | 50 s, about 10 s left"


def test_a_job_that_failed_still_waits(course: Course) -> None:
    course.starts(1, "search", OF)
    course.ends(1, well=False)
    assert (course.done, course.total, course.running) == (0, 7, {})
    course.starts(1, "search", OF)  # tried again
    course.ends(1)
    assert (course.done, course.total) == (1, 7)


def test_the_plan_knows_every_rule_of_a_study() -> None:
    plan = planned_seconds(load_study(QUICKSTART))
    assert {"fetch_model", "search_allocation", "write_report"} <= set(plan)
    assert all(seconds > 0 for seconds in plan.values())

"""What the line of progress says, event by event, with a clock that is set by hand."""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from typing import Any

import pytest
from rich.console import Console
from snakemake_interface_logger_plugins.common import LogEvent

from lowrank.config.load import check_study, load_study
from lowrank.progress.course import BELIEVED, STARTING, Course, Planned, planned_seconds
from tests.config.wrong import GONE, QUICKSTART, REPOSITORY, SHAPE, changed

sys.path.insert(0, str(REPOSITORY / "workflow_scripts"))
import run as command

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
    course.plan = {"fetch": Planned(2, 0), "search": Planned(10, 80), "judge": Planned(10, 20)}
    return course


def test_before_anything_is_measured_no_time_is_told(course: Course) -> None:
    course.starts(1, "fetch", OF)
    assert course.left() is None
    assert str(course) == "0 of 7 steps | fetch: m, seed 0 | 0 s"


def test_jobs_compute_as_much_longer_than_planned_as_measured_ones(course: Course, clock: Clock) -> None:
    course.starts(1, "fetch", OF)
    clock.now += 5  # it computes nothing, so it says nothing about the others
    course.ends(1)
    assert course.left() == pytest.approx(2 * 90 + 4 * 30)
    course.starts(2, "search", OF)
    clock.now += 10 + 3 * 80
    course.ends(2)
    slower = (BELIEVED + 3 * 80) / (BELIEVED + 80)
    assert course.left() == pytest.approx(250 + 4 * (10 + slower * 20))
    assert (course.done, course.total) == (2, 7)


def test_a_job_that_is_late_says_that_the_others_will_be(course: Course, clock: Clock) -> None:
    """Before any of its kind has ended: it is a first one for long on a slow machine."""
    course.starts(1, "fetch", OF)
    course.ends(1)
    course.starts(2, "search", OF)
    clock.now += 90
    assert course.left() == pytest.approx(90 + 4 * 30)
    clock.now += 320  # 400 s of computing in place of 80
    slower = (BELIEVED + 400) / (BELIEVED + 80)
    assert course.left() == pytest.approx(10 + slower * 80 + 4 * (10 + slower * 20))


def test_what_runs_counts_as_far_as_it_is_and_side_by_side_is_faster(course: Course, clock: Clock) -> None:
    """Two by two so far; of the rest one in two is thought to have another beside it."""
    course.will_run({"judge": 4})
    course.starts(1, "judge", OF)
    course.starts(2, "judge", OF)
    clock.now += 30
    course.ends(1)
    course.ends(2)
    assert course.left() == pytest.approx(2 * 30 / 1.5)
    course.starts(3, "judge", OF)
    course.starts(4, "judge", OF)
    clock.now += 15
    assert course.left() == pytest.approx(2 * 15 / 1.5)
    assert str(course) == "2 of 4 steps | judge: m, seed 0 + judge: m, seed 0 | 45 s, about 20 s left"


def test_of_little_that_was_measured_the_time_left_is_told_as_a_guess(course: Course, clock: Clock) -> None:
    """No computing of 240 planned seconds, then 80; however many quick steps there are."""
    for number, rule, said in ((1, "fetch", ", at a guess "), (2, "search", ", about ")):
        course.starts(number, rule, OF)
        clock.now += 60
        course.ends(number)
        assert said in str(course)


def test_where_nobody_watches_a_line_is_printed_now_and_then(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none before the steps are known, nor after the end."""
    monkeypatch.setattr(command, "SILENT", 0.01)
    said = io.StringIO()
    console = Console(file=said, width=200)
    watch = command.Watch(console)
    with command.live(watch, console):
        time.sleep(0.1)
        assert said.getvalue() == ""
        watch.course = course
        end = time.monotonic() + 30
        while said.getvalue().count("0 of 7 steps") < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    printed = said.getvalue()
    time.sleep(0.1)
    assert said.getvalue() == printed


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
    assert all(0 < planned.starting <= STARTING for planned in plan.values())
    assert plan["search_allocation"].computing > plan["evaluate_cost"].computing > plan["write_report"].computing == 0


def test_where_a_shape_is_left_out_nothing_is_planned() -> None:
    study = check_study(changed((SHAPE, GONE)), "x.yaml", unseen=True)
    assert planned_seconds(study) == {}


def test_a_job_is_shown_although_its_study_cannot_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise AttributeError("a mistake in here")

    monkeypatch.setattr(command, "study_of", broken)
    watch = command.Watch(Console())
    started = {"event": LogEvent.JOB_INFO, "rule_name": "fetch", "jobid": 1, "wildcards": OF}
    record = logging.makeLogRecord(started | {"log": ["results/x/logs/fetch.log"]})
    assert watch.filter(record)
    assert "fetch: m, seed 0" in str(watch.course)


def test_events_wait_while_a_line_is_made(course: Course) -> None:
    """Another thread tells them; what is read must not change meanwhile."""
    for number, rule in enumerate(("fetch", "search")):
        course.starts(number, rule, OF)
    course.ends(0)
    teller = threading.Thread(target=course.ends, args=(1,))

    class Plan(dict[str, Planned]):
        def get(self, *arguments: Any) -> Any:
            if not teller.ident:
                teller.start()
                teller.join(timeout=0.2)
            return super().get(*arguments)

    course.plan = Plan(course.plan)
    assert str(course).startswith("1 of 7 steps | search: m, seed 0 | ")
    teller.join()
    assert str(course).startswith("2 of 7 steps | ")


def test_targets_are_no_steps() -> None:
    watch = command.Watch(Console())
    for target in ("all", "data", "checkpoints"):
        stats = {target: 1, "fetch": 2, "total": 3}
        watch.filter(logging.makeLogRecord({"event": LogEvent.RUN_INFO, "stats": stats}))
        assert watch.course.total == 2

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

from lowrank.cluster.planned_jobs import Job, planned_jobs
from lowrank.cluster.resources import Estimator
from lowrank.config.load import check_study, load_study
from lowrank.progress.course import BELIEVED, STARTING, Course, Planned, planned_seconds
from tests.config.wrong import GONE, QUICKSTART, REPOSITORY, SHAPE, changed

sys.path.insert(0, str(REPOSITORY / "workflow_scripts"))
import run as command

RULES = ("search_allocation", "evaluate_cost", "write_report")


def of(seed: int) -> dict[str, str]:
    return {"model": "m", "seed": str(seed)}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def planned(**rules: list[Planned]) -> dict[Job, Planned]:
    """A plan of some jobs of each rule, which have a number from 1 on."""
    return {Job.of(rule, **of(number)): each for rule, jobs in rules.items() for number, each in enumerate(jobs, 1)}


@pytest.fixture
def course(clock: Clock) -> Course:
    course = Course(clock)
    course.will_run({"fetch": 1, "search": 2, "judge": 4})
    course.plan = planned(fetch=[Planned(2, 0)], search=[Planned(10, 80)] * 2, judge=[Planned(10, 20)] * 4)
    return course


def test_before_anything_is_measured_no_time_is_told(course: Course) -> None:
    course.starts(1, "fetch", of(1))
    assert course.left() is None
    assert str(course) == "0 of 7 steps | fetch: m, seed 1 | 0 s"


def test_jobs_compute_as_much_longer_than_planned_as_measured_ones(course: Course, clock: Clock) -> None:
    course.starts(1, "fetch", of(1))
    clock.now += 5  # it computes nothing, so it says nothing about the others
    course.ends(1)
    assert course.left() == pytest.approx(2 * 90 + 4 * 30)
    course.starts(2, "search", of(1))
    clock.now += 10 + 3 * 80
    course.ends(2)
    slower = (BELIEVED + 3 * 80) / (BELIEVED + 80)
    assert course.left() == pytest.approx(250 + 4 * (10 + slower * 20))
    assert (course.done, course.total) == (2, 7)


def test_a_job_that_is_late_says_that_the_others_will_be(course: Course, clock: Clock) -> None:
    """Before any of its kind has ended: it is a first one for long on a slow machine."""
    course.starts(1, "fetch", of(1))
    course.ends(1)
    course.starts(2, "search", of(1))
    clock.now += 90
    assert course.left() == pytest.approx(90 + 4 * 30)
    clock.now += 320  # 400 s of computing in place of 80
    slower = (BELIEVED + 400) / (BELIEVED + 80)
    assert course.left() == pytest.approx(10 + slower * 80 + 4 * (10 + slower * 20))


def test_what_runs_counts_as_far_as_it_is_and_side_by_side_is_faster(course: Course, clock: Clock) -> None:
    """Two by two so far; of the rest one in two is thought to have another beside it."""
    course.will_run({"judge": 4})
    course.starts(1, "judge", of(1))
    course.starts(2, "judge", of(2))
    clock.now += 30
    course.ends(1)
    course.ends(2)
    assert course.left() == pytest.approx(2 * 30 / 1.5)
    course.starts(3, "judge", of(3))
    course.starts(4, "judge", of(4))
    clock.now += 15
    assert course.left() == pytest.approx(2 * 15 / 1.5)
    assert str(course) == "2 of 4 steps | judge: m, seed 3 + judge: m, seed 4 | 45 s, about 20 s left"


def test_of_little_that_was_measured_the_time_left_is_told_as_a_guess(course: Course, clock: Clock) -> None:
    """No computing of 240 planned seconds, then 80; however many quick steps there are."""
    for number, rule, said in ((1, "fetch", ", at a guess "), (2, "search", ", about ")):
        course.starts(number, rule, of(1))
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
    course.starts(1, "search", of(1))
    course.ends(1, well=False)
    assert (course.done, course.total, course.running) == (0, 7, {})
    course.starts(1, "search", of(1))  # tried again
    course.ends(1)
    assert (course.done, course.total) == (1, 7)


def test_a_quick_job_says_nothing_of_a_long_one_of_its_rule(course: Course, clock: Clock) -> None:
    """The dense checkpoint is a link, and made by the rule that compresses."""
    course.will_run({"fetch": 1, "search": 2})
    course.plan = planned(fetch=[Planned(2, 0)], search=[Planned(10, 0.1), Planned(10, 4000)])
    course.starts(1, "search", of(1))
    clock.now += 11
    course.ends(1)
    left = course.left()
    assert left is not None
    assert left > 4000
    assert "at a guess" in str(course)
    course.starts(2, "search", of(2))
    clock.now += 2010
    left = course.left()
    assert left is not None
    assert 2000 < left < 2500, "half of it, as far as the first second does not make it slower"


def test_a_rule_may_be_slower_than_others(course: Course, clock: Clock) -> None:
    """What was planned for other arithmetic than that of most jobs."""
    course.will_run({"judge": 2, "search": 2})
    course.plan = planned(judge=[Planned(1, 1000)] * 2, search=[Planned(1, 400), Planned(1, 1000)])
    course.starts(1, "judge", of(1))
    clock.now += 11
    course.ends(1)
    course.starts(2, "search", of(1))
    clock.now += 400
    course.ends(2)
    left = course.left()
    assert left is not None
    assert left == pytest.approx(11 + 1 + 1000, rel=0.1)


def test_jobs_that_the_plan_does_not_know_take_as_long_as_others_of_their_rule(course: Course, clock: Clock) -> None:
    course.will_run({"fetch": 1, "extra": 3})
    for number, rule in enumerate(("fetch", "extra")):
        course.starts(number, rule, of(1))
        clock.now += 7
        course.ends(number)
    assert course.left() == pytest.approx(2 * 7)


def test_the_plan_knows_every_job_of_a_study() -> None:
    study = load_study(QUICKSTART)
    plan = planned_seconds(study)
    assert plan.keys() == planned_jobs(study).keys()
    assert all(0 < each.starting <= STARTING for each in plan.values())
    computing = {rule: max(each.computing for job, each in plan.items() if job.rule == rule) for rule in RULES}
    assert computing["search_allocation"] > computing["evaluate_cost"] > computing["write_report"] == 0


def test_with_a_gpu_what_computes_there_takes_less_time() -> None:
    study = load_study(QUICKSTART)
    without, with_one = planned_seconds(study), planned_seconds(study, gpu=True)
    for job in without:
        faster = with_one[job].computing < without[job].computing
        assert faster == (Estimator(study).need(job.rule, job.wildcards).gpu and without[job].computing > 0)


def test_where_a_shape_is_left_out_nothing_is_planned() -> None:
    study = check_study(changed((SHAPE, GONE)), "x.yaml", unseen=True)
    assert planned_seconds(study) == {}


def test_a_job_is_shown_although_its_study_cannot_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise AttributeError("a mistake in here")

    monkeypatch.setattr(command, "study_of", broken)
    watch = command.Watch(Console())
    started = {"event": LogEvent.JOB_INFO, "rule_name": "fetch", "jobid": 1, "wildcards": of(0)}
    record = logging.makeLogRecord(started | {"log": ["results/x/logs/fetch.log"]})
    assert watch.filter(record)
    assert "fetch: m, seed 0" in str(watch.course)


@pytest.mark.parametrize("gpus", [{}, {"0": "GPU-1"}])
def test_the_plan_of_a_run_is_for_the_gpus_that_there_are(
    gpus: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(QUICKSTART)
    monkeypatch.setattr(command, "study_of", lambda folder: study)
    monkeypatch.setattr(command, "usable_gpus", lambda environment: gpus)
    watch = command.Watch(Console())
    started = {"event": LogEvent.JOB_INFO, "rule_name": "fetch_model", "jobid": 1, "wildcards": {}}
    watch.filter(logging.makeLogRecord(started | {"log": ["results/x/logs/fetch.log"]}))
    assert watch.course.plan == planned_seconds(study, gpu=bool(gpus))


def test_events_wait_while_a_line_is_made(course: Course) -> None:
    """Another thread tells them; what is read must not change meanwhile."""
    for number, rule in enumerate(("fetch", "search")):
        course.starts(number, rule, of(1))
    course.ends(0)
    teller = threading.Thread(target=course.ends, args=(1,))

    class Plan(dict[Job, Planned]):
        def get(self, *arguments: Any) -> Any:
            if not teller.ident:
                teller.start()
                teller.join(timeout=0.2)
            return super().get(*arguments)

    course.plan = Plan(course.plan)
    assert str(course).startswith("1 of 7 steps | search: m, seed 1 | ")
    teller.join()
    assert str(course).startswith("2 of 7 steps | ")


def test_targets_are_no_steps() -> None:
    watch = command.Watch(Console())
    for target in ("all", "data", "checkpoints"):
        stats = {target: 1, "fetch": 2, "total": 3}
        watch.filter(logging.makeLogRecord({"event": LogEvent.RUN_INFO, "stats": stats}))
        assert watch.course.total == 2

"""What reruns when: for each change the jobs of a dry run, no more and no less, and why Snakemake says that they run.

`rerun_cases.py` says which jobs a change concerns by itself; what follows from them is looked up in `planned_jobs`,
which works out from the config alone who waits for whom.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowrank.cluster.planned_jobs import Job, Jobs, planned_jobs
from lowrank.config.load import load_study
from lowrank.config.study import Study
from lowrank.reruns.reasons import BY_ANOTHER_JOB
from tests.workflow.changes import MISSING, Change
from tests.workflow.clones import (
    REPOSITORY,
    Rerun,
    clone,
    leave_out,
    pool,
    pretend_finished,
    read_config,
    reruns,
    write_config,
)
from tests.workflow.rerun_cases import CHANGES, LEFT_OUT


@dataclass(frozen=True)
class Finished:
    """A study whose results are there."""

    config: str
    study: Study
    jobs: Jobs


@dataclass(frozen=True)
class Tried:
    """A change in its own checkout, and the dry run of it."""

    checkout: Path
    before: Finished
    dry_run: Future[list[Rerun]]


CASES = [(change, name) for change in CHANGES for name in change.configs]


@pytest.fixture(scope="module")
def tried(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[tuple[str, str], Tried]]:
    """All changes, each in a clone of its own; two dry runs at a time."""
    folder = tmp_path_factory.mktemp("clones")
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]
    wanted = dict.fromkeys(cases)
    source = clone(REPOSITORY, folder / "source")
    for name, models in LEFT_OUT.items():
        content = read_config(source, name)
        leave_out(content, models)
        write_config(source, name, content)
    with pool() as processes:
        names = {name for _, name in wanted}
        finished = {name: clone(source, folder / f"finished-{name}") for name in sorted(names)}
        pending = {name: processes.submit(pretend_finished, place, name) for name, place in finished.items()}
        studies = {name: finished_study(place / f"config/{name}.yaml") for name, place in finished.items()}
        found = {}
        for change, name in wanted:
            pending[name].result()
            place = clone(finished[name], folder / f"{name}-{change.name}")
            change.do(place, name)
            dry_run = processes.submit(reruns, place, name, *change.arguments)
            found[change.name, name] = Tried(place, studies[name], dry_run)
        yield found


def finished_study(config: Path) -> Finished:
    study = load_study(config)
    return Finished(config.read_text(), study, planned_jobs(study))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}: {case[0].name}")
def test_what_reruns(case: tuple[Change, str], tried: dict[tuple[str, str], Tried]) -> None:
    change, name = case
    this = tried[change.name, name]
    config = this.checkout / f"config/{name}.yaml"
    jobs = this.before.jobs if config.read_text() == this.before.config else planned_jobs(load_study(config))
    new = jobs.keys() - this.before.jobs.keys()
    concerned = {job for job in jobs if change.concerns(job, this.before.study)} | new
    expected = set(concerned)
    for job, after in jobs.items():  # each stands after those that it waits for
        if expected.intersection(after):
            expected.add(job)
    found = {Job.of(rerun.rule, **rerun.wildcards): rerun.reason for rerun in this.dry_run.result()}
    assert found.keys() == expected
    for job in concerned:  # Snakemake does not look further once it knows that an input is made again
        reason = MISSING if job in new else BY_ANOTHER_JOB if expected.intersection(jobs[job]) else change.reason
        assert found[job].startswith(reason), job


NAMED = {change.name: change for change in CHANGES}


@pytest.mark.parametrize(
    ("case", "target", "words"),
    [
        (
            (NAMED["a learning rate"], "quickstart"),
            "",
            ["post_train, model smollm2-135m", "    `tuning.learning_rate` was 0.01, and is 0.5", "1 evaluate_cost"],
        ),
        (
            (NAMED["the search"], "quickstart"),
            "results/quickstart/tables/table_8.csv",
            ["5 jobs would run.", "search_allocation, model", "    the code that it runs has changed", "1 make_table"],
        ),
        ((NAMED["what concerns nothing"], "quickstart"), "", ["Nothing would run"]),
        ((NAMED["what concerns nothing"], "quickstart"), "checkpoints", ["Nothing would run"]),
    ],
    ids=["all", "a target", "nothing", "nothing of checkpoints"],
)
def test_make_why(case: tuple[Change, str], target: str, words: list[str], tried: dict[tuple[str, str], Tried]) -> None:
    """The command behind `make why`, without the set-up of an environment."""
    options = ["--dry-run", "--no-print-directory", "--assume-old=setup"]
    makefile = ["make", *options, "why", "CONFIG=config/quickstart.yaml", f"TARGET={target}"]
    line = subprocess.run(makefile, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    command = [sys.executable if word == "python" else word for word in shlex.split(line)]
    place = tried[case[0].name, case[1]].checkout
    run = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for part in words:
        assert part in run.stdout

"""The state of a run, of made-up logs, locks and records of the jobs of a small study."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lowrank.cluster.planned_jobs import Job, planned_jobs
from lowrank.config.load import check_study
from lowrank.files import write_json
from lowrank.jobs.lock import Holder, lock_path
from lowrank.jobs.record import record_file
from lowrank.layout import PROVENANCE, USED_CONFIG, Layout
from lowrank.progress.status import main
from lowrank.progress.steps import State, Step, steps_of
from tests.config.wrong import changed

REPOSITORY = Path(__file__).parents[3]
STUDY = check_study(changed())
LAYOUT = Layout(STUDY)
JOBS = list(planned_jobs(STUDY))
SEARCH = next(job for job in JOBS if job.rule == "search_allocation")
OUTPUT = LAYOUT.allocation(*(SEARCH.wildcards[name] for name in ("model", "method", "ratio", "seed")))


def finish(root: Path, job: Job) -> None:
    """Leave what a finished job leaves: a log, an output, and a record that names it."""
    log = root / LAYOUT.log(job.rule, job.wildcards)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"12:00:00 INFO {job.rule}: Python\n12:01:01 INFO {job.rule}: finished in 61.0 s, peak\n")
    output = f"{LAYOUT.run}/made/{job.rule}/{'-'.join(job.wildcards.values())}"
    (root / output).parent.mkdir(parents=True, exist_ok=True)
    (root / output).touch()
    record = record_file(str(log))
    assert record is not None
    write_json(record, {"rule": job.rule, "outputs": {output: "0"}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a finished run."""
    write_json(tmp_path / LAYOUT.used_config, STUDY.plain())
    for job in JOBS:
        finish(tmp_path, job)
    return tmp_path


def test_a_run_whose_model_is_not_fetched_yet_has_a_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((root / LAYOUT.used_config).read_text())
    for model in config["models"].values():
        model["shape"] = None
    (root / LAYOUT.used_config).write_text(json.dumps(config))
    assert main([str(root / LAYOUT.run)]) == 0
    assert "another version" not in capsys.readouterr().out


def test_the_folder_of_make_compress_stands_for_the_run_in_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root / LAYOUT.run)]) == 0
    expected = capsys.readouterr().out
    assert main([str(root)]) == 0
    assert capsys.readouterr().out == expected
    (root / "results/another").mkdir()
    assert main([str(root)]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_rules_stand_in_the_order_of_their_work(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a dense model lets begin at once (its evaluation) does not come before the statistics of others."""
    assert main([str(root / LAYOUT.run)]) == 0
    printed = capsys.readouterr().out
    places = {rule: printed.index(f" {rule} ") for rule in {job.rule for job in JOBS}}
    order = ["fetch_model", "sample_calibration", "collect_statistics", "compute_bases", "search_allocation"]
    order += ["compress_model", "evaluate_perplexity", "make_table", "write_report"]
    assert [places[rule] for rule in order] == sorted(places[rule] for rule in order)


def begun(root: Path, *more: str) -> None:
    """The search has been started again: its output is gone, its log begun."""
    log = root / LAYOUT.log(SEARCH.rule, SEARCH.wildcards)
    log.write_text("\n".join(["12:00:00 INFO search_allocation: Python", *more]) + "\n")
    (root / f"{LAYOUT.run}/made/search_allocation/{'-'.join(SEARCH.wildcards.values())}").unlink(missing_ok=True)


def lock(root: Path, holder: Holder) -> None:
    path = lock_path(root / OUTPUT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))


def search(root: Path) -> Step:
    """The step of the search; all others are done."""
    (step,) = [step for step in steps_of(STUDY, root) if step.job == SEARCH]
    assert {other.state for other in steps_of(STUDY, root) if other.job != SEARCH} == {State.DONE}
    return step


def test_a_finished_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {(step.state, step.seconds) for step in steps_of(STUDY, root)} == {(State.DONE, 61.0)}
    assert main([str(root / LAYOUT.run)]) == 0
    assert f"{len(JOBS)} done of {len(JOBS)}." in capsys.readouterr().out


def test_a_job_with_a_lock_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(root)
    name = LAYOUT.log(SEARCH.rule, SEARCH.wildcards)
    lock(root, Holder.here("search_allocation", name))
    step = search(root)
    assert step.state is State.RUNNING
    assert step.seconds is not None
    assert step.seconds < 60
    assert main([str(root / LAYOUT.run)]) == 0
    said = capsys.readouterr().out
    assert f"1 running of {len(JOBS)}." in said
    assert f"running search_allocation: smollm2-135m, bolaco-5x1, {SEARCH.wildcards['ratio']}, seed 0: since " in said


@pytest.mark.parametrize("model", ["checkpoint", "layers", "logs"])
def test_a_model_may_have_the_name_of_a_folder_that_holds_no_locks(root: Path, model: str) -> None:
    begun(root)
    place = lock_path(root / f"{LAYOUT.run}/evaluation/{model}/held-out.json")
    place.parent.mkdir(parents=True)
    log = LAYOUT.log(SEARCH.rule, SEARCH.wildcards)
    place.write_text(json.dumps(asdict(replace(Holder.here(SEARCH.rule), log=log))))
    assert search(root).state is State.RUNNING


def test_a_copy_of_a_run_is_not_taken_for_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / LAYOUT.run, root / "results/old")
    assert main([str(root / "results/old")]) == 1
    assert f"its config is that of {LAYOUT.run}, so this is a copy, or renamed" in capsys.readouterr().err
    (root / "link").symlink_to(root / LAYOUT.run)
    assert main([str(root / LAYOUT.run / ".")]) == 0


def test_a_job_whose_process_is_gone_was_stopped(root: Path) -> None:
    begun(root)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    name = LAYOUT.log(SEARCH.rule, SEARCH.wildcards)
    lock(root, replace(Holder.here("search_allocation", name), process=child.pid, started="0"))
    assert search(root).state is State.STOPPED


def test_a_failed_job_with_its_error_and_log(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(root, "12:00:05 ERROR search_allocation: bases.json: damaged. Delete it.")
    assert search(root).state is State.FAILED
    assert main([str(root / LAYOUT.run)]) == 0
    said = capsys.readouterr().out
    assert "seed 0: bases.json: damaged. Delete it.\n" in said
    assert f"    log: {root / LAYOUT.log(SEARCH.rule, SEARCH.wildcards)}\n" in said


def test_what_is_deleted_is_missing(root: Path) -> None:
    (root / f"{LAYOUT.run}/made/search_allocation/{'-'.join(SEARCH.wildcards.values())}").unlink()
    assert search(root).state is State.MISSING


def test_without_logs_records_tell(root: Path) -> None:
    (root / LAYOUT.log(SEARCH.rule, SEARCH.wildcards)).unlink()
    assert (search(root).state, search(root).seconds) == (State.DONE, None)


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path}: holds no run (config.json is missing)" in capsys.readouterr().err


@pytest.mark.parametrize("name", [USED_CONFIG, PROVENANCE])
def test_results_of_another_version_are_one_message(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what pydantic says of the config in them."""
    config = STUDY.plain() | {"ranking": {}}
    write_json(tmp_path / name, config if name == USED_CONFIG else {"config": config})
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / name}: another version of rankwise made these results" in said
    assert "(ranking: " in said
    assert "pydantic" not in said


def test_it_starts_without_torch(root: Path) -> None:
    code = (
        "import sys; from lowrank.progress.status import main; code = main([sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'snakemake', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "workflow_scripts")}
    run = subprocess.run([sys.executable, "-c", code, str(root / LAYOUT.run)], env=environment, check=False)
    assert run.returncode == 0

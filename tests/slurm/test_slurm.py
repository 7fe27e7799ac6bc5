"""A tiny study on a real SLURM by the literal `--profile slurm`, undisturbed and through every fault.

After the recovery that docs/cluster.md names, its tables must be those of the undisturbed run, and no file may ever be
seen under its own name unless it is whole. And one job on both nodes, whose processes SLURM's own `srun` starts; no
network lies between them, since they are one machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from lowrank.jobs.crew import Crew
from lowrank.jobs.forkserver import FORKED
from lowrank.post_training.job import Progress
from lowrank.post_training.launch import launch
from tests.slurm.slurm_cluster import CPU_NODE, GPU_NODE, Cluster, Job, until
from tests.slurm.slurm_study import GPUS_IN_FLIGHT, ROOT, Study
from tests.slurm.watcher import watched
from tests.unit.post_training.post_training_samples import a_job, save_tiny_model

pytestmark = pytest.mark.slurm

ON_PROCESSORS = {"sample_calibration", "compress_model"}
"""Rules that need no GPU; compression does if it decomposes weights, as SVD does."""
ON_GPUS = {
    *("collect_statistics", "collect_gradients", "compute_bases", "select_validation", "measure_sensitivity"),
    *("eliminate_neurons", "search_allocation", "compress_model", "post_train"),
    *("evaluate_perplexity", "evaluate_zero_shot", "evaluate_cost", "evaluate_generation"),
}
AT_WORK = ("PENDING", "RUNNING", "COMPLETING")
ALLOCATION = "allocation/tiny/bolaco/20/seed0"


def most_at_once(jobs: list[Job]) -> int:
    """The most GPUs that jobs held at the same time."""
    return max(sum(other.gpus for other in jobs if other.started <= job.started < other.ended) for job in jobs)


# --- undisturbed ---


def test_the_study_is_finished_and_nothing_is_left_to_do(undisturbed: Study) -> None:
    assert os.readlink(undisturbed.clone / "slurm") == "profiles/slurm"
    assert len(undisturbed.tables()) == 4 * 4
    assert (undisturbed.run / "report.html").is_file()
    assert not undisturbed.leftovers()
    assert {job.state for job in undisturbed.first} == {"COMPLETED"}
    assert "Nothing to be done" in undisturbed.snakemake()


def test_rules_go_where_their_resources_are(undisturbed: Study) -> None:
    assert {job.rule for job in undisturbed.first if not job.gpus} == ON_PROCESSORS
    assert {job.rule for job in undisturbed.first if job.gpus} == ON_GPUS
    for job in undisturbed.first:
        assert job.partition == ("accelerators" if job.gpus else "processors"), job
        assert job.gpus <= 1, job
    assert most_at_once(undisturbed.first) <= GPUS_IN_FLIGHT


def test_each_log_names_interpreter_job_torch_and_device(undisturbed: Study) -> None:
    for job in undisturbed.first:
        log = undisturbed.log(job)
        assert f"{job.rule}: Python {sys.version.split()[0]} ({sys.executable}), host " in log
        assert f"SLURM job {job.number}, " in log
        assert ("1 GPU asked for" in log) == bool(job.gpus), log
        assert f"torch {version('torch')}" in log, log
        assert ("a fork of process" in log) == (undisturbed.fork_server != ":" and job.rule in FORKED), log


# --- faults of jobs and nodes, in one run ---


def test_jobs_that_fail_are_cancelled_run_out_of_time_or_memory_or_lose_their_node(
    undisturbed: Study, cluster: Cluster, tmp_path: Path
) -> None:
    """One fault for each of five jobs; the retries of the profile and SLURM's requeueing are the whole recovery."""
    study = undisturbed.copy(tmp_path, "evaluation/tiny/svd", "compressed/tiny/rankwise", "evaluation/tiny/rankwise")
    study.write_site(
        set_resources={
            # A GPU that is not there: the first try may not compute on the processor instead.
            "evaluate_cost": {"device": "'gpu' if attempt == 1 else 'cpu'"},
            "evaluate_generation": {"mem_mb": "300 if attempt == 1 else 3000"},
        }
    )

    def cancel(job: Job) -> None:
        cluster.order("scancel", job.number)

    def run_out_of_time(job: Job) -> None:
        cluster.order("scontrol", "update", f"JobId={job.number}", "EndTime=now+10")

    def lose_node(job: Job) -> None:
        cluster.lose(CPU_NODE)
        until(lambda: cluster.state(job) == "PENDING", f"{job} to be queued again")
        until(lambda: not cluster.steps(job), f"the processes of {job} to end")

        def started_again() -> bool:
            """SLURM would wait for 2 minutes; started too soon, the job is held and its node drained."""
            cluster.bring_back(CPU_NODE)
            if cluster.state(job) == "PENDING":
                cluster.ask("scontrol", "release", job.number)
                cluster.ask("scontrol", "update", f"JobId={job.number}", "StartTime=now")
            return bool(cluster.steps(job)) or cluster.state(job) in ("RUNNING", "COMPLETING", "COMPLETED")

        until(started_again, f"{job} to start again", every=2.0)

    faults: dict[str, Callable[[Job], None]] = {
        "evaluate_perplexity_wildcards_tiny_svd_20_none_0_held-out": cancel,
        "evaluate_zero_shot_wildcards_tiny_svd_20_none_0_zero-shot": run_out_of_time,
        "compress_model_wildcards_tiny_rankwise_20_0": lose_node,
    }
    with watched(study.run), study.head() as head:
        # All are stopped before anything happens to one: a fault takes long enough for the others to end.
        frozen = study.freeze_at_locks(*(f"rule_{fault}" for fault in faults))
        config = study.folder / "inputs/tiny.yaml"
        before = config.read_text()
        config.write_text(re.sub(r"windows: \d+", "windows: 1", before))  # which jobs of this head do not see
        assert config.read_text() != before
        for job in frozen:
            faults[job.comment.removeprefix("rule_")](job)
        head.wait(timeout=1800)
        config.write_text(before)
    assert head.returncode == 0, study.said()[-6000:]
    assert study.tables() == undisturbed.tables()
    assert not study.leftovers()
    assert most_at_once(study.jobs()) <= GPUS_IN_FLIGHT
    check_tries(study)


def check_tries(study: Study) -> None:
    """What became of each job, and what the logs of those that failed say."""
    tries: dict[str, list[Job]] = {}
    for job in study.jobs():
        tries.setdefault(job.comment, []).append(job)
    states = sorted((jobs[0].rule, [job.state for job in jobs]) for jobs in tries.values())
    assert states == [
        ("compress_model", ["COMPLETED"]),  # started anew by SLURM, under its number
        ("evaluate_cost", ["FAILED", "COMPLETED"]),
        ("evaluate_generation", ["FAILED", "COMPLETED"]),
        ("evaluate_perplexity", ["CANCELLED", "COMPLETED"]),
        ("evaluate_perplexity", ["COMPLETED"]),  # of the checkpoint that was compressed again
        ("evaluate_zero_shot", ["TIMEOUT", "COMPLETED"]),
    ]
    first = {jobs[0].rule: study.log(jobs[0]) for jobs in tries.values() if len(jobs) > 1}
    assert "1 GPU was asked for, and this job sees none on " in first["evaluate_cost"]
    assert "exceeded memory limit" in first["evaluate_generation"]
    assert "DUE TO TIME LIMIT" in first["evaluate_zero_shot"]
    second = {jobs[1].rule: study.log(jobs[1]) for jobs in tries.values() if len(jobs) > 1}
    assert not any("a fork of process" in log for log in (*first.values(), *second.values())), "a cluster has no server"
    for rule in ("evaluate_perplexity", "evaluate_zero_shot"):  # they were killed, so that their locks remained
        assert re.search(r"taking over the lock .* of a job that is gone \(SLURM job \d+", second[rule])


# --- faults of the head ---


def test_a_head_that_is_killed_interrupted_and_terminated(undisturbed: Study, cluster: Cluster, tmp_path: Path) -> None:
    """SIGKILL during a search, SIGINT and SIGTERM during post-training, one after the other in one study."""
    study = undisturbed.copy(tmp_path, ALLOCATION, "compressed/tiny/bolaco", "tuned", "evaluation/tiny/bolaco")
    with watched(study.run):
        orphan = kill_during_search(study, cluster)
        refuse_a_second_writer(study, orphan)
        cancel_orphans(study, cluster, orphan)
        interrupt_post_training(study, cluster)
        terminate_during_post_training(study, cluster)
        study.snakemake()
    assert study.tables() == undisturbed.tables()
    assert (study.run / ALLOCATION / "trials.csv").read_bytes() == (
        undisturbed.run / ALLOCATION / "trials.csv"
    ).read_bytes()
    assert found_allocation(study) == found_allocation(undisturbed)
    assert not study.leftovers()


def found_allocation(study: Study) -> dict[str, Any]:
    found = json.loads((study.run / ALLOCATION / "allocation.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "environment")}


def kill_during_search(study: Study, cluster: Cluster) -> Job:
    """SIGKILL: the search, stopped after some evaluations, is left in the queue without a head."""
    with study.head() as head:
        job = study.at_work("search_allocation")
        stage = study.stage(job)
        assert stage

        def evaluated() -> bool:
            with suppress(FileNotFoundError):  # it ended meanwhile
                logs = list(study.run.glob(".state/search_allocation-*/trials.csv"))
                return bool(logs) and logs[0].read_bytes().count(b"\n") > 2
            return False

        until(evaluated, "some evaluations", every=0.005, failed=lambda: "" if stage.is_running() else "it has ended")
        stage.suspend()
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
    assert cluster.state(job) == "RUNNING"
    assert not (study.run / ALLOCATION / "allocation.json").exists()
    return job


def refuse_a_second_writer(study: Study, orphan: Job) -> None:
    """Who starts Snakemake again without cancelling the orphan is told of it, and no job is submitted."""
    study.snakemake("--unlock")
    said = study.snakemake(fails=True)
    assert not study.jobs()
    assert "jobs of an earlier start may still write to results/tiny, by these locks:" in said
    assert f"SLURM job {orphan.number}, search_allocation, process " in said
    assert "Traceback" not in said


def cancel_orphans(study: Study, cluster: Cluster, orphan: Job) -> None:
    """What docs/cluster.md says."""
    cluster.order("scancel", "--name", orphan.name)
    until(lambda: cluster.state(orphan) == "CANCELLED", "the orphan to end")


def interrupt_post_training(study: Study, cluster: Cluster) -> None:
    """Ctrl-C: the search goes on where it stood; the head cancels the jobs that run then."""
    with study.head() as head:
        job = study.at_work("post_train")
        until(lambda: list(study.run.glob(".state/post_train-*/stage*/progress.json")), "a checkpoint", every=0.005)
        study.freeze(job)
        os.killpg(head.pid, signal.SIGINT)
        assert head.wait(timeout=1800)
    until(lambda: cluster.state(job) == "CANCELLED", f"{job} to be cancelled")
    until(lambda: not any(job.state in AT_WORK for job in study.jobs()), "the others to end")
    (search,) = [job for job in study.jobs() if job.rule == "search_allocation"]
    assert re.search(r"search: [2-6] of 6 evaluations were finished before", study.log(search))
    assert "taking over the lock" in study.log(search)
    assert not (study.run / "tuned/tiny/bolaco/20/scales/seed0/manifest.json").exists()


def terminate_during_post_training(study: Study, cluster: Cluster) -> None:
    """SIGTERM: post-training goes on where it stood; the head waits for what runs, and submits nothing new."""
    with study.head() as head:
        job = study.at_work("post_train")
        head.send_signal(signal.SIGTERM)
        assert head.wait(timeout=1800)
    assert cluster.state(job) == "COMPLETED"
    assert re.search(r"going on after step [23] of 3", study.log(job))
    assert (study.run / "tuned/tiny/bolaco/20/scales/seed0/manifest.json").exists()
    assert not list((study.run / "evaluation/tiny/bolaco/20").glob("scales/seed0/*.json"))


# --- several nodes ---

PATHS = [str(ROOT / name) for name in ("workflow_scripts", ".")]
SCRIPT = """#!{python}
import json, logging, os, sys
from pathlib import Path

sys.path[:0] = {paths!r}
os.environ["PYTHONPATH"] = os.pathsep.join({paths!r})
os.environ["CUDA_VISIBLE_DEVICES"] = ""
kept = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_SUBMIT_DIR")
for name in list(os.environ):  # what Snakemake's job step leaves of them
    if name.startswith(("SLURM_", "SRUN_", "SBATCH_")) and name not in kept:
        del os.environ[name]
logging.basicConfig(level=logging.INFO)
from tests.unit.jobs import crew_work
from lowrank.jobs.crew import Crew
from lowrank.jobs.launcher import run_shared
from lowrank.post_training.job import TrainingJob
from lowrank.post_training.launch import launch

folder = Path({folder!r})
sums = [run_shared(crew_work.add_ranks, {{}}, Crew(1, 2, name), 1, folder / name) for name in ("torchrun", "deepspeed")]
launch(TrainingJob(**json.loads({job!r})), Crew(1, 2), 1)
(folder / "sums.json").write_text(json.dumps(sums))
"""


def test_two_nodes_work_on_one_job(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    checkpoint = save_tiny_model(tmp_path / "model")
    alone, shared = (a_job(checkpoint, tmp_path / name, micro_batch_size=2, steps=3) for name in ("alone", "shared"))
    launch(alone, Crew(), 1)
    script = tmp_path / "job.py"
    job = json.dumps(vars(shared))
    script.write_text(SCRIPT.format(python=sys.executable, paths=PATHS, folder=str(tmp_path), job=job))
    cluster.order("scontrol", "create", "PartitionName=both", f"Nodes={CPU_NODE},{GPU_NODE}", "MaxTime=60")
    try:
        options = ["--partition=both", "--nodes=2", "--ntasks-per-node=2", "--mem=6000", "--time=20"]
        options.append(f"--output={tmp_path}/log")
        run = subprocess.run(
            ["sbatch", "--wait", *options, str(script)],
            env=cluster.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "log").read_text()[-3000:]
    finally:
        cluster.ask("scontrol", "delete", "PartitionName=both")
    sums = json.loads((tmp_path / "sums.json").read_text())
    assert [found["total"] for found in sums] == [[1, 2, 2e-30]] * 2
    hosts = (tmp_path / "deepspeed/hostfile1").read_text()
    assert hosts == f"{CPU_NODE} slots=1\n{GPU_NODE} slots=1\n"
    one, two = (Progress.load(tmp_path / name) for name in ("alone", "shared"))
    for curve in ("loss", "validation"):
        assert dict(getattr(two, curve)) == pytest.approx(dict(getattr(one, curve)), rel=1e-5)

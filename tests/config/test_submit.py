"""What would be submitted to SLURM: the plugin's own lines for every job of the paper; and plans without a cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.cluster.needs import memory_request, runtime_request
from lowrank.cluster.planned_jobs import Job, planned_jobs
from lowrank.cluster.resources import Estimator
from lowrank.config.load import load_study
from tests.config.wrong import REPOSITORY

pytestmark = pytest.mark.slow

pytest.importorskip("snakemake_executor_plugin_slurm", reason="the SLURM plugin of Snakemake is not installed")

PARTITIONS = REPOSITORY / "profiles/slurm/partitions.example.yaml"
PAPER = REPOSITORY / "config/paper.yaml"
QUICKSTART = REPOSITORY / "config/quickstart.yaml"
ON_THE_HEAD = {
    *("all", "fetch_model", "fetch_corpus", "fetch_token_corpus", "fetch_instructions", "fetch_task"),
    *("compare_texts", "make_table", "draw_figure", "write_provenance", "write_report", "give_up_checkpoint"),
}
ON_PROCESSORS = {"sample_calibration", "select_validation", "compress_model"}
"""Of the last two only jobs that keep every window, and those that slice bases which are there."""
Described = dict[str, Any]


def without_slurm(folder: Path) -> dict[str, str]:
    """An environment in which no program of SLURM can be found."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder)}


def plan(folder: Path, *arguments: str, partitions: Path | str = PARTITIONS) -> subprocess.CompletedProcess[str]:
    """What `submitted.py` says of a Snakemake command."""
    script = Path(__file__).with_name("submitted.py")
    return subprocess.run(
        [sys.executable, str(script), str(partitions), *arguments, "--directory", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=without_slurm(folder),
    )


def jobs_of(run: subprocess.CompletedProcess[str]) -> list[list[Described]]:
    """Each job at its first and at its second try."""
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("JOBS ")]
    found: list[list[Described]] = json.loads(line.removeprefix("JOBS "))
    return found


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> list[list[Described]]:
    """The literal command of the README, from a fresh clone, with a GPU type of the site."""
    folder = tmp_path_factory.mktemp("cluster")
    return jobs_of(plan(folder, "all", "--profile", "slurm"))


def test_the_profile_takes_the_papers_study_without_a_cluster(submitted: list[list[Described]]) -> None:
    found = {Job.of(job["rule"], **job["wildcards"]) for job, _ in submitted if job["rule"] != "all"}
    assert found == set(planned_jobs(load_study(PAPER)))


def test_only_the_head_node_fetches_and_writes_tables(submitted: list[list[Described]]) -> None:
    assert {job["rule"] for job, _ in submitted if job["local"]} == ON_THE_HEAD - {"fetch_token_corpus"}


def test_every_rule_of_the_head_node_is_said_to_be_local() -> None:
    """Also those that no job of the shipped configs is of, and those that another rule stands for."""
    local: set[str] = set()
    rules: set[str] = set()
    for file in (REPOSITORY / "rules/data.smk", REPOSITORY / "rules/paper.smk"):
        text = file.read_text(encoding="utf-8")
        local |= set(re.findall(r"^    (\w+),$", text.partition("localrules:")[2].partition("\n\n\n")[0], re.MULTILINE))
        rules |= set(re.findall(r"^(?:use rule \w+ as|rule) (\w+)", text, re.MULTILINE))
        if file.stem == "data":  # a wrong hash stays wrong, whatever the profile says of retries
            assert text.count("    retries: 0\n") == len(re.findall(r"^rule ", text, re.MULTILINE)) > 0
    assert "fetch_token_corpus" in rules
    assert rules == local == ON_THE_HEAD - {"all", "give_up_checkpoint"}


def test_every_job_asks_for_what_is_estimated_for_it(submitted: list[list[Described]]) -> None:
    estimator = Estimator(load_study(PAPER))
    for tries in submitted:
        for attempt, job in enumerate(tries, start=1):
            if job["local"]:
                continue
            assert job["rule"] in estimator.rules
            need = estimator.need(job["rule"], job["wildcards"])
            gpus = int(need.gpu)
            asked = job["resources"]
            assert asked.get("gpu", 0) == gpus, job
            assert asked["mem_mb"] == memory_request(need, gpus, attempt), job
            assert asked["runtime"] == runtime_request(need, gpus, job["threads"], attempt), job


def test_the_lines_say_gpu_memory_time_and_threads(submitted: list[list[Described]]) -> None:
    seen: dict[tuple[str, bool], str] = {}
    for job, _ in submitted:
        if job["local"]:
            continue
        line, asked = job["line"], job["resources"]
        assert f" --mem {asked['mem_mb']} " in line
        assert f" -t {asked['runtime']} " in line
        assert f" --cpus-per-task={job['threads']} " in line
        assert " --requeue " in line
        gpu = asked.get("gpu", 0)
        assert (" --gpus=1" in line) == (gpu == 1), line
        assert (" --nodes=1" in line) == (gpu == 1), line
        assert (" --ntasks=1" in line) == (gpu == 0), line
        assert job["partition"] == ("gpu" if gpu else "cpu"), line
        seen[job["rule"], bool(gpu)] = line
    assert {rule for rule, gpu in seen if not gpu} == ON_PROCESSORS
    assert ("compress_model", True) in seen  # SVD decomposes
    assert ("select_validation", True) in seen  # others are scored


def test_a_further_try_gets_more(submitted: list[list[Described]]) -> None:
    for first, second in submitted:
        if not first["local"]:
            assert second["resources"]["mem_mb"] > first["resources"]["mem_mb"]
            assert second["resources"]["runtime"] > first["resources"]["runtime"]


def small_study(folder: Path) -> Path:
    """A smaller study's config: the quickstart, with batches that eight processes can share."""
    written = QUICKSTART.read_text(encoding="utf-8")
    assert written.count("    batch_size: 4\n") == 1
    path = folder / "small.yaml"
    path.write_text(written.replace("    batch_size: 4\n", "    batch_size: 32\n"), encoding="utf-8")
    return path


def plan_small(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Of a smaller study, by our profile and further arguments."""
    return plan(folder, "all", "--profile", "slurm", *arguments, "--configfile", str(small_study(folder)))


def test_a_site_decides_number_and_type_of_gpus(tmp_path: Path) -> None:
    """By a profile of its own beside ours: four GPUs of one type for post-training, and all accumulators at once."""
    profile = {
        "default-resources": {"gpus_per_job": 1, "gpu_type": "a100", "slurm_account": "'account'"},
        "set-resources": {"post_train": {"gpu": 4}, "collect_statistics": {"layers_per_pass": 30}},
    }
    (tmp_path / "site").mkdir()
    (tmp_path / "site/profile.yaml").write_text(yaml.safe_dump(profile))
    jobs = [job for job, _ in jobs_of(plan_small(tmp_path, "--profile", str(tmp_path / "site"))) if not job["local"]]
    estimator = Estimator(load_study(small_study(tmp_path)), collect_statistics=30)
    for job in jobs:
        gpus = {"post_train": 4}.get(job["rule"], 1) if estimator.need(job["rule"], job["wildcards"]).gpu else 0
        assert (f" --gpus=a100:{gpus}" in job["line"]) == (" --nodes=1" in job["line"]) == bool(gpus), job
        assert gpus or "a100" not in job["line"], job
        # Each process of post-training loads the model on its way to its GPU.
        assert job["resources"]["mem_mb"] == memory_request(estimator.need(job["rule"], job["wildcards"]), gpus), job
    assert {job["resources"]["layers_per_pass"] for job in jobs if job["rule"] == "collect_statistics"} == {30}
    assert any(job["rule"] == "post_train" for job in jobs)


def test_memory_is_that_of_a_nodes_processes_and_time_that_of_all(tmp_path: Path) -> None:
    """`processes` are those of each node: one that has its model on four GPUs is no faster than on one."""
    asked = {  # rule -> GPUs of each node, its processes, nodes
        "evaluate_perplexity": (4, 1, 1),
        "evaluate_zero_shot": (4, 4, 1),
        "compute_bases": (2, 1, 1),  # which shares nothing
        "post_train": (4, 4, 2),
        "collect_statistics": (0, 3, 2),
    }
    several = {"nodes": 2, "mpi": "srun", "tasks_per_node": 4}
    profile = {
        "default-resources": {"gpus_per_job": 1},
        "set-resources": {
            "evaluate_perplexity": {"gpu": 4, "processes": 1},
            "evaluate_zero_shot": {"gpu": 4},
            "compute_bases": {"gpu": 2},
            "post_train": {"gpu": 8, **several},
            "collect_statistics": {"gpu": 0, "processes": 3, **several},
        },
    }
    (tmp_path / "site").mkdir()
    (tmp_path / "site/profile.yaml").write_text(yaml.safe_dump(profile))
    jobs = [job for job, _ in jobs_of(plan(tmp_path, "all", "--profile", "slurm", "--profile", str(tmp_path / "site")))]
    estimator = Estimator(load_study(PAPER))
    for job in jobs:
        if job["rule"] in asked:
            gpus, processes, nodes = asked[job["rule"]]
            need = estimator.need(job["rule"], job["wildcards"])
            memory = memory_request(need, gpus, processes=processes)
            runtime = runtime_request(need, gpus and processes * nodes, job["threads"])
            assert (job["resources"]["mem_mb"], job["resources"]["runtime"]) == (memory, runtime), job
    assert asked.keys() <= {job["rule"] for job in jobs}


def test_a_cluster_without_gpus_is_asked_for_memory_instead(tmp_path: Path) -> None:
    jobs = [
        job for job, _ in jobs_of(plan_small(tmp_path, "--default-resources", "gpus_per_job=0")) if not job["local"]
    ]
    estimator = Estimator(load_study(small_study(tmp_path)))
    for job in jobs:
        assert "--gpus" not in job["line"]
        assert job["resources"]["mem_mb"] == memory_request(estimator.need(job["rule"], job["wildcards"]), 0), job


def test_a_command_line_that_loses_the_gpus_is_refused(tmp_path: Path) -> None:
    """`--default-resources` on the command line replaces all of the profile's; a week on a processor is worse."""
    run = plan_small(tmp_path, "--default-resources", "slurm_account=mine")
    assert run.returncode != 0
    assert "the profile does not say whether jobs get GPUs" in run.stdout + run.stderr


def dry_run(folder: Path, *arguments: str) -> str:
    """What a plain dry run prints."""
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", *arguments, "--directory", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=without_slurm(folder),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def planned(shown: str) -> dict[str, int]:
    """Rule -> jobs."""
    listed = shown.partition("Job stats:")[2].partition("total")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", listed, re.MULTILINE)}


def counted(config: str) -> dict[str, int]:
    """Rule -> jobs of our own plan."""
    counts: dict[str, int] = {"all": 1}
    for job in planned_jobs(load_study(REPOSITORY / f"config/{config}.yaml")):
        counts[job.rule] = counts.get(job.rule, 0) + 1
    return counts


def test_a_config_on_the_command_line_wins_over_the_profiles(tmp_path: Path) -> None:
    shown = dry_run(tmp_path, "all", "--profile", "slurm", "--configfile", "config/quickstart.yaml")
    assert planned(shown) == counted("quickstart")


def test_a_laptop_plans_the_same_jobs_and_nothing_binds_them(tmp_path: Path) -> None:
    arguments = ("all", "--profile", "profiles/local", "--configfile", "config/mini-paper.yaml")
    run = plan(tmp_path, *arguments, partitions="none")
    assert planned(run.stdout + run.stderr) == counted("mini-paper")
    assert "Provided resources" not in run.stdout + run.stderr  # no limit on memory or GPUs that a job could wait for
    estimator = Estimator(load_study(REPOSITORY / "config/mini-paper.yaml"))
    for job, _ in jobs_of(run):
        assert not {"gpu", "gpu_model", "nodes"} & job["resources"].keys(), job
        if job["resources"].keys() & {"uses_gpu"}:  # a job that may take a GPU of its own, if there are any
            need = estimator.need(job["rule"], job["wildcards"])
            told = {"uses_gpu": need.gpu, "spreads_model": need.spreads, "shares_work": need.shared}
            assert told.items() <= job["resources"].items(), job


@pytest.mark.parametrize("config", ["paper", "quickstart"])
def test_data_fetches_everything_and_nothing_else(tmp_path: Path, config: str) -> None:
    found = planned(dry_run(tmp_path, "data", "--configfile", f"config/{config}.yaml"))
    wanted = {rule: count for rule, count in counted(config).items() if rule.startswith("fetch_")}
    assert found == wanted | {"data": 1}

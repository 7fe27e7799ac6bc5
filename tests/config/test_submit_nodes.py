"""What is submitted when jobs get several GPUs, and post-training several nodes, by the profile of docs/cluster.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lowrank.cluster.dealing import Dealing
from lowrank.cluster.needs import GIB, memory_request
from lowrank.cluster.resources import Estimator
from lowrank.config.load import load_study
from tests.config.test_submit import jobs_of, plan, plan_small, small_study
from tests.config.wrong import REPOSITORY

pytestmark = pytest.mark.slow

SHARED = {"collect_statistics", "collect_gradients", "post_train", "evaluate_perplexity", "evaluate_zero_shot"}


def written_profile() -> dict[str, dict[str, object]]:
    """The last profile of the page that mentions nodes."""
    page = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
    (found,) = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "nodes: 2" in text]
    profile: dict[str, dict[str, object]] = yaml.safe_load(found)
    return profile


def test_processes_on_processors_ask_for_the_memory_of_all(tmp_path: Path) -> None:
    alone, several = "evaluate_cost", "collect_statistics"
    arguments = ["--default-resources", "gpus_per_job=0", "--set-resources"]
    arguments += [f"{rule}:processes=2" for rule in (alone, several)]
    estimator = Estimator(load_study(small_study(tmp_path)))
    planned = [j for j, _ in jobs_of(plan_small(tmp_path, *arguments))]
    for job in planned:
        if job["rule"] in (alone, several):
            need = estimator.need(job["rule"], job["wildcards"])
            processes = 2 if job["rule"] == several else 1
            assert job["resources"]["mem_mb"] == memory_request(need, 0, processes=processes)
            assert memory_request(need, 0, processes=2) > memory_request(need, 0)
    assert {alone, several} <= {job["rule"] for job in planned}


LARGE = ("all", "--profile", "slurm", "--configfile", "config/large.yaml", "--default-resources")
NODES = ("gpus_per_job=auto", "gpu_memory=80", "gpus_per_node=8")


def test_by_auto_every_job_of_a_large_model_gets_the_gpus_that_hold_it(tmp_path: Path) -> None:
    """Through Snakemake and the plugin what the plan says (`test_plan` holds the page to that)."""
    study, dealing = load_study(REPOSITORY / "config/large.yaml"), Dealing(None, 80 * GIB, 8)
    estimator, seen = Estimator(study, dealing.memory), dict[str, int]()
    for job, _ in jobs_of(plan(tmp_path, *LARGE, *NODES)):
        if job["local"]:
            continue
        given = dealing.given(job["rule"], estimator.need(job["rule"], job["wildcards"])).gpus
        assert job["resources"].get("gpu", 0) == given, job
        assert (f" --gpus={given}" in job["line"]) == bool(given), job
        seen[job["rule"]] = max(given, seen.get(job["rule"], 0))
    assert (seen["post_train"], seen["evaluate_perplexity"], seen["compute_bases"]) == (8, 2, 1)
    assert seen["sample_calibration"] == 0


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        (("gpus_per_job=auto", "gpu_memory=24", "gpus_per_node=4"), r"\w+ needs \d+ GiB on a GPU \(.*\(`gpu_memory`\)"),
        (
            (*NODES, "max_mem_mb=150000"),
            r"\w+ needs \d+ GiB of main memory \(.*\(`max_mem_mb`\)\. Take nodes with more",
        ),
    ],
)
def test_what_fits_nowhere_is_refused_before_anything_is_submitted(
    nodes: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    refused = plan(tmp_path, *LARGE, *nodes)
    assert refused.returncode == 1
    assert "JOBS" not in refused.stdout
    assert re.search(says, refused.stderr + refused.stdout)
    assert "Traceback" not in refused.stderr


def test_several_gpus_go_to_those_who_share_and_nodes_to_post_training(tmp_path: Path) -> None:
    profile = written_profile() | {"default-resources": {"gpus_per_job": 4, "launcher": "deepspeed"}}
    (tmp_path / "site").mkdir()
    (tmp_path / "site/profile.yaml").write_text(yaml.safe_dump(profile))
    arguments = ("--profile", str(tmp_path / "site"))
    estimator = Estimator(load_study(small_study(tmp_path)))
    seen = set()
    for job, _ in jobs_of(plan_small(tmp_path, *arguments)):
        need = estimator.need(job["rule"], job.get("wildcards", {}))
        if job["local"] or not need.gpu:
            continue
        seen.add(job["rule"])
        asked, line = job["resources"], job["line"]
        assert asked["launcher"] == "deepspeed"
        expected = 8 if job["rule"] == "post_train" else 4 if job["rule"] in SHARED else 1
        assert f" --gpus={expected}" in line, line
        assert f" --nodes={2 if job['rule'] == 'post_train' else 1} " in line, line
        # Memory is that of one node, where each process loads the model.
        assert asked["mem_mb"] == memory_request(need, min(expected, 4)), job
        if job["rule"] == "post_train":
            assert " --ntasks-per-node=4 " in line
            assert " --gpus-per-node=4 " in line
            assert asked["mpi"] == "srun"
    assert {"post_train", "collect_statistics", "compute_bases", "evaluate_perplexity"} <= seen

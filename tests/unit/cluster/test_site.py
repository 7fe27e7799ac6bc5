"""Values of a profile that cannot be meant are refused before anything is submitted."""

from __future__ import annotations

import pytest

from lowrank.cluster.dealing import Dealing
from lowrank.cluster.needs import GIB, Need
from lowrank.cluster.site import Site, check_rules, site_of, whole_number
from lowrank.errors import RankwiseError


def test_what_a_profile_may_say() -> None:
    defaults = {
        "gpus_per_job": "4",
        "gpu_type": "a100_80.sxm",
        "launcher": "deepspeed",
        "device": "cpu",
        "other": "?",
    }
    limits = {"max_mem_mb": "180000", "max_runtime": "1440"}
    assert site_of(defaults | limits, "8") == Site(4, "a100_80.sxm", 180000, 1440, 8)
    assert site_of({"jobs_per_gpu": "2"}, None) == Site(jobs_per_gpu=2)
    assert site_of({}, None) == Site()


def test_what_no_node_holds_is_refused() -> None:
    need = Need(gpu=True, device={"weights": 30 * GIB}, host={"program": 0, "bases": 20 * GIB}, loading=30 * GIB)
    held = need.host_bytes(1)
    for site in (Site(), Site(max_mem_mb=int(held / 1e6) + 1)):
        site.check_memory("compress_model", need, 1, 1)
    with pytest.raises(RankwiseError) as refused:
        Site(max_mem_mb=int(held / 1e6)).check_memory("compress_model", need, 1, 1)
    assert str(refused.value).startswith(
        "compress_model needs 33 GiB of main memory (weights on their way to a GPU: 30 "
    )
    assert str(refused.value).endswith("and a node has 33 (`max_mem_mb`). Take nodes with more memory.")
    with pytest.raises(RankwiseError, match=r"in 2 processes \(weights: 30 GiB.*fewer GPUs or processes a node"):
        Site(max_mem_mb=90_000).check_memory("collect_statistics", need, 0, 2)


def test_every_wrong_value_is_named() -> None:
    defaults = {"gpus_per_job": "two", "gpu_type": "a100-sxm4", "launcher": "deepsped", "device": "gpu"}
    defaults["jobs_per_gpu"] = "0"
    with pytest.raises(RankwiseError) as refused:
        site_of(defaults | {"max_runtime": "1d"}, "many")
    assert str(refused.value).splitlines()[1:] == [
        "default-resources.gpus_per_job: 'two' is no whole number",
        "default-resources.max_runtime: '1d' is no whole number",
        "default-resources.jobs_per_gpu: 0; a GPU serves at least one job",
        "default-resources.launcher: 'deepsped'; it is torchrun or deepspeed, or left out",
        "default-resources.device: 'gpu'; it is cpu, or left out",
        "default-resources.gpu_type: 'a100-sxm4'; SLURM's plugin takes letters, digits, dots and underscores",
        "resources.gpu: 'many' is no whole number",
    ]


def test_as_many_gpus_as_hold_a_model_need_to_know_how_large_they_are() -> None:
    site = site_of({"gpus_per_job": "auto", "gpu_memory": "80", "gpus_per_node": "8"}, "16")
    assert site.dealing == Dealing(None, 80 * GIB, 8)
    assert site_of({"gpus_per_job": "2"}, None).dealing == Dealing(2, None, 1)
    assert site_of({}, None).dealing.each == 0
    with pytest.raises(RankwiseError) as refused:
        site_of({"gpus_per_job": "auto", "gpus_per_node": "0"}, None)
    assert str(refused.value).splitlines()[1:] == [
        "default-resources.gpu_memory: missing; `gpus_per_job: auto` needs it: GiB of one GPU",
        "default-resources.gpus_per_node: 0; it is what one job can have at most",
    ]


def test_rules_that_there_are_not() -> None:
    check_rules({"post_train": {}}, ["post_train", "all"])
    with pytest.raises(RankwiseError, match=r"set-resources\.post_trian: there is no such rule .*'post_train'\?"):
        check_rules({"post_trian": {}}, ["post_train", "all"])


def test_several_nodes_are_for_rules_whose_processes_meet_on_them() -> None:
    rules = ["post_train", "evaluate_perplexity", "evaluate_zero_shot"]
    check_rules({"post_train": {"nodes": "2"}, "evaluate_perplexity": {"nodes": "1", "gpu": "4"}}, rules)
    with pytest.raises(RankwiseError) as refused:
        check_rules({"post_train": {"nodes": "2"}, "evaluate_zero_shot": {"gpu": "8", "nodes": "2"}}, rules)
    assert str(refused.value).splitlines()[1:] == [
        "set-resources.evaluate_zero_shot.nodes: '2'; jobs of this rule run on one node, so leave it out. On several: "
        "collect_statistics, collect_gradients, post_train (docs/cluster.md)"
    ]


def test_numbers_of_rules() -> None:
    assert whole_number("post_train", "gpu", "4") == 4
    with pytest.raises(RankwiseError, match=r"set-resources\.post_train\.gpu: 'x4' is no whole number"):
        whole_number("post_train", "gpu", "x4")
    assert whole_number("post_train", "gpu", "0") == 0
    with pytest.raises(
        RankwiseError, match=r"collect_statistics\.layers_per_pass: '0' is no whole number of at least 1"
    ):
        whole_number("collect_statistics", "layers_per_pass", "0")


def test_a_job_may_not_want_more_gpus_than_all_may_hold() -> None:
    assert Site(in_flight=4).check_gpus("post_train", 4) == 4
    assert Site().check_gpus("post_train", 64) == 64
    with pytest.raises(RankwiseError, match="post_train asks for 8 GPUs, and all jobs together may hold 4"):
        Site(in_flight=4).check_gpus("post_train", 8)

"""What rules ask for because of the sizes of models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.cluster.checkpoint_needs import TASK_TOKENS
from lowrank.cluster.needs import CUDA_HOST, GIB, Need, Work, memory_request, runtime_request
from lowrank.cluster.resources import Estimator
from lowrank.cluster.sizes import Sizes
from lowrank.config.sources import ModelShape
from lowrank.config.suites import METRICS
from lowrank.reruns.fingerprint import Code
from tests.unit.cluster.published_shapes import LLAMA_7B, LLAMA_13B, LLAMA_70B, MISTRAL_7B
from tests.unit.cluster.resource_samples import BOLACO, CALIBRATION, JOBS, ROOT, half, study_of


@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_13B, MISTRAL_7B])
def test_the_papers_models_fit_one_gpu_of_80_gb(shape: dict[str, Any]) -> None:
    estimator = Estimator(study_of(shape))
    for rule, wildcards in (JOBS | {"collect_gradients": CALIBRATION}).items():
        need = estimator.need(rule, wildcards)
        assert need.gpu
        assert need.gpu_bytes < 72 * GIB, rule


def test_statistics_and_bases_of_70b_fit_such_a_gpu_by_configuration() -> None:
    """Four blocks a pass; and no other step does."""
    estimator = Estimator(study_of(LLAMA_70B), collect_statistics=4, collect_gradients=1)
    jobs = JOBS | {"collect_gradients": CALIBRATION}
    fit = {rule for rule, wildcards in jobs.items() if estimator.need(rule, wildcards).gpu_bytes < 72 * GIB}
    assert fit == {"collect_statistics", "compute_bases", "eliminate_neurons"}


SMOLLM2 = LLAMA_7B | {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}


@pytest.mark.parametrize(("shape", "statistics", "gradients"), [(SMOLLM2, 30, 30), (LLAMA_7B, 8, 4), (LLAMA_70B, 8, 4)])
def test_small_models_need_one_pass(shape: dict[str, Any], statistics: int, gradients: int) -> None:
    estimator = Estimator(study_of(shape))
    assert estimator.layers_per_pass("collect_statistics", "one") == statistics
    assert estimator.layers_per_pass("collect_gradients", "one") == gradients
    assert Estimator(study_of(shape), collect_gradients=2).layers_per_pass("collect_gradients", "one") == 2
    assert Estimator(study_of(shape), collect_gradients=99).layers_per_pass("collect_gradients", "one") <= 80


def test_a_pass_takes_a_quarter_of_a_gpu_of_known_size() -> None:
    study = study_of(LLAMA_70B)
    block = 8 * (3 * 8192**2 + 28672**2)
    for memory in (16 * GIB, 80 * GIB, 1000 * GIB):
        layers = Estimator(study, memory).layers_per_pass("collect_statistics", "one")
        assert layers == min(8, max(1, int(memory / 4 // block)))
    assert Estimator(study, 80 * GIB, collect_statistics=4).layers_per_pass("collect_statistics", "one") == 4


def test_fewer_layers_a_pass_take_less_memory_and_nothing_else() -> None:
    study = study_of(LLAMA_70B)
    few, many = (
        Estimator(study, collect_statistics=layers).need("collect_statistics", CALIBRATION) for layers in (1, 16)
    )
    means = 1024 * (3 * 8192 + 28672)  # of the windows, besides the squares
    block = 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192  # weights, in 16 bits
    expected = 15 * (8 * (3 * 8192**2 + 28672**2 + means) + 2 * block)
    assert many.device_bytes - few.device_bytes == pytest.approx(expected, rel=1e-12)
    assert (few.disk, few.scratch) == (many.disk, many.scratch)
    assert few.work.half == many.work.half


def test_the_parts_of_the_largest_jobs_of_7b() -> None:
    """By hand: 6.74e9 weights of 2 bytes, bases of as many numbers as the linear layers have, 409,600 x 4096 states."""
    need = Estimator(study_of(LLAMA_7B)).need("search_allocation", BOLACO)
    assert need.device["weights"] == pytest.approx(13.48e9, rel=1e-3)
    assert need.device["bases"] == pytest.approx(12.95e9, rel=1e-3)
    assert need.host["dense hidden states"] == 409_600 * 4096 * 2
    statistics_need = Estimator(study_of(LLAMA_7B)).need("collect_statistics", CALIBRATION)
    means = 1024 * (3 * 4096 + 11008)
    assert statistics_need.device["accumulators"] == 8 * (3 * 4096**2 + 11008**2 + means) * 8
    assert statistics_need.scratch == 2 * 1024 * 4096 * 4096 * 2
    assert statistics_need.disk == pytest.approx(32 * (4 * (3 * half(4096) + half(11008)) + 8 * means), rel=1e-3)


def test_a_distillation_holds_two_models_and_three_streams_of_hidden_states() -> None:
    """By hand, of 7B: 6.476e9 weights in the linear layers, 1024 windows of 4096 tokens."""
    need = Estimator(study_of(LLAMA_7B)).need("distil_features", JOBS["distil_features"])
    linears, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert need.device["weights"] == pytest.approx(2 * (1.8 * linears + 2 * others))
    assert need.device["a block's factors"] == pytest.approx(20 * 0.8 * linears / 32), "5 numbers of 4 bytes a weight"
    assert need.host["hidden states"] == 3 * 1024 * 4096 * 4096 * 2
    assert need.scratch == pytest.approx(2 * 0.8 * linears)
    # Both inputs: 1016 windows forward and back, and 8 windows at the start, after 20 times 50 steps, and at the end
    attention = 2 * 4096 * 4096 * 32
    read = 2 * (3 * 1016 + 8 * (1016 / 50 + 2)) * 4096
    assert need.work.single == pytest.approx(read * (2 * 0.8 * linears + attention))
    assert need.work.half == pytest.approx(1024 * 4096 * (2 * 1.8 * linears + 2 * attention))


def test_only_jobs_that_share_their_work_get_several_gpus() -> None:
    estimator = Estimator(study_of(LLAMA_7B))
    shared = {rule for rule, wildcards in JOBS.items() if estimator.need(rule, wildcards).gpus(4) == 4}
    assert shared == {"collect_statistics", "post_train", "evaluate_perplexity", "evaluate_zero_shot"}
    assert estimator.need("collect_gradients", CALIBRATION).gpus(4) == 4
    assert all(estimator.need(rule, wildcards).gpus(4) == 1 for rule, wildcards in JOBS.items() if rule not in shared)
    assert all(estimator.need(rule, wildcards).gpus(0) == 0 for rule, wildcards in JOBS.items())
    assert estimator.need("sample_calibration", CALIBRATION).gpus(4) == 0


def test_who_keeps_every_window_needs_no_model() -> None:
    every = {"corpora": ["text"], "windows": 768, "length": 4096, "select": {"strategy": "all"}}
    study = study_of(LLAMA_7B)
    kept = study_of(LLAMA_7B, validation={"top": every})
    wildcards = JOBS["select_validation"]
    scored, sampled = (Estimator(one).need("select_validation", wildcards) for one in (study, kept))
    assert scored.gpu
    assert not sampled.gpu
    assert sampled.host_bytes(0) < 2 * GIB < scored.host_bytes(0)
    assert (sampled.work.half, sampled.work.single, sampled.work.double) == (0, 0, 0)


def test_memory_moves_to_the_host_without_a_gpu() -> None:
    need = Need(gpu=True, device={"weights": 10 * GIB}, host={"program": GIB, "texts": 2 * GIB}, loading=10 * GIB)
    assert need.host_bytes(0) == 13 * GIB
    assert need.host_bytes(0, 1) == 13 * GIB
    assert need.host_bytes(0, 2) == 27 * GIB  # each process loads the model, and the stage's own waits for them
    assert need.host_bytes(1) == (1 + 3 + 10) * GIB  # the weights pass through, the texts come afterwards
    assert need.host_bytes(4) == (1 + 12 + 40) * GIB
    assert need.largest(0) == need.largest(1) == ("weights", 10 * GIB)
    offloaded = replace(need, loading=0, together={"offloaded": 20 * GIB})
    assert offloaded.host_bytes(0) == 33 * GIB
    assert offloaded.host_bytes(0, 2) == (27 + 20) * GIB
    assert offloaded.host_bytes(2) - replace(need, loading=0).host_bytes(2) == 20 * GIB
    assert offloaded.largest(0) == ("offloaded", 20 * GIB)
    assert offloaded.largest(1) == ("weights", 10 * GIB)


def test_each_process_of_an_evaluation_builds_the_requests_of_its_harness() -> None:
    need = Estimator(study_of(LLAMA_7B)).need("evaluate_zero_shot", JOBS["evaluate_zero_shot"])
    assert need.host["requests"] == 2 * GIB
    loaded = replace(need, loading=0)
    assert loaded.host_bytes(4) - loaded.host_bytes(1) > 3 * (CUDA_HOST + 2 * GIB)
    assert loaded.host_bytes(4, 1) == pytest.approx(loaded.host_bytes(1) + 3 * CUDA_HOST)
    training = replace(Estimator(study_of(LLAMA_7B)).need("post_train", JOBS["post_train"]), loading=0)
    assert training.host_bytes(4) == training.host_bytes(1) + 3 * CUDA_HOST  # the weights are merged once


@pytest.mark.parametrize("limit", [None, 500])
def test_zero_shot_tasks_take_the_tokens_of_each(limit: int | None) -> None:
    def tokens(*tasks: str) -> float:
        rows = {name: {"source": {"path": f"{name}.jsonl"}, "reader": "jsonl"} for name in tasks}
        suite = {"kind": "zero-shot", "tasks": dict.fromkeys(tasks, "acc"), "limit": limit}
        methods = {"dense": {"kind": "dense"}}
        study = study_of(LLAMA_7B, tasks=rows, suites={"zero-shot": suite}, methods=methods, smoke=True)
        job = JOBS["evaluate_zero_shot"] | {"method": "dense", "ratio": "0"}
        work = Estimator(study).need("evaluate_zero_shot", job).work.half
        return work / Sizes(ModelShape(**LLAMA_7B), "float16").forward(1, 2048)

    small, large = tokens("openbookqa"), tokens("hellaswag")
    assert tokens("openbookqa", "hellaswag") == pytest.approx(small + large)
    if limit:
        assert small == large == pytest.approx(500 * 100)
    else:  # what logs of the stage tell of these, and padding
        assert 10_300 < small < 3 * 10_300
        assert 1_646_261 < large < 1.2 * 1_646_261


def test_the_tokens_of_every_task_are_known() -> None:
    assert TASK_TOKENS.keys() == METRICS.keys()


sizes = st.floats(0, 1e12)


@given(device=sizes, host=sizes, work=st.floats(0, 1e20), gpus=st.integers(0, 8), attempt=st.integers(1, 5))
def test_requests_hold_the_estimate_and_grow_with_each_try(
    device: float, host: float, work: float, gpus: int, attempt: int
) -> None:
    need = Need(gpu=True, device={"w": device}, host={"program": 0, "h": host}, work=Work(half=work))
    memory, runtime = memory_request(need, gpus, attempt), runtime_request(need, gpus, 8, attempt)
    assert memory * 1e6 > need.host_bytes(gpus)
    assert runtime * 60 > need.seconds(gpus, 8)
    assert memory_request(need, gpus, attempt + 1) > memory
    assert runtime_request(need, gpus, 8, attempt + 1) > runtime
    assert memory % 500 == runtime % 10 == 0


def test_requests_by_hand() -> None:
    """40 GiB, a quarter and 1 GiB are 54.76 GB, half as much again 82.14 GB; thrice ten hours and half an hour."""
    need = Need(host={"program": 0, "h": 40 * GIB}, work=Work(seconds=36_000))
    assert [memory_request(need, 0, attempt) for attempt in (1, 2)] == [55_000, 82_500]
    assert [runtime_request(need, 0, 8, attempt) for attempt in (1, 2)] == [1830, 3660]


def test_further_tries_stay_within_what_the_site_has() -> None:
    need = Need(gpu=True, device={}, host={"program": 0, "h": 40 * GIB}, work=Work(half=1e20))
    first, third = memory_request(need, 1), memory_request(need, 1, 3)
    assert memory_request(need, 1, 3, third - 500) == third - 500
    assert memory_request(need, 1, 3, third + 500) == third
    assert memory_request(need, 1, 1, first - 500) == first - 500
    assert runtime_request(need, 1, 8, 3, 60) == 60
    assert runtime_request(need, 1, 8, 3, 10**9) == runtime_request(need, 1, 8, 3)


def test_eliminating_neurons_takes_a_gpu_once_and_little_disk() -> None:
    """With pairs: five further bases of each matrix of an MLP, but no elimination, which is there."""
    estimator = Estimator(study_of(LLAMA_7B))
    plain, pairs, few = (
        estimator.need("eliminate_neurons", CALIBRATION | {"multiple": multiple}) for multiple in ("any", "8", "4096")
    )
    assert plain.gpu
    assert plain.gpus(4) == 1
    assert 7 * 8 * 11008**2 < plain.device["elimination"] < 11 * 8 * 11008**2
    assert plain.work.double == 4 * 32 * 11008**3
    assert plain.disk == 32 * 16 * 11008
    mlps = Sizes(ModelShape(**LLAMA_7B), "float16").narrow_decompositions(11008)
    assert 0 < mlps < Sizes(ModelShape(**LLAMA_7B), "float16").decompositions()
    refits = 5 * 32 * 11008**3
    assert 2 * mlps < pairs.work.double - refits < 5 * mlps
    tried = [8 * (11008 * part // 8 // 8) for part in range(3, 8)]
    assert pairs.disk == plain.disk + 32 * 8 * 3 * sum(tried) < 0.01 * 2 * 6.7e9
    assert few.work.double < pairs.work.double
    assert pairs.host_bytes(1) < 24 * GIB


def test_gradients_cost_larger_bases() -> None:
    covariance = {"pooled": {"estimator": "naive"}, "fisher": {"estimator": "naive", "gradients": "weigh"}}
    estimator = Estimator(study_of(LLAMA_7B, covariance=covariance))
    plain, weighted = (
        estimator.need("compute_bases", CALIBRATION | {"covariance": name}) for name in ("pooled", "fisher")
    )
    assert weighted.disk > 1.3 * plain.disk
    gradients = estimator.need("collect_gradients", CALIBRATION)
    assert gradients.disk == 32 * 4 * (5 * half(4096) + 2 * half(11008))


def test_no_stage_knows_of_estimates() -> None:
    """So a changed estimate, or another number of GPUs, runs nothing again."""
    scripts = ROOT / "workflow_scripts"
    code, package = Code(scripts), Estimator.__module__.rpartition(".")[0]
    methods = [f"lowrank.methods.{path.stem}" for path in (scripts / "lowrank/methods").glob("[!_]*.py")]
    stages = [path.stem for path in (scripts / "stages").glob("*.py")]
    assert methods
    assert stages
    for stage in stages:
        reached = {module for module, _ in code._reached(stage, methods if stage == "compress_model" else (), {})}
        assert "lowrank.files" in reached  # what a stage does know of is found
        assert not {module for module in reached if module.startswith(package)}, stage

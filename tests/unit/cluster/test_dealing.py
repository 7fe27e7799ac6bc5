"""How many GPUs jobs get, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.cluster.checkpoint_needs import tuning_need
from lowrank.cluster.dealing import Dealing, Given
from lowrank.cluster.needs import CUDA_DEVICE, GIB, PROGRAM, Need
from lowrank.cluster.resources import Estimator
from lowrank.cluster.sizes import Sizes
from lowrank.config.sources import ModelShape
from lowrank.config.tuning import ScaledSubspaceTuning
from lowrank.config.zero import Zero
from lowrank.errors import RankwiseError
from tests.unit.cluster.published_shapes import LLAMA_7B, LLAMA_70B, MISTRAL_7B, MIXTRAL_8X7B
from tests.unit.cluster.resource_samples import BOLACO, CALIBRATION, JOBS, study_of

AUTO = Dealing(None, 80 * GIB, 8)
MODEL = Need(
    gpu=True,
    device={"weights": 130 * GIB, "activations": 2 * GIB},
    blocks=80,
    split={"weights": 120 * GIB},
    host={"program": PROGRAM},
    loading=130 * GIB,
)
SHARED = replace(MODEL, shared=True)


def test_one_model_on_several_gpus_takes_its_part_and_what_each_computes() -> None:
    held = MODEL.gpu_bytes_of(4)
    blocks = 120 / 80
    # 130 GiB on four: 15 blocks beside the embeddings, 22 on others; and the activations
    assert held == pytest.approx(22 * blocks * GIB + 2 * GIB + CUDA_DEVICE)
    assert MODEL.gpu_bytes_of(1) == 132 * GIB + CUDA_DEVICE
    assert replace(MODEL, alone=50 * GIB).gpu_bytes_of(4) == 50 * GIB + CUDA_DEVICE
    assert replace(MODEL, alone=200 * GIB).gpu_bytes == 200 * GIB + CUDA_DEVICE
    assert replace(MODEL, evenly=True).gpu_bytes_of(4) == (12 + 120 / 4) * GIB + CUDA_DEVICE


@given(gpus=st.integers(1, 20))
def test_more_gpus_never_take_more_of_one(gpus: int) -> None:
    assert MODEL.gpu_bytes_of(gpus + 1) <= MODEL.gpu_bytes_of(gpus)
    assert MODEL.gpu_bytes_of(gpus) * gpus >= MODEL.device_bytes  # all of it lies somewhere


def test_gpus_that_cannot_share_the_micro_batches_are_refused() -> None:
    training = Need(gpu=True, shared=True, divides=8)
    assert Dealing(4).given("post_train", training) == Given(4)
    for dealing in (Dealing(3), Dealing(3, 80 * GIB)):
        with pytest.raises(RankwiseError, match=r"post_train: 3 GPUs for 8 micro-batches a step .*: 1, 2, 4, 8$"):
            dealing.given("post_train", training)


def test_auto_gives_what_holds_the_model_and_no_more() -> None:
    assert AUTO.given("x", MODEL) == AUTO.given("x", SHARED) == Given(2, 2)
    assert AUTO.given("x", replace(MODEL, device={"weights": 70 * GIB}, split={})) == Given(1)
    assert replace(AUTO, memory=32 * GIB).given("x", MODEL) == Given(5, 5)
    assert AUTO.given("x", Need()) == Dealing(0, 80 * GIB).given("x", MODEL) == Given(0)
    assert Given(2, 2).processes == 1
    assert Given(4).processes == 4


def test_a_number_of_gpus_is_shared_if_each_holds_the_model_and_else_holds_one() -> None:
    four = Dealing(4, 80 * GIB)
    assert four.given("x", replace(SHARED, device={"weights": 9 * GIB}, split={"weights": 8 * GIB})) == Given(4)
    assert four.given("x", SHARED) == Given(2, 2)
    assert Dealing(4).given("x", SHARED) == Given(4)  # nobody said how large a GPU is
    assert Dealing(4).given("x", MODEL) == Given(1)
    # ZeRO divides the weights among processes, whose number divides the batch
    zero = replace(SHARED, evenly=True, divides=12, device={"weights": 300 * GIB}, split={"weights": 300 * GIB})
    assert four.given("x", zero) == Given(4)
    assert AUTO.given("x", zero) == Given(4)
    assert AUTO.given("x", replace(zero, divides=18)) == Given(6)  # neither 4 nor 5 divides 18


def test_what_the_profile_gives_a_rule_counts() -> None:
    assert AUTO.on("x", MODEL, 3) == Given(3, 3)
    assert AUTO.on("x", SHARED, 3) == Given(3, 3)
    small = replace(SHARED, device={"weights": 9 * GIB}, split={"weights": 8 * GIB})
    assert AUTO.on("x", small, 3) == Given(3)
    assert AUTO.on("x", replace(small, shared=False), 3) == Given(3, 3)
    assert AUTO.on("x", replace(small, shared=False, split={}), 3) == Given(3)
    assert AUTO.on("x", MODEL, 0) == Given(0)
    with pytest.raises(RankwiseError, match="set the rule's `gpu: 2`"):
        AUTO.on("x", MODEL, 1)


@pytest.mark.parametrize(
    ("dealing", "need", "told"),
    [
        (
            Dealing(1, 80 * GIB),
            MODEL,
            r"x needs 132 GiB on a GPU \(weights: 130 GiB\).* 2 hold it: say `gpus_per_job: auto`",
        ),
        (
            Dealing(None, 20 * GIB, 4),
            MODEL,
            r"8 would hold it, and a node has 4 \(`gpus_per_node`\). Take larger nodes",
        ),
        (AUTO, replace(MODEL, alone=90 * GIB), "90 GiB are needed on one however many"),
        (AUTO, replace(MODEL, split={}, remedy="Do this."), r"\(`gpu_memory`\). Do this.$"),
        (AUTO, replace(MODEL, split={}), r"Take GPUs with more memory.$"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_to_change(dealing: Dealing, need: Need, told: str) -> None:
    with pytest.raises(RankwiseError, match=told):
        dealing.given("x", need)


def test_the_gpus_of_a_study_of_70b() -> None:
    estimator = Estimator(study_of(LLAMA_70B), AUTO.memory)
    jobs = JOBS | {"collect_gradients": CALIBRATION}
    jobs.pop("post_train")
    given = {rule: AUTO.given(rule, estimator.need(rule, wildcards)) for rule, wildcards in jobs.items()}
    block_by_block = {"collect_statistics", "compute_bases", "eliminate_neurons"}
    assert {rule for rule, dealt in given.items() if dealt == Given(1)} == block_by_block
    for rule, dealt in given.items():
        need = estimator.need(rule, jobs[rule])
        assert need.gpu_bytes_of(dealt.over) <= AUTO.memory < need.gpu_bytes_of(dealt.over - 1) or dealt.over == 1
    with pytest.raises(RankwiseError, match="`deepspeed: zero3` in its `tuning`"):
        AUTO.given("post_train", estimator.need("post_train", JOBS["post_train"]))
    tuning = {
        "scales": {"kind": "scaled-subspace", "instructions": "alpaca", "deepspeed": "zero3", "micro_batch_size": 2}
    }
    need = Estimator(study_of(LLAMA_70B, tuning=tuning), AUTO.memory).need("post_train", JOBS["post_train"])
    assert AUTO.given("post_train", need).gpus in (2, 4, 8)
    tuning["scales"]["deepspeed"] = "zero3-offload"
    need = Estimator(study_of(LLAMA_70B, tuning=tuning), AUTO.memory).need("post_train", JOBS["post_train"])
    assert AUTO.given("post_train", need) == Given(1)
    assert need.together["offloaded weights"] > 100 * GIB


def test_the_experts_of_a_block_are_gathered_as_one() -> None:
    tuning = ScaledSubspaceTuning(kind="scaled-subspace", instructions="alpaca", deepspeed="zero3")
    gathered = {}
    for shape in (MISTRAL_7B, MIXTRAL_8X7B):
        sizes = Sizes(ModelShape.model_validate(shape), "bfloat16")
        gathered[shape["family"]] = tuning_need(sizes, sizes, tuning, Zero(3, False, 10**9)).device["gathered layers"]
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    assert gathered == {"mistral": 2 * 10**9, "mixtral": 2 * (8 * 3 * 4096 * 14336 + attention)}


def test_a_small_model_gets_one_gpu_everywhere() -> None:
    estimator = Estimator(study_of(LLAMA_7B), AUTO.memory)
    for rule, wildcards in JOBS.items():
        assert AUTO.given(rule, estimator.need(rule, wildcards)) == Given(1), rule
    assert Dealing(4, 80 * GIB).given(
        "evaluate_perplexity", estimator.need("evaluate_perplexity", BOLACO | {"suite": "held-out"})
    ) == Given(4)


def test_methods_that_run_the_model_spread_it_and_others_cannot() -> None:
    from lowrank.methods import method_modules

    study = study_of(LLAMA_70B)
    split = {}
    for kind, more in (
        ("svd-llm", {"update": True}),
        ("fwsvd", {}),
        ("llrc", {"steps": 9}),
        ("slicegpt", {}),
        ("svd", {}),
    ):
        given = {} if kind == "svd" else {"calibration": "c4"}
        study.methods["one"] = method_modules()[kind].Settings(kind=kind, **given, **more)
        need = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
        split[kind] = set(need.split)
        if kind == "slicegpt":
            assert need.device["weights"] < 2 * GIB  # a block
    assert split == {
        "svd-llm": {"weights"},
        "fwsvd": {"weights", "sums", "activations"},
        "llrc": {"weights", "all directions", "activations"},
        "slicegpt": set(),
        "svd": set(),
    }

"""What every stage does around its work, in interpreters of their own, as Snakemake starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.errors import RankwiseError
from lowrank.jobs import imports, stage, usage
from lowrank.jobs.lock import output_lock
from lowrank.reruns.fingerprint import Code
from tests.marks import NO_GPU

SCRIPTS = Path(__file__).parents[3] / "workflow_scripts"
SPREAD, SHARED = {"spreads_model": 1}, {"shares_work": 1}
MODELS = "lowrank.model.checkpoint"
SCRIPT = """
{before}
from types import SimpleNamespace
from lowrank.jobs import stage
from lowrank.jobs.stage import run_stage

if not {models!r}:
    stage.load_models = lambda rule: None  # which would take seconds

def work(job):
    {work}

job = SimpleNamespace(rule={rule!r}, threads=2, log=[{log!r}], resources={resources!r}, output=[])
run_stage(job, work)
"""


def run(
    folder: Path,
    work: str,
    rule: str = "collect_statistics",
    resources: dict[str, Any] | None = None,
    before: str = "",
    models: bool = False,
    **variables: str,
) -> tuple[int, str]:
    """Exit code and log of a stage; nothing of this process's hub settings is handed on.

    Args:
        folder: for its files.
        work: the body of the stage's work.
        rule: whose stage it is.
        resources: of the job.
        before: code in front of it.
        models: whether the classes of models are loaded, where the rule needs them.
        variables: further ones of the environment.
    """
    log = folder / "stage.log"
    script = SCRIPT.format(before=before, work=work, rule=rule, log=str(log), resources=resources or {}, models=models)
    kept = {name: value for name, value in os.environ.items() if name not in stage.OFFLINE}
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=kept | {"PYTHONPATH": str(SCRIPTS), "HF_HOME": str(folder / "hub")} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, log.read_text()


def test_the_log_says_where_a_job_runs_and_what_it_took(tmp_path: Path) -> None:
    work = f"import gc, sys; assert {MODELS!r} in sys.modules and gc.isenabled() and gc.get_freeze_count()"
    code, log = run(tmp_path, work, resources={"gpu": 0}, models=True, SLURM_JOB_ID="17")
    assert code == 0, log
    assert f"collect_statistics: Python {sys.version.split()[0]} ({sys.executable}), host " in log
    assert "SLURM job 17, 2 threads\n" in log
    assert "collect_statistics: finished in " in log
    assert f"MiB, torch {torch.__version__}\n" in log


def test_models_are_loaded_for_the_stages_that_reach_them_and_no_others() -> None:
    code = Code(SCRIPTS)
    reached = {path.stem: code._reached(path.stem, [], {}) for path in (SCRIPTS / "stages").glob("*.py")}
    found = {stage for stage, nodes in reached.items() if any(module == MODELS for module, _ in nodes)}
    assert found == set(imports.NEED_MODELS)


def test_waiting_for_a_gpu_is_no_work(tmp_path: Path) -> None:
    waits = """import time
from contextlib import contextmanager
from lowrank.jobs import stage

@contextmanager
def slow(*_, **__):
    time.sleep(3)
    yield

stage.own_gpus = slow
"""
    (tmp_path / "waits.py").write_text(waits)
    path = f"{SCRIPTS}{os.pathsep}{tmp_path}"
    code, log = run(tmp_path, "pass", "make_table", before="import waits", PYTHONPATH=path)
    assert code == 0
    assert float(log.split("finished in ")[1].split(" s")[0]) < 3


def test_a_stage_without_torch_does_not_load_it(tmp_path: Path) -> None:
    code, log = run(tmp_path, "import sys; assert 'torch' not in sys.modules", rule="make_table")
    assert code == 0
    assert "torch" not in log


PRINT_HUB = (
    "from huggingface_hub import constants; import logging; logging.info('offline %s', constants.HF_HUB_OFFLINE)"
)


@pytest.mark.parametrize(
    ("rule", "offline"),
    [
        ("collect_statistics", True),
        ("sample_calibration", True),
        ("evaluate_zero_shot", True),
        ("make_table", True),
        ("fetch_model", False),
        ("fetch_token_corpus", False),
    ],
)
def test_only_fetching_may_use_the_hub(tmp_path: Path, rule: str, offline: bool) -> None:
    code, log = run(tmp_path, PRINT_HUB, rule)
    assert code == 0
    assert f"offline {offline}\n" in log


def test_a_variable_of_the_user_does_not_switch_the_hub_on(tmp_path: Path) -> None:
    _, log = run(tmp_path, PRINT_HUB, HF_HUB_OFFLINE="0")
    assert "offline True\n" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    "work",
    [
        "from huggingface_hub import hf_hub_download; hf_hub_download('nobody/nothing', 'config.json')",
        "from transformers import AutoConfig; AutoConfig.from_pretrained('nobody/nothing')",
        "from datasets import load_dataset; load_dataset('nobody/nothing')",
    ],
)
def test_what_was_not_fetched_is_said_in_one_line(tmp_path: Path, work: str) -> None:
    code, log = run(tmp_path, work)
    assert code == 1
    assert "Something was not fetched" in log
    assert "`snakemake data --profile profiles/local --configfile FILE`" in log
    assert "Traceback" not in log


def test_forks_load_libraries_as_jobs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which read these variables when they are loaded: in the server, for all jobs."""
    given: list[Mapping[str, str]] = []
    monkeypatch.setattr(stage, "start_fork_server", given.append)
    own = next(iter(stage.QUIET))
    for name, value in {own: "the user's", stage.OFFLINE[0]: "0"}.items():
        monkeypatch.setenv(name, value)
    stage.serve_forks()
    (found,) = given
    assert found[own] == "the user's"
    assert {name: found[name] for name in stage.OFFLINE} == dict.fromkeys(stage.OFFLINE, "1")
    expected = {**stage.ON_CPU, **stage.QUIET, **os.environ}
    assert {name: value for name, value in found.items() if name not in stage.OFFLINE} == {
        name: value for name, value in expected.items() if name not in stage.OFFLINE
    }


def test_a_missing_package_is_named_with_the_environment(tmp_path: Path) -> None:
    code, log = run(tmp_path, "import no_such_package")
    assert code == 1
    assert "No module named 'no_such_package'" in log
    assert f"in the environment of {sys.executable}" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("work", ["import lowrank.no_such_module", "1 / 0"])
def test_a_bug_keeps_its_traceback(tmp_path: Path, work: str) -> None:
    code, log = run(tmp_path, work)
    assert code == 1
    assert "please report it" in log
    assert "Traceback" in log


def test_a_job_runs_in_the_environment_of_the_head_node_or_not_at_all(tmp_path: Path) -> None:
    work = "import logging; logging.info('worked')"
    code, log = run(tmp_path, work, **{stage.ENVIRONMENT: stage.environment()})
    assert code == 0
    assert "worked" in log
    other = f"Python 3.11.2 (/opt/env), torch {torch.__version__}0"
    code, log = run(tmp_path, work, **{stage.ENVIRONMENT: other})
    assert code == 1
    assert f"this job runs in {stage.environment()} on " in log
    assert f"and the head node in {other}. " in log
    assert "worked" not in log
    assert "Traceback" not in log


def test_the_environment_is_that_of_python_and_torch() -> None:
    assert stage.environment() == f"Python {sys.version.split()[0]} ({sys.prefix}), torch {torch.__version__}"


def test_a_job_whose_result_another_writes_stops_and_leaves_its_log_alone(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    script = SCRIPT.replace("output=[]", f"output=[{str(output)!r}]")
    before = tmp_path / "stage.log"
    with output_lock([output], "post_train"):
        before.write_text("the log of the job that runs\n")
        run_script = script.format(
            before="", work="raise SystemExit(3)", rule="post_train", log=str(before), resources={}, models=False
        )
        process = subprocess.run(
            [sys.executable, "-c", run_script], env=os.environ | {"PYTHONPATH": str(SCRIPTS)}, check=False
        )
    assert process.returncode == 1
    first, second = before.read_text().splitlines()
    assert first == "the log of the job that runs"
    assert f"post_train: {output}: another job writes it (post_train, process {os.getpid()} on " in second


def test_a_log_begins_anew_with_each_job(tmp_path: Path) -> None:
    run(tmp_path, "import logging; logging.info('the first')")
    code, log = run(tmp_path, "import logging; logging.info('the second')")
    assert code == 0
    assert "the second" in log
    assert "the first" not in log


@NO_GPU
def test_a_job_that_was_promised_a_gpu_stops_without_one(tmp_path: Path) -> None:
    code, log = run(tmp_path, "import logging; logging.info('worked')", resources={"gpu": 1})
    assert code == 1
    assert "1 GPU asked for" in log
    assert "1 GPU was asked for, and this job sees none on " in log
    assert f"torch {torch.__version__}" in log
    assert "`gpus_per_job: 0`" in log
    assert "worked" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("resources", "sees"), [({"gpus_per_job": 1}, "''"), ({"gpus_per_job": 0, "gpu": 0}, "''"), ({}, "'0'")]
)
def test_a_job_that_was_given_no_gpu_takes_none_of_another(
    tmp_path: Path, resources: dict[str, int], sees: str
) -> None:
    work = "import os, logging; logging.info('sees %r', os.environ['CUDA_VISIBLE_DEVICES'])"
    code, log = run(tmp_path, work, resources=resources, CUDA_VISIBLE_DEVICES="0")
    assert code == 0
    assert f"sees {sees}" in log


def test_device_cpu_in_the_profile_hides_gpus(tmp_path: Path) -> None:
    work = "import os, logging; logging.info('sees %r', os.environ['CUDA_VISIBLE_DEVICES'])"
    code, log = run(tmp_path, work, resources={"gpu": 1, "device": "cpu"}, CUDA_VISIBLE_DEVICES="0")
    assert code == 0
    assert "sees ''" in log


def test_a_gpu_that_is_too_small_ends_in_one_line(tmp_path: Path) -> None:
    code, log = run(tmp_path, "import torch; raise torch.OutOfMemoryError('1 GiB wanted')", rule="collect_gradients")
    assert code == 1
    assert "1 GiB wanted. The memory of a GPU is too small: with `set-resources: collect_gradients: " in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("rule", "resources", "told"),
    [
        (
            "collect_gradients",
            {"layers_per_pass": 4},
            "{layers_per_pass: 1}` in the profile a pass holds",
        ),
        ("collect_gradients", SPREAD | SHARED, "{gpu: 2, processes: 1}` in the profile its model lies on 2 GPUs"),
        (
            "collect_gradients",
            SPREAD | SHARED | {"gpu": 4},
            "{gpu: 4, processes: 1}` in the profile its",
        ),
        ("collect_gradients", SPREAD | SHARED | {"gpu": 3, "processes": 1}, "{gpu: 4, processes: 1}` in"),
        ("evaluate_cost", SPREAD, "{gpu: 2}` in the profile its model lies on 2 GPUs"),
        ("evaluate_cost", SPREAD | {"gpu": 2}, "{gpu: 3}` in"),
    ],
)
def test_a_gpu_that_is_too_small_names_the_line_to_write(rule: str, resources: dict[str, Any], told: str) -> None:
    job = SimpleNamespace(rule=rule, resources=resources)
    for error in (
        torch.OutOfMemoryError("1 GiB wanted"),
        RankwiseError("a worker process failed: OutOfMemoryError: 1 GiB wanted"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error. Last error:\nCuda failure 2 'out of memory'"),
    ):
        hint = stage.memory_hint(job, error)
        assert hint.startswith(f". The memory of a GPU is too small: with `set-resources: {rule}: {{")
        assert f"with `set-resources: {rule}: {told}" in hint
    assert not stage.memory_hint(job, ValueError("1 GiB wanted"))
    assert not stage.memory_hint(job, RuntimeError("Cuda failure 217 'peer access is not supported'"))


@pytest.mark.parametrize(
    ("rule", "resources", "told"),
    [
        ("post_train", SHARED, "a smaller `micro_batch_size` in its `tuning` takes less; with `deepspeed: zero3`"),
        ("distil_features", {"gpu": 1}, "a smaller `batch_size` in its `tuning` takes less."),
        ("compute_bases", {"spreads_model": 0}, "this rule needs one with more."),
        ("collect_statistics", SHARED | {"layers_per_pass": 1}, "this rule needs one with more."),
    ],
)
def test_no_second_gpu_is_named_where_it_would_change_nothing(rule: str, resources: dict[str, Any], told: str) -> None:
    hint = stage.memory_hint(SimpleNamespace(rule=rule, resources=resources), torch.OutOfMemoryError("1 GiB wanted"))
    assert hint.startswith(f". The memory of a GPU is too small: {told}")
    assert "gpu:" not in hint


def test_a_process_is_told_over_how_many_gpus_it_may_spread_a_model(tmp_path: Path) -> None:
    work = "import os, logging; logging.info('may %r', os.environ['RANKWISE_MODEL_GPUS'])"
    for resources, count in (({"gpu": 3, "device": "cpu"}, 0), ({"uses_gpu": 1}, 1), ({}, 0)):
        assert f"may '{count}'" in run(tmp_path, work, resources=resources)[1]


@pytest.mark.parametrize("driver", [True, False])
def test_deepspeed_computes_on_the_processor_only_where_no_driver_of_a_gpu_is(
    driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dxg").touch()
    monkeypatch.setattr(stage, "DEVICES", (str(tmp_path / "nvidiactl"), str(tmp_path / ("dxg" if driver else "kfd"))))
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    stage.set_up_environment(SimpleNamespace(rule="post_train", resources={"uses_gpu": 1}, threads=1))
    assert os.environ.get("DS_ACCELERATOR") == (None if driver else "cpu")


@pytest.mark.parametrize(("rule", "set_to"), [("evaluate_zero_shot", "1"), ("evaluate_cost", None)])
def test_attention_plans_nothing_for_each_shape_unless_time_is_measured(
    rule: str, set_to: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    stage.set_up_environment(SimpleNamespace(rule=rule, resources={}, threads=1))
    assert os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == set_to


def job(**resources: Any) -> Any:
    return SimpleNamespace(rule="post_train", resources=resources)


@pytest.mark.parametrize(
    ("asked", "nodes", "visible", "sees"),
    [
        (1, 1, 1, None),
        (2, 1, 4, None),
        (2, 1, 1, "sees 1 on"),
        (4, 1, 3, "sees 3"),
        (8, 2, 4, None),
        (8, 2, 3, "4 GPUs were asked for, and this job sees 3"),
    ],
)
def test_all_gpus_that_were_asked_for_must_be_there(
    monkeypatch: pytest.MonkeyPatch, asked: int, nodes: int, visible: int, sees: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if sees is None:
        stage.require_gpus(job(gpu=asked, nodes=nodes))
    else:
        with pytest.raises(RankwiseError, match=sees):
            stage.require_gpus(job(gpu=asked, nodes=nodes))


@NO_GPU
def test_the_build_of_torch_is_blamed_if_it_knows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    with pytest.raises(RankwiseError, match="built for the CPU only: install the build for your GPUs"):
        stage.require_gpus(job(gpu=1))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(RankwiseError, match=r"built for 12\.8, CUDA_VISIBLE_DEVICES is '3'"):
        stage.require_gpus(job(gpu=1))


@pytest.mark.parametrize("resources", [{}, {"gpu": 0}, {"gpu": None}])
def test_a_laptop_asks_for_nothing(resources: dict[str, Any]) -> None:
    stage.require_gpus(job(**resources))


def test_the_peak_is_that_of_the_resident_memory() -> None:
    before = usage.peak_resident_mib()
    size = int(before + 100) * 2**20
    block = bytearray(size)  # zeros take no memory until they are written
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert before + 100 <= usage.peak_resident_mib() <= before + size / 2**20 + 50


def test_the_largest_process_that_a_job_has_started_may_be_a_worker_of_another_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage, "WORKERS", [300.0, 1e6, 400.0])
    assert usage.usage_since(0.0)["child_peak_mib"] == 1e6

"""Jobs side by side on one machine take different GPUs. The GPUs are those of a pretended `nvidia-smi`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowrank.errors import RankwiseError
from lowrank.jobs import gpus, stage

SCRIPTS = Path(__file__).parents[3] / "workflow_scripts"
SMI = """#!/bin/sh
printf '%s\\n' {lines}
"""
JOB = """
import logging, os, sys, time
from pathlib import Path
from lowrank.jobs import gpus

logging.basicConfig(level=logging.INFO, format="%(message)s")
gpus.package_version = lambda _: "2.13.0"  # this machine's torch may be one that knows no GPU
gpus.POLL = 0.02
with gpus.own_gpus({count}, {per_gpu}, Path({folder!r}), {alone}):
    started = time.monotonic()
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    {work}
    print(started, time.monotonic(), flush=True)
"""


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with three GPUs, whose head deals them out; the folder of the locks."""
    lines = " ".join(f"'{number}, GPU-{name}'" for number, name in enumerate(("aa11", "ab22", "cc33")))
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI.format(lines=lines))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.delenv(gpus.ORDER, raising=False)
    monkeypatch.setattr(gpus, "package_version", lambda _: "2.13.0")
    monkeypatch.setenv(gpus.DEALING, "1")
    locks = tmp_path / "locks"
    locks.mkdir()
    return locks


def start(
    locks: Path, count: int, work: str = "time.sleep(0.2)", per_gpu: int = 1, alone: bool = False, **variables: str
) -> subprocess.Popen[str]:
    script = JOB.format(count=count, per_gpu=per_gpu, folder=str(locks), work=work, alone=alone)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(locks: Path, count: int, per_gpu: int = 1, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A job that holds GPUs until its input is closed, and what it sees."""
    job = start(locks, count, work="sys.stdin.read()", per_gpu=per_gpu, **variables)
    assert job.stdout is not None
    try:
        yield job, job.stdout.readline().strip()
    finally:
        job.communicate()


def ended(job: subprocess.Popen[str]) -> tuple[list[str], float, float, str]:
    """GPUs of a job, when it took them and gave them back, and its log."""
    shown, log = job.communicate(timeout=60)
    assert job.returncode == 0, log
    seen, times = shown.splitlines()
    started, stopped = map(float, times.split())
    return seen.split(","), started, stopped, log


@pytest.mark.parametrize("per_gpu", [1, 2])
def test_jobs_side_by_side_never_share_a_gpu_and_all_get_theirs(pretend: Path, per_gpu: int) -> None:
    """Also jobs that ask for several, which would wait for each other for ever if each took what it finds."""
    wanted = [1, 3, 2, 1, 2, 3, 1, 2]
    found = [ended(job) for job in [start(pretend, count, per_gpu=per_gpu) for count in wanted]]
    assert [len(set(seen)) for seen, *_ in found] == wanted
    for gpu in "012":
        times = [(started, stopped) for seen, started, stopped, _ in found if gpu in seen]
        for moment, _ in times:
            assert sum(started <= moment < stopped for started, stopped in times) <= per_gpu
    assert any("waiting for" in log for *_, log in found)
    assert all(f"GPU{'s' if len(seen) > 1 else ''} {', '.join(seen)} of this machine" in log for seen, *_, log in found)


def test_what_is_measured_has_its_gpus_to_itself(pretend: Path) -> None:
    """Though two jobs may hold each of the three."""
    wanted = [(1, False), (1, True), (2, True), (1, False), (3, True), (2, False), (1, True), (3, False)]
    jobs = [start(pretend, count, per_gpu=2, alone=alone) for count, alone in wanted]
    found = [ended(job) for job in jobs]
    assert [len(set(seen)) for seen, *_ in found] == [count for count, _ in wanted]
    for (_, alone), (seen, started, stopped, _) in zip(wanted, found, strict=True):
        for others, began, end, _ in found:
            if alone and (began, end) != (started, stopped) and set(seen) & set(others):
                assert end <= started or stopped <= began
    with running(pretend, 2, per_gpu=2) as (_, first):
        assert ended(start(pretend, 1, per_gpu=2, alone=True))[0] == ["2"]
        assert ended(start(pretend, 3, per_gpu=2))[0] == ["0", "1", "2"]  # places that were looked at are given back
    assert first == "0,1"


def test_a_gpu_of_a_killed_job_is_free_again(pretend: Path) -> None:
    with running(pretend, 3) as (holder, _):
        waits = start(pretend, 3)
        assert waits.stderr is not None
        assert waits.stderr.readline() == "waiting for 3 of 3 GPUs: other jobs hold them\n"
        holder.send_signal(signal.SIGKILL)
        seen, *_ = ended(waits)
    assert seen == ["0", "1", "2"]


def test_a_file_system_without_locks_is_told(pretend: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(gpus.fcntl, "flock", refuse)
    with (
        pytest.raises(RankwiseError, match=r"this file system has none \(No locks available\)\. Set TMPDIR to"),
        gpus.own_gpus(1, 1, pretend),
    ):
        pytest.fail("a GPU was taken without a lock")
    assert gpus.VISIBLE not in os.environ


def test_who_came_first_is_served_first(pretend: Path) -> None:
    """A job that needs all is not passed for ever by those that need one."""
    with running(pretend, 2) as (holder, _):
        large = start(pretend, 3)
        assert large.stderr is not None
        assert large.stderr.readline() == "waiting for 2 of 3 GPUs: other jobs hold them\n"
        small = start(pretend, 1)
        assert small.stderr is not None
        assert small.stderr.readline() == "waiting for 1 of 3 GPUs: other jobs came before\n"
        holder.communicate()
        assert ended(large)[1] < ended(small)[1]


@pytest.mark.parametrize(
    ("chosen", "sees"),
    [("2", "2"), ("1,0", "1"), ("GPU-cc", "GPU-cc"), ("GPU-cc33,0", "GPU-cc33"), ("MIG-5", "MIG-5"), ("", "")],
)
def test_gpus_that_the_user_chose_are_kept_to(pretend: Path, chosen: str, sees: str) -> None:
    with running(pretend, 1, CUDA_VISIBLE_DEVICES=chosen) as (_, seen):
        assert seen == sees


@pytest.mark.parametrize(("chosen", "usable"), [("-1", []), ("1,-1,0", ["1"]), ("2,7,0", ["2"]), ("7", [])])
@pytest.mark.usefixtures("pretend")
def test_a_number_that_is_no_gpu_ends_the_list(chosen: str, usable: list[str]) -> None:
    assert list(gpus.usable_gpus({gpus.VISIBLE: chosen})) == usable


def test_one_gpu_has_one_lock_whatever_it_is_called(pretend: Path) -> None:
    with (
        running(pretend, 1, CUDA_VISIBLE_DEVICES="GPU-aa") as (_, first),
        running(pretend, 1) as (_, second),
        running(pretend, 1, CUDA_VISIBLE_DEVICES="0,1,2") as (_, third),
    ):
        assert (first, second, third) == ("GPU-aa", "1", "2")


def test_the_numbers_are_those_of_nvidia_smi(pretend: Path) -> None:
    with gpus.own_gpus(1, folder=pretend):
        assert os.environ[gpus.ORDER] == "PCI_BUS_ID"
        assert os.environ[gpus.VISIBLE] == "0"


@pytest.mark.parametrize("chosen", [None, "1,2"])
def test_what_was_visible_is_so_again(pretend: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    if chosen:
        monkeypatch.setenv(gpus.VISIBLE, chosen)
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), gpus.own_gpus(1, folder=pretend):
        raise ZeroDivisionError
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "why", ["another deals them out", "no driver", "torch for processors", "too few", "none wanted"]
)
def test_nothing_is_taken_where_it_is_not_ours_to_take(
    pretend: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """SLURM has said what a job sees; and what a job was promised is compared with what torch finds."""
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    if why == "another deals them out":
        gpus.deal_out_gpus(here=False)
    elif why == "no driver":
        monkeypatch.setenv("PATH", str(pretend))
    elif why == "torch for processors":
        monkeypatch.setattr(gpus, "package_version", lambda _: "2.13.0+cpu")
    with gpus.own_gpus({"too few": 3, "none wanted": 0}.get(why, 1), folder=pretend):
        assert os.environ[gpus.VISIBLE] == "0,1"
    assert not list(pretend.iterdir())


def test_a_driver_that_does_not_answer_is_said(
    pretend: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (pretend.parent / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert gpus.usable_gpus({}) == {}
    assert "GPUs are not dealt out, jobs side by side use the same ones: nvidia-smi failed" in caplog.text


def test_stages_that_measure_speed_are_alone_on_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[int, bool]] = {}

    @contextmanager
    def taken(count: int, jobs_per_gpu: int, alone: bool) -> Iterator[None]:
        asked[rule] = (jobs_per_gpu, alone)
        yield

    monkeypatch.setattr(stage, "own_gpus", taken)
    for name in ("set_up_logging", "set_up_environment", "load_models", "require_gpus", "write_job_record"):
        monkeypatch.setattr(stage, name, lambda *_: None)
    for rule in ("evaluate_cost", "evaluate_perplexity"):
        job = SimpleNamespace(rule=rule, threads=1, log=[], resources={"gpu": 1, "jobs_per_gpu": 4}, output=[])
        stage.run_stage(job, lambda _: None)  # type: ignore[arg-type]
    assert asked == {"evaluate_cost": (4, True), "evaluate_perplexity": (4, False)}


def test_a_stage_takes_its_gpu_before_it_works_and_others_see_none(pretend: Path, tmp_path: Path) -> None:
    """Rules say which jobs use a GPU; a profile that says `gpus_per_job: 0` wins."""
    script = """
import json, os, sys
from types import SimpleNamespace
from lowrank.jobs import gpus, stage

gpus.package_version = lambda _: "2.13.0"
stage.require_gpus = lambda job: None  # no GPU is here for torch to see
work = lambda job: print(json.dumps(os.environ.get("CUDA_VISIBLE_DEVICES")))
stage.write_job_record = lambda *_: None
for resources in json.loads(sys.argv[1]):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    stage.run_stage(SimpleNamespace(rule="post_train", threads=1, log=[], resources=resources, output=[]), work)
"""
    cases = [({"uses_gpu": 1}, "0"), ({"uses_gpu": 0}, ""), ({"uses_gpu": 1, "gpu": 2, "gpus_per_job": 2}, "0,1")]
    cases += [({"uses_gpu": 1, "gpus_per_job": 0}, ""), ({"uses_gpu": 1, "device": "cpu"}, ""), ({}, "")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    arguments = [sys.executable, "-c", script, json.dumps([resources for resources, _ in cases])]
    shown = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in shown.splitlines()] == [seen for _, seen in cases]
    assert (tmp_path / "rankwise-gpus/GPU-aa11.0").is_file()

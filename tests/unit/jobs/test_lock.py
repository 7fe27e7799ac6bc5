"""No two jobs write one result: who holds a lock, when it is taken over, and when it is not."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lowrank.errors import RankwiseError
from lowrank.jobs import lock
from lowrank.jobs.lock import Fate, Holder, fate_of, lock_path, output_lock, process_start

SCRIPTS = Path(__file__).parents[3] / "workflow_scripts"
HOLD = """
import sys, time
from lowrank.jobs.lock import output_lock
with output_lock([sys.argv[1]], "post_train"):
    print("held", flush=True)
    time.sleep(60)
"""
COMPETE = """
import os, sys, time
from pathlib import Path
from lowrank.errors import RankwiseError
from lowrank.jobs.lock import output_lock
output, go = sys.argv[1], Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
try:
    with output_lock([output], "post_train"):
        guard = os.open(output + ".inside", os.O_CREAT | os.O_EXCL)  # fails if another is inside
        time.sleep(1)
        os.unlink(output + ".inside")
        print("wrote")
except RankwiseError:
    print("refused")
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results/model/result.json"


def place(output: Path, holder: Holder) -> Path:
    """A lock that somebody has left."""
    path = lock_path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))
    return path


def a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def elsewhere(**changes: Any) -> Holder:
    """A job on another machine."""
    there = replace(Holder.here("post_train"), token="other", host="node7", boot="another", job="17", cluster="big")
    return replace(there, **changes)


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, cluster: str = "big") -> None:
    """Programs `squeue` and `scontrol` that say so."""
    scontrol = f"echo 'Configuration data as of now'; echo 'ClusterName             = {cluster}'"
    for name, text in (("squeue", squeue), ("scontrol", scontrol)):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$@" > "{folder}/{name}.asked"\n{text}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for variable in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)


# --- one at a time ---


def test_the_lock_says_who_holds_it_and_is_gone_at_the_end(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    with output_lock([output, output.with_name("second.json")], "post_train") as taken_over:
        assert taken_over == ""
        (path,) = output.parent.iterdir()
        assert path == output.parent / ".result.json.lock"
        held = json.loads(path.read_text())
        assert held["process"] == os.getpid()
        assert held["host"] == socket.gethostname()
        assert (held["job"], held["cluster"], held["rule"]) == ("4711", "big", "post_train")
    assert not list(output.parent.iterdir())


def test_an_error_gives_the_lock_back(output: Path) -> None:
    with pytest.raises(ZeroDivisionError), output_lock([output], "post_train"):
        raise ZeroDivisionError
    assert not list(output.parent.iterdir())


def test_a_job_without_outputs_needs_no_lock() -> None:
    with output_lock([], "all") as taken_over:
        assert taken_over == ""


def test_a_second_job_is_refused_while_the_first_runs_and_takes_over_once_it_was_killed(output: Path) -> None:
    first = start(HOLD, str(output))
    try:
        assert said(first) == "held"
        with pytest.raises(RankwiseError) as refused, output_lock([output], "post_train"):
            pytest.fail("two jobs hold one lock")
        message = str(refused.value)
        assert message.startswith(f"{output}: another job writes it (post_train, process {first.pid} on ")
        assert "its process still runs" in message
        assert f"`kill {first.pid}` on {socket.gethostname()}" in message
        assert json.loads(lock_path(output).read_text())["process"] == first.pid
    finally:
        first.kill()
        first.wait()
    with output_lock([output], "post_train") as taken_over:
        assert f"process {first.pid} has ended" in taken_over
        assert str(lock_path(output)) in taken_over
    assert not list(output.parent.iterdir())


def test_a_killed_job_whose_parent_does_not_ask_for_its_end_is_gone_too(output: Path) -> None:
    first = start(HOLD, str(output))
    assert said(first) == "held"
    first.kill()
    deadline = time.monotonic() + 60
    while process_start(first.pid) is not None and time.monotonic() < deadline:  # it stays in the list of processes
        time.sleep(0.01)
    with output_lock([output], "post_train") as taken_over:
        assert "has ended" in taken_over
    first.wait()


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_jobs_at_once_one_writes(output: Path, tmp_path: Path, left_behind: bool) -> None:
    """With no lock, and with that of a killed job, which each of them finds stale at the same time."""
    output.parent.mkdir(parents=True)
    if left_behind:
        place(output, replace(Holder.here("post_train"), token="old", process=a_dead_process()))
    jobs = [start(COMPETE, str(output), str(tmp_path / "go")) for _ in range(6)]
    assert {said(job) for job in jobs} == {"ready"}
    (tmp_path / "go").touch()
    found = sorted(said(job) for job in jobs)
    assert [job.wait() for job in jobs] == [0] * 6
    assert set(found) == {"wrote", "refused"}
    assert not list(output.parent.iterdir())


def test_a_second_job_is_refused_while_the_first_takes_over(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(output, replace(Holder.here("post_train"), token="old", process=a_dead_process()))
    plain, met = os.replace, []

    def meets_another(source: Path, target: Path) -> None:
        if not met:
            met.append(target)
            with pytest.raises(RankwiseError, match="another job writes it"), output_lock([output], "post_train"):
                pytest.fail("two jobs hold one lock")
        plain(source, target)

    monkeypatch.setattr(lock.os, "replace", meets_another)
    with output_lock([output], "post_train") as taken_over:
        assert "has ended" in taken_over
        assert met == [lock_path(output)]
    assert not list(output.parent.iterdir())


def test_a_lock_that_was_made_though_the_answer_was_lost_is_held(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS: asked once more, the server says that it is there."""
    plain = os.link

    def lost(source: Path, target: Path) -> None:
        plain(source, target)
        raise FileExistsError

    monkeypatch.setattr(lock.os, "link", lost)
    with output_lock([output], "post_train") as taken_over:
        assert taken_over == ""
        assert list(output.parent.iterdir()) == [lock_path(output)]
    assert not list(output.parent.iterdir())


def test_a_file_system_without_hard_links_will_do(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(lock.os, "link", refuse)
    with (
        output_lock([output], "post_train"),
        pytest.raises(RankwiseError, match="another job writes it"),
        output_lock([output], "post_train"),
    ):
        pytest.fail("two jobs hold one lock")
    assert not list(output.parent.iterdir())


def test_a_lock_that_was_taken_away_is_left_to_its_new_owner(output: Path) -> None:
    with output_lock([output], "post_train"):
        path = place(output, there := elsewhere())
    assert Holder(**json.loads(path.read_text())) == there


# --- what is known of the holder ---


def test_a_number_that_was_given_to_another_process_is_no_sign_of_life(output: Path) -> None:
    before = replace(Holder.here("post_train"), token="old", started="1")
    assert process_start(os.getpid()) not in ("", "1")
    place(output, before)
    with output_lock([output], "post_train") as taken_over:
        assert "its number was given to another" in taken_over


def test_a_process_of_another_user_that_the_system_hides_is_alive(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `hidepid` there is nothing of it in /proc."""
    theirs = replace(Holder.here("post_train"), token="theirs", process=2**22 + 1)
    place(output, theirs)

    def forbid(process: int, number: int) -> None:
        assert (process, number) == (theirs.process, 0)
        raise PermissionError

    monkeypatch.setattr(lock.os, "kill", forbid)
    with pytest.raises(RankwiseError, match="its process still runs"), output_lock([output], "post_train"):
        pytest.fail("two jobs hold one lock")


def test_after_a_restart_of_the_machine_nobody_holds_anything() -> None:
    before = replace(Holder.here("post_train"), boot="before")
    fate, why = fate_of(before, Holder.here("post_train"))
    assert fate is Fate.GONE
    assert "has been started anew" in why


def test_processes_of_another_container_cannot_be_seen() -> None:
    there = replace(Holder.here("post_train"), namespace="pid:[1]", process=a_dead_process(), job="")
    assert fate_of(there, Holder.here("post_train"))[0] is Fate.UNKNOWN


def test_a_process_of_another_machine_is_not_declared_dead(output: Path) -> None:
    path = place(output, elsewhere(job="", cluster=""))
    with pytest.raises(RankwiseError) as refused, output_lock([output], "post_train"):
        pytest.fail("taken from a job that may run")
    assert "it cannot be told whether the process still runs" in str(refused.value)
    assert f"If you know that it has ended, delete {path} and run again" in str(refused.value)


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SUSPENDED", "CONFIGURING", "A_STATE_OF_TOMORROW"])
def test_a_job_that_slurm_knows_is_left_alone(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    fake_slurm(tmp_path, monkeypatch, f"echo {state}")
    place(output, elsewhere())
    with pytest.raises(RankwiseError) as refused, output_lock([output], "post_train"):
        pytest.fail("taken from a job that runs")
    assert f"SLURM says {state}" in str(refused.value)
    assert "(SLURM job 17, post_train, process " in str(refused.value)
    assert "`scancel 17`" in str(refused.value)
    assert "--jobs=17" in (tmp_path / "squeue.asked").read_text()


@pytest.mark.parametrize(
    ("squeue", "why"),
    [
        ("echo CANCELLED", "SLURM says CANCELLED"),
        ("echo TIMEOUT; echo TIMEOUT", "SLURM says TIMEOUT"),
        ("true", "does not know the job any more"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "does not know the job any more"),
    ],
)
def test_a_job_that_slurm_has_ended_leaves_its_lock(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, why: str
) -> None:
    fake_slurm(tmp_path, monkeypatch, squeue)
    place(output, elsewhere())
    with output_lock([output], "post_train") as taken_over:
        assert why in taken_over
        assert "SLURM job 17" in taken_over


def test_a_job_that_is_ending_is_waited_for(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    fake_slurm(
        tmp_path, monkeypatch, f'if [ -e "{count}" ]; then echo COMPLETED; else touch "{count}"; echo COMPLETING; fi'
    )
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    place(output, elsewhere())
    with output_lock([output], "post_train") as taken_over:
        assert "SLURM says COMPLETED" in taken_over


def test_a_job_that_does_not_come_to_its_end_is_not_waited_for_for_ever(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, "echo COMPLETING")
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    place(output, elsewhere())
    with pytest.raises(RankwiseError, match="SLURM says COMPLETING"), output_lock([output], "post_train"):
        pytest.fail("taken from a job that may write")


@pytest.mark.parametrize(
    ("squeue", "cluster", "why"),
    [
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "big", "squeue cannot tell"),
        ("echo CANCELLED", "small", "it is a job of the cluster big, and this is small"),
    ],
)
def test_what_slurm_cannot_tell_is_not_taken_for_dead(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, cluster: str, why: str
) -> None:
    fake_slurm(tmp_path, monkeypatch, squeue, cluster)
    place(output, elsewhere())
    with pytest.raises(RankwiseError, match=why), output_lock([output], "post_train"):
        pytest.fail("taken from a job that may run")


def test_without_slurm_its_jobs_are_not_declared_dead(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, "")
    (tmp_path / "scontrol").unlink()
    (tmp_path / "squeue").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fate_of(elsewhere(), Holder.here("post_train"))[0] is Fate.UNKNOWN
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    fate, why = fate_of(elsewhere(), Holder.here("post_train"))
    assert fate is Fate.UNKNOWN
    assert "squeue is not installed here" in why


@pytest.mark.parametrize(("before", "now", "fate"), [(0, 1, Fate.GONE), (1, 3, Fate.GONE), (1, 1, Fate.RUNS)])
def test_a_job_that_slurm_starts_anew_succeeds_itself(before: int, now: int, fate: Fate) -> None:
    there = elsewhere(restarts=before)
    here = replace(Holder.here("post_train"), job="17", cluster="big", restarts=now)
    assert fate_of(there, here)[0] is fate


@pytest.mark.parametrize(("before", "now"), [(-1, 1), (0, -1)])
def test_a_job_of_which_scontrol_says_nothing_is_left_alone(before: int, now: int) -> None:
    here = replace(Holder.here("post_train"), job="17", cluster="big", restarts=now)
    fate, why = fate_of(elsewhere(restarts=before), here)
    assert fate is Fate.UNKNOWN
    assert "scontrol did not say" in why


def test_how_often_a_job_was_started_is_asked_of_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's variable does not get through Snakemake's job step."""
    fake_slurm(tmp_path, monkeypatch, "")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert Holder.here("post_train").restarts == -1
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\necho "   Requeue=1 Restarts=2 X=0"\n'
    )
    assert Holder.here("post_train").restarts == 2
    assert (tmp_path / "asked").read_text() == "show job 17\n"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert Holder.here("post_train").restarts == 0


@pytest.mark.parametrize("content", ["", "no lock", "[]", '{"token": "a"}'])
def test_a_damaged_lock_is_explained(output: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    path = place(output, elsewhere())
    path.write_text(content)
    with pytest.raises(RankwiseError) as refused, output_lock([output], "post_train"):
        pytest.fail("taken though nobody knows whose it is")
    assert str(refused.value).startswith(f"{path}: this lock cannot be read")
    assert path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file/result.json"
    with pytest.raises(RankwiseError, match=re.escape(f"{output}: ")), output_lock([output], "post_train"):
        pytest.fail("a lock under a file")

"""Worker processes by both launchers, on one machine and on two that SLURM names; and what their failures say."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.errors import RankwiseError
from lowrank.files import save_tensors, write_json
from lowrank.jobs import launcher, node, worker
from lowrank.jobs.crew import LAUNCHERS, Crew, Place, command, crew_of
from lowrank.jobs.forkserver import SERVER
from lowrank.jobs.launcher import environment_of_workers, launch, run_shared, start_command
from lowrank.jobs.share import ALONE
from tests import tiny
from tests.marks import ON_CPU
from tests.unit.jobs import crew_work, fake_slurm
from tests.unit.jobs.test_share import assert_close, some_tokens

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def workers_find_this_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


# --- how many, where ---


def test_the_profile_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert crew_of({}) == Crew(1, 1, "torchrun")
    assert crew_of({"gpu": 2, "processes": 3, "nodes": 2}) == Crew(3, 2)  # GPUs that the profile does not let us use
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert crew_of({"processes": 3}) == Crew(1)  # nobody deals out GPUs: other jobs may run beside this one
    assert crew_of({"gpu": 4, "launcher": "deepspeed"}) == Crew(4, 1, "deepspeed")
    assert crew_of({"gpu": 8, "nodes": 2}) == Crew(4, 2)
    assert crew_of({"gpu": 4, "processes": 1}) == Crew(1)  # whose model lies on all of them
    assert crew_of({"gpu": 4, "processes": 4}) == Crew(4)
    with pytest.raises(RankwiseError, match=r"`processes: 2` on 4 GPUs of a machine: it is 1, .* or 4$"):
        crew_of({"gpu": 4, "processes": 2})
    with pytest.raises(RankwiseError, match=r"`gpu: 3` on `nodes: 2`"):
        crew_of({"gpu": 3, "nodes": 2})
    with pytest.raises(RankwiseError, match=r"`launcher: mpi` in the profile: it is one of torchrun, deepspeed"):
        crew_of({"launcher": "mpi"})


@settings(deadline=None)
@given(each=st.integers(1, 8), nodes=st.integers(1, 5))
def test_the_hostfile_names_every_machine_once(each: int, nodes: int) -> None:
    place = Place(tuple(f"n{number}" for number in range(nodes)), 0, "n0", 29500)
    lines = place.hostfile(each).splitlines()
    assert [line.split() for line in lines] == [[f"n{number}", f"slots={each}"] for number in range(nodes)]
    from deepspeed.launcher.runner import _parse_hostfile

    assert sum(_parse_hostfile(lines).values()) == Crew(each, nodes).processes


def test_commands_of_one_machine_and_of_several(tmp_path: Path) -> None:
    job, place = tmp_path / "job.json", Place(("a", "b"), 1, "10.0.0.1", 1234)
    alone = command(Crew(4), "worker", job, Place(("localhost",), 0, "127.0.0.1", 1))
    logs = f"--log_dir {tmp_path}/torchrun"
    assert " ".join(alone[1:]) == f"-m torch.distributed.run --standalone {logs} --nproc_per_node 4 -m worker {job}"
    assert command(Crew(), "worker", job, Place(("localhost",), 0, "127.0.0.1", 1)) == [
        *(sys.executable, "-m", "worker", str(job)),
    ]
    second = " ".join(command(Crew(4, 2), "worker", job, place))
    assert f"--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 1234 {logs} --nproc_per_node 4" in second
    second = " ".join(command(Crew(4, 2, "deepspeed"), "worker", job, place))
    assert f"--hostfile {tmp_path}/hostfile1 --no_ssh --node_rank 1 --master_addr 10.0.0.1 --master_port 1234" in second
    assert (tmp_path / "hostfile1").read_text() == "a slots=4\nb slots=4\n"
    step = start_command(Crew(4, 2), job)
    assert step[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(step)


def test_machines_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm.install(tmp_path / "bin", monkeypatch)
    step = {"SLURM_STEP_NODELIST": "n[3-4]", "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_NODEID": "1"}
    assert node.machines(step, 2) == (("n3", "n4"), 1)
    assert node.machines({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODEID": "0"}, 2) == (("n1", "n2"), 0)
    with pytest.raises(RankwiseError, match="this step runs on 9"):
        node.machines({"SLURM_JOB_NODELIST": "n[1-9]", "SLURM_NODEID": "0"}, 2)
    with pytest.raises(RankwiseError, match=r"SLURM_JOB_NODELIST and SLURM_NODEID are not set"):
        node.machines({"SLURM_NODEID": "0"}, 2)
    with pytest.raises(RankwiseError, match="`scontrol show hostnames x` failed"):
        node.machines({"SLURM_JOB_NODELIST": "x", "SLURM_NODEID": "0"}, 2)


def test_all_machines_meet_where_the_first_one_says(tmp_path: Path) -> None:
    found: dict[int, tuple[str, int]] = {}

    def look(rank: int) -> None:
        found[rank] = node.meet(tmp_path / "meeting.json", ("localhost", "other"), rank)

    second = threading.Thread(target=look, args=(1,))
    second.start()
    look(0)
    second.join()
    assert found[0] == found[1]
    assert found[0][0] == "localhost"
    with pytest.raises(RankwiseError, match="first has not written it in 0 s; do all nodes see it"):
        node.meet(tmp_path / "nothing.json", ("first", "second"), 1, patience=0)


def test_nobody_meets_at_a_port_that_somebody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = node.free_port()
    assert taken in node.PORTS
    with socket.socket() as other:
        other.bind(("", taken))
        other.listen()
        free = node.free_port()
        monkeypatch.setattr(node, "PORTS", [*[taken] * 99, free])
        assert node.free_port() == free
        monkeypatch.setattr(node, "PORTS", [taken] * 100)
        with pytest.raises(OSError, match="none of a hundred ports"):
            node.free_port()


def test_a_node_with_too_few_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    node.check_gpus(1)
    with pytest.raises(RankwiseError, match=r"sees 1 GPUs of this job, and 2 are needed .*--gpus-per-node=2"):
        node.check_gpus(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    node.check_gpus(0)
    with pytest.raises(RankwiseError, match="sees 0 GPUs of this job, and 1 are needed"):
        node.check_gpus(1)


@pytest.mark.parametrize("own", ["2,3", None])
def test_a_node_takes_its_own_gpus_and_not_those_of_the_first(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    monkeypatch.setenv(worker.DEVICES, "0,1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if own:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    node.take_own_devices()
    assert os.environ.get(worker.DEVICES) == own


def test_workers_get_our_gpus_and_nothing_of_another_launcher() -> None:
    given = {"RANK": "3", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "4,6", "HOME": "/h"}
    environment = environment_of_workers(given, 5)
    assert not {"RANK", "MASTER_PORT"} & environment.keys()
    assert environment["HOME"] == "/h"
    assert environment["OMP_NUM_THREADS"] == "5"
    assert environment["RANKWISE_VISIBLE_DEVICES"] == "4,6"
    alone = environment_of_workers(given, 5, alone=True)
    assert (alone["RANK"], alone["WORLD_SIZE"]) == ("0", "1"), "as a launcher would say"


# --- real processes ---


def test_one_process_is_this_one(tmp_path: Path) -> None:
    assert run_shared(lambda arguments, share: (arguments, share), {"a": 1}, Crew(), 1, tmp_path) == ({"a": 1}, ALONE)
    assert not list(tmp_path.iterdir())


@ON_CPU
def test_one_process_of_its_own_needs_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    result = launch("tests.unit.jobs.crew_work:add_ranks", {"a": 1}, Crew(), 3, tmp_path)
    assert result == {"total": [0, 1, 1e-30], "own": [[0, 3]], "given": {"a": 1}, "devices": None}


@ON_CPU
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_processes_of_one_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # DeepSpeed's launcher would number devices of its own
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setattr(launcher, "WORKERS", [])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    given = {"text": "ä", "number": 0.1}
    result = run_shared(crew_work.add_ranks, given, Crew(2, 1, name), 6, tmp_path)
    assert not list(temporary.glob("torchelastic*"))
    assert result == {"total": [1, 2, 2e-30], "own": [[0, 3], [1, 3]], "given": given, "devices": ""}
    assert [100 < peak < 5000 for peak in launcher.WORKERS] == [True, True]


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_machines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are this one: what SLURM says of them is all that tells them apart."""
    options = fake_slurm.install(tmp_path / "bin", monkeypatch)
    result = run_shared(crew_work.add_ranks, {}, Crew(1, 2, name), 1, tmp_path / "job")
    assert result["total"] == [1, 2, 2e-30]
    assert result["own"] == [[0, 1], [0, 1]]
    assert "--nodes=2" in options.read_text().splitlines()
    if name == "deepspeed":
        hosts = [(tmp_path / f"job/hostfile{rank}").read_text() for rank in range(2)]
        assert hosts == ["rankwise-1.invalid slots=1\nrankwise-2.invalid slots=1\n"] * 2


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("kind", "said", "count"), [("ours", r"^model\.layers\.3: no\.$", 2), ("bug", "failed: ValueError: what", 1)]
)
def test_the_process_that_failed_is_heard_and_ends_the_others(kind: str, said: str, count: int, tmp_path: Path) -> None:
    write_json(tmp_path / "job.json.error0", "an old one")
    with pytest.raises(RankwiseError, match=said):
        launch("tests.unit.jobs.crew_work:fail", {"kind": kind}, Crew(count), 2, tmp_path)


@ON_CPU
def test_workers_leave_out_what_torch_warns_of(tmp_path: Path) -> None:
    assert launch("tests.unit.jobs.crew_work:torch_log_level", {}, Crew(), 1, tmp_path) == logging.ERROR


@ON_CPU
def test_a_worker_is_a_fork_where_there_is_a_server(
    fork_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SERVER, raising=False)
    assert launch("tests.unit.jobs.crew_work:fork_of", {}, Crew(), 1, tmp_path) is None
    monkeypatch.setenv(SERVER, fork_server)
    found = launch("tests.unit.jobs.crew_work:fork_of", {}, Crew(), 1, tmp_path)
    assert (found is not None) == (fork_server != ":")
    assert found is None or found.endswith(", worker")


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
def test_peaks_of_an_earlier_larger_crew_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "WORKERS", [])
    for rank in (0, 5):
        worker.peak_file(tmp_path / "job.json", rank).write_text("99999")
    launch("tests.unit.jobs.crew_work:fork_of", {}, Crew(), 1, tmp_path)
    assert [100 < peak < 5000 for peak in launcher.WORKERS] == [True]


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
def test_a_process_that_ends_without_a_message_is_told(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"ended without a message \(exit code -9\)"):
        launch("tests.unit.jobs.crew_work:die", {}, Crew(), 1, tmp_path)


def test_several_nodes_without_slurm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RankwiseError, match="`nodes: 2` needs a SLURM job, but there is no `srun`"):
        launch("tests.unit.jobs.crew_work:add_ranks", {}, Crew(1, 2), 1, tmp_path)


@ON_CPU
def test_no_process_outlives_a_killed_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the longest chain there is. (Post-training's tests do the same with torch's launcher.)"""
    crew = Crew(1, 2, "deepspeed")
    fake_slurm.install(tmp_path / "bin", monkeypatch)
    arguments = f"{{'folder': {str(tmp_path)!r}}}, {crew!r}, 2, {str(tmp_path / 'job')!r}"
    code = "from lowrank.jobs.crew import Crew; from lowrank.jobs.launcher import launch; "
    code += f"launch('tests.unit.jobs.crew_work:wait', {arguments})"
    library = str(Path(launcher.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": f"{library}{os.pathsep}{REPOSITORY}"}
    stage = subprocess.Popen([sys.executable, "-c", code], env=environment)
    alive = [tmp_path / f"alive{rank}" for rank in range(2)]
    try:
        _wait_until(lambda: all(path.is_file() and path.read_text() for path in alive))
        processes = psutil.Process(stage.pid).children(recursive=True)
        assert {int(path.read_text()) for path in alive} <= {process.pid for process in processes}
    finally:
        stage.send_signal(signal.SIGKILL)
        stage.wait()
    _gone, left = psutil.wait_procs(processes, timeout=120)
    assert not left


def _wait_until(condition: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
def test_statistics_and_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """The whole way of the stages, files on disk included."""
    tiny.model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tensors(tmp_path / "tokens.safetensors", {"tokens": some_tokens().int()})
    shared = {"dtype": "float32", "model": str(tmp_path / "model"), "tokens": str(tmp_path / "tokens.safetensors")}
    shared |= {"layers_per_pass": 1, "windows": 6, "draws": 2, "expert_tokens": None}
    for count in (1, 2):
        state = tmp_path / f"of{count}"
        run_shared(crew_work.collect, shared | {"state": str(state)}, Crew(count), 2, tmp_path)
    for name in crew_work.COLLECTED:
        one, two = (sorted((tmp_path / f"of{count}" / name).glob("layer_*")) for count in (1, 2))
        assert len(one) == tiny.LAYERS
        assert_close(two, one)

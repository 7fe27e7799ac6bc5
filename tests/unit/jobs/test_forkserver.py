"""The fork server: what a job sees in its fork, and where there is no server."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import psutil
import pytest

from lowrank.jobs import forkserver
from lowrank.jobs.imports import NEED_MODELS
from tests.unit.jobs.fork_samples import FORKS, JOB, LIBRARY, Server, ended, until

pytestmark = FORKS

# --- what a job sees ---


def test_a_fork_has_all_that_its_job_was_started_with(server: Server, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    work = """
        import json, tempfile
        print(json.dumps({
            "directory": os.getcwd(), "arguments": sys.argv[1:], "typed": input(), "mine": os.environ["MINE"],
            "length": len(os.environ["LONG"]), "name": __name__, "file": __file__, "temporary": tempfile.gettempdir(),
            "loaded": [name for name in ("wave", "colorsys", "sndhdr") if name in sys.modules],
            "fork_of": os.environ[FORK_OF], "server": os.environ[SERVER], "path": sys.path[0],
            "of_the_server": os.environ.get("ONLY_THE_SERVER"),
            "interrupt": __import__("signal").getsignal(2) is __import__("signal").default_int_handler,
        }))
        print("an error", file=sys.stderr)
    """
    variables = {"MINE": "yes", "LONG": "x" * 100_000, "TMPDIR": str(elsewhere)}
    server.environment.pop("ONLY_THE_SERVER")
    run = server.run(work, "one", "two words", env=server.environment | variables, cwd=elsewhere)
    assert (run.returncode, run.stderr) == (0, "an error\n")
    assert json.loads(run.stdout) == {
        **{"directory": str(elsewhere), "arguments": ["one", "two words"], "typed": "typed", "mine": "yes"},
        **{"length": 100_000, "name": "__main__", "file": str(tmp_path / "job1.py"), "temporary": str(elsewhere)},
        **{"loaded": ["wave", "colorsys"], "path": str(tmp_path), "of_the_server": None, "interrupt": True},
        **{"fork_of": f"{server.process.pid}, compute_bases", "server": server.environment[forkserver.SERVER]},
    }


def test_the_processes_that_a_job_starts_are_forks_of_the_same_server(server: Server, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(JOB.replace("compute_bases", forkserver.WORKER) + "print(os.environ[FORK_OF])")
    run = server.run(
        f"import subprocess\nsubprocess.run([sys.executable, {str(worker)!r}])\nprint(os.environ[FORK_OF])"
    )
    number = server.process.pid
    assert run.stdout.splitlines() == [f"{number}, worker", f"{number}, compute_bases"]


@pytest.mark.parametrize(("variable", "threads"), [("3", 3), ("4,2", 1), (None, 1)])
def test_torch_has_the_threads_that_the_environment_says(variable: str | None, threads: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "threads = 1\ndef set_num_threads(number):\n    global threads\n    threads = number"
    )
    (tmp_path / "colorsys.py").write_text("import torch")
    server = Server(tmp_path / "server", f"{tmp_path}{os.pathsep}{LIBRARY}")
    environment = {name: value for name, value in server.environment.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": variable} if variable else {}
    try:
        assert server.run("import torch\nprint(torch.threads)", env=environment).stdout == f"{threads}\n"
    finally:
        server.process.communicate(timeout=60)


def test_a_rule_finds_what_it_needs_beside_the_others_loaded(tmp_path: Path) -> None:
    more = {"compute_bases": ["sched"], "post_train": ["filecmp"]}
    server = Server(tmp_path, first=f"from lowrank.jobs import forkserver\nforkserver.MORE = {more}\n")
    try:
        work = "print([name for name in ('wave', 'colorsys', 'sched', 'filecmp') if name in sys.modules])"
        assert server.run(work).stdout == "['wave', 'colorsys', 'sched']\n"
    finally:
        server.process.communicate(timeout=60)


def test_jobs_do_not_see_what_others_have_changed(server: Server) -> None:
    work = "print(os.environ.get('LEFT'), hasattr(sys, 'left'))\nos.environ['LEFT'] = 'it'\nsys.left = True"
    assert [server.run(work).stdout for _ in range(2)] == ["None False\n"] * 2


def test_each_job_imports_the_library_as_it_lies_on_disk(tmp_path: Path) -> None:
    library = tmp_path / "library"
    shutil.copytree(LIBRARY / "lowrank", library / "lowrank", ignore=shutil.ignore_patterns("__pycache__"))
    server = Server(tmp_path, library)
    found = []
    try:
        for value in ("first", "second"):
            with (library / "lowrank/versions.py").open("a") as file:
                file.write(f"VALUE = {value!r}\n")
            found.append(server.run("from lowrank import versions\nprint(versions.VALUE)").stdout)
    finally:
        server.process.communicate(timeout=60)
    assert found == ["first\n", "second\n"]


# --- where there is none ---


def test_without_its_server_a_job_says_so_and_works_by_itself(server: Server) -> None:
    server.process.kill()
    server.process.wait()
    run = server.run("print(FORK_OF in os.environ)", process_group=0)
    assert (run.returncode, run.stdout) == (0, "False\n")
    assert run.stderr.startswith("compute_bases: no fork of this run's server (")
    assert run.stderr.endswith("); this job loads torch itself\n")


def test_a_server_that_ends_while_it_loads_lets_jobs_work_by_themselves(tmp_path: Path) -> None:
    loading = tmp_path / "loading"
    (tmp_path / "colorsys.py").write_text(f"import time\nopen({str(loading)!r}, 'w').close()\ntime.sleep(60)")
    slow = Server(tmp_path / "slow", f"{tmp_path}{os.pathsep}{LIBRARY}")
    jobs = [slow.start("print(FORK_OF in os.environ)", process_group=0) for _ in range(2)]
    until(loading.exists)
    time.sleep(0.5)  # until both have asked
    slow.process.kill()
    slow.process.wait()
    for job in jobs:
        said, errors = job.communicate(timeout=60)
        assert (job.returncode, said) == (0, "False\n")
        assert errors.startswith("compute_bases: no fork of this run's server (")


FAILS = """
import os, time

def fail(*_):
    time.sleep(0.5)  # long enough for a fork that did not wait to do its work
    raise OSError(11, 'Resource temporarily unavailable')

os.{} = fail
"""


@pytest.mark.parametrize("what", ["fork", "pidfd_open"])
def test_where_no_fork_can_be_made_or_watched_jobs_work_by_themselves(what: str, tmp_path: Path) -> None:
    server = Server(tmp_path, first=FAILS.format(what))
    try:
        for _ in range(2):
            run = server.run("print(FORK_OF in os.environ)")
            assert (run.returncode, run.stdout) == (0, "False\n")
            assert run.stderr.startswith("compute_bases: no fork of this run's server (it has ended)")
            assert server.process.poll() is None
    finally:
        server.process.communicate(timeout=60)


def test_a_module_that_cannot_be_loaded_is_left_to_the_job(tmp_path: Path) -> None:
    (tmp_path / "wave.py").write_text("raise ValueError('binary incompatibility')")
    server = Server(tmp_path / "server", f"{tmp_path}{os.pathsep}{LIBRARY}")
    try:
        assert server.run("print(FORK_OF in os.environ)").stdout == "True\n"
    finally:
        server.process.communicate(timeout=60)


def test_modules_of_the_folder_where_a_run_starts_are_no_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(forkserver.SERVER, raising=False)
    monkeypatch.setattr(forkserver, "_servers", [])
    forkserver.start_fork_server(os.environ | {"PYTHONPATH": str(LIBRARY)})
    (started,) = forkserver._servers
    time.sleep(1)
    assert started.poll() is None
    started.communicate(timeout=60)
    assert started.returncode == 0


def test_where_no_socket_can_be_a_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.delenv(forkserver.SERVER, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    forkserver.start_fork_server(os.environ)
    assert forkserver.SERVER not in os.environ
    assert not list(long.iterdir())
    assert capfd.readouterr().err == "without a fork server (AF_UNIX path too long): each job loads torch itself\n"


@pytest.mark.parametrize("value", [None, "", "{socket}:/another/python"])
def test_no_job_is_a_fork_without_a_server_or_of_another_python(value: str | None, server: Server) -> None:
    environment = {name: text for name, text in server.environment.items() if name != forkserver.SERVER}
    if value is not None:
        environment[forkserver.SERVER] = value.format(socket=server.sockets / "socket")
    run = server.run("print(FORK_OF in os.environ)", env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, "False\n", "")


def test_what_fetches_and_what_needs_no_models_is_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forkserver.SERVER, f"/nowhere/socket:{sys.executable}")
    for rule in ("fetch_model", "fetch_corpus", "evaluate_cost", "make_table"):
        assert forkserver.run_as_fork(rule) is None
    assert set(NEED_MODELS) - set(forkserver.FORKED) == {"fetch_model", "evaluate_cost"}
    assert set(forkserver.FORKED) - set(NEED_MODELS) == {forkserver.WORKER}
    assert set(forkserver.MORE) <= set(forkserver.FORKED)


@pytest.mark.parametrize(
    ("torch", "driver", "platform", "safe"),
    [
        ("2.13.0+cpu", False, "linux", True),
        ("2.13.0+cpu", True, "linux", True),
        ("2.13.0", False, "linux", True),
        ("2.13.0", True, "linux", False),
        ("2.13.0+rocm7", True, "linux", False),
        ("2.13.0+cpu", False, "darwin", False),
    ],
)
def test_forks_are_for_linux_without_gpus(
    torch: str, driver: bool, platform: str, safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "device"
    if driver:
        device.touch()
    monkeypatch.setattr(forkserver, "DEVICES", (str(tmp_path / "other"), str(device)))
    monkeypatch.setattr(forkserver, "package_version", lambda name: torch)
    monkeypatch.setattr(forkserver.sys, "platform", platform)
    assert forkserver.forks_are_safe() is safe


def test_all_modules_that_are_loaded_are_there() -> None:
    for name in (*forkserver.MODELS, *chain(*forkserver.MORE.values())):
        assert importlib.util.find_spec(name) is not None, name


def test_forks_that_cannot_be_watched_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(forkserver, "package_version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(forkserver.os, "pidfd_open", refuse)
    assert not forkserver.forks_are_safe()
    monkeypatch.delattr(forkserver.os, "pidfd_open")  # as in a Python that was built on an old system
    assert not forkserver.forks_are_safe()


def test_the_head_starts_one_server_which_ends_with_it(tmp_path: Path) -> None:
    head = """
import os, sys
from lowrank.jobs import forkserver
forkserver.forks_are_safe = lambda: True
for _ in range(2):
    forkserver.start_fork_server({**os.environ, "SEEN": "by the server"})
    print(os.environ[forkserver.SERVER], flush=True)
print(len(forkserver._servers), forkserver._servers[0].pid, flush=True)
input()
"""
    environment = os.environ | {"PYTHONPATH": str(LIBRARY), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "7"}
    with subprocess.Popen(
        [sys.executable, "-c", head], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        first, again, counted = (process.stdout.readline() for _ in range(3))
        assert first == again
        address, _, python = first.strip().partition(":")
        assert python == sys.executable
        assert Path(address).parent.stat().st_mode & 0o777 == 0o700
        count, pid = map(int, counted.split())
        assert count == 1
        server = psutil.Process(pid)
        until(Path(address).exists)
        until(server.environ)  # for a moment a new process has none
        seen = server.environ()
        assert (seen["SEEN"], seen["CUDA_VISIBLE_DEVICES"], seen["OMP_NUM_THREADS"]) == ("by the server", "", "1")
        process.kill()
        until(lambda: ended(server))
        assert not Path(address).parent.exists()

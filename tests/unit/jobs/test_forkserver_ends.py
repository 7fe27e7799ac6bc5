"""The fork server: every way in which a job, its fork, the server or the head ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lowrank.jobs import forkserver
from tests.unit.jobs.fork_samples import FORKS, JOB, LIBRARY, Server, ended, until

pytestmark = FORKS


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('words')", 1, "words\n"),
        ("raise ValueError('this one')", 1, "ValueError: this one\n"),
        ("import atexit; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("os.kill(os.getpid(), 15)", -15, ""),
        ("os.abort()", -6, ""),
    ],
)
def test_a_job_ends_as_its_fork_does(work: str, code: int, said: str, server: Server) -> None:
    run = server.run(work)
    assert run.returncode == code
    assert run.stderr.endswith(said)
    assert server.still_forks()


WAITS = "print(os.getpid(), flush=True)\ntime.sleep(600)"


def test_a_signal_to_end_reaches_the_fork(server: Server) -> None:
    work = f"""
import signal
def end(number, frame):
    os.write(1, b"asked to end\\n")  # the signal may come while the number below is being printed
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
{WAITS}
"""
    with server.start(work) as job:
        server.fork_of(job)
        job.terminate()
        said, _ = job.communicate(timeout=60)
    assert (job.returncode, said) == (7, "asked to end\n")


def test_a_terminals_interrupt_reaches_every_fork_and_not_the_server(server: Server) -> None:
    with server.start(WAITS) as job:
        server.fork_of(job)
        os.killpg(server.process.pid, signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert server.still_forks()


def test_a_signal_to_end_that_comes_before_the_fork_is_passed_on_later() -> None:
    relay = forkserver.Relay()
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        relay(signal.SIGTERM)
        assert relay.early == [signal.SIGTERM]
        assert sleeper.poll() is None
        relay.begin(sleeper.pid)
        assert sleeper.wait(timeout=60) == -signal.SIGTERM
    relay(signal.SIGTERM)  # nobody is there any more


@pytest.mark.parametrize("ignored", [True, False])
def test_what_the_job_was_started_to_ignore_its_fork_ignores(ignored: bool, server: Server) -> None:
    """As by `nohup`, or in a script that starts it in the background."""
    script = "import signal, sys, os\n" + (
        "signal.signal(2, signal.SIG_IGN)\nsignal.signal(1, signal.SIG_IGN)\n" if ignored else ""
    )
    work = "import signal\nprint([signal.getsignal(number) == signal.SIG_IGN for number in (1, 2, 15)])"
    file = server.folder / "job.py"
    file.write_text(script + JOB + work)
    run = subprocess.run(
        [sys.executable, str(file)], env=server.environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{[ignored, ignored, False]}\n"


def test_a_signal_to_end_that_all_get_ends_jobs_and_not_the_server(server: Server) -> None:
    with server.start(WAITS) as job:
        server.fork_of(job)
        os.killpg(server.process.pid, signal.SIGTERM)
        job.communicate(timeout=60)
    assert job.returncode == -signal.SIGTERM
    assert server.still_forks()


def test_a_job_that_is_killed_takes_its_fork_along(server: Server) -> None:
    with server.start(WAITS) as job:
        fork = server.fork_of(job)
        job.kill()
        until(lambda: ended(fork))
    assert server.still_forks()


def test_a_job_that_is_killed_while_the_server_loads_leaves_no_fork_behind(tmp_path: Path) -> None:
    module, mark = tmp_path / "colorsys.py", tmp_path / "worked"
    module.write_text(f"import time\nopen({str(tmp_path / 'loading')!r}, 'w').close()\ntime.sleep(1)")
    slow = Server(tmp_path / "slow", f"{tmp_path}{os.pathsep}{LIBRARY}")
    try:
        with slow.start(f"time.sleep(60)\nPath({str(mark)!r}).touch()") as job:
            until((tmp_path / "loading").exists)
            job.kill()
        assert slow.still_forks()
        until(lambda: not psutil.Process(slow.process.pid).children(recursive=True))
        assert not mark.exists()
    finally:
        slow.process.communicate(timeout=60)


def test_a_fork_that_nobody_looks_after_is_ended_with_its_job(server: Server) -> None:
    """Its end would not be known: the job fails, and nothing goes on writing."""
    with server.start(WAITS) as job:
        fork = server.fork_of(job)
        watcher = fork.parent()
        assert watcher
        assert watcher.ppid() == server.process.pid
        watcher.kill()
        job.communicate(timeout=60)
        assert job.returncode == -signal.SIGKILL
        until(lambda: ended(fork))
    assert server.still_forks()


def test_nothing_is_left_of_jobs_that_have_ended(server: Server) -> None:
    for _ in range(2):
        assert server.still_forks()
    until(lambda: not psutil.Process(server.process.pid).children())


@pytest.mark.parametrize("early", [False, True])
def test_a_signal_to_end_ends_a_job_that_found_no_server(early: bool, tmp_path: Path) -> None:
    """Also one that came while it asked."""
    script = f"""
import os, signal, sys
from lowrank.jobs import forkserver
def ask(*_):
    if {early}:
        signal.raise_signal(signal.SIGTERM)
    raise EOFError("it has ended")
forkserver._ask = ask
with forkserver.socket.socket(forkserver.socket.AF_UNIX) as listener:
    listener.bind({str(tmp_path / "socket")!r})
    listener.listen()
    os.environ[forkserver.SERVER] = {str(tmp_path / "socket")!r} + ":" + sys.executable
    forkserver.run_as_fork("compute_bases")
print("works", flush=True)
signal.raise_signal(signal.SIGTERM)
print("goes on")
"""
    environment = os.environ | {"PYTHONPATH": str(LIBRARY)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (-signal.SIGTERM, "" if early else "works\n")


def test_a_head_that_ends_takes_the_server_along_and_no_fork(server: Server) -> None:
    with server.start("print(os.getpid(), flush=True)\nprint('heard', input())") as job:
        server.fork_of(job)
        server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        assert not server.sockets.exists()
        said, _ = job.communicate("this\n", timeout=60)
    assert (job.returncode, said) == (0, "heard this\n")


def test_who_is_killed_while_it_asks_does_not_end_the_server(server: Server) -> None:
    for said in (b"", b'{"rule": "compu'):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.sockets / "socket"))
            connection.sendall(said)
    assert server.still_forks()

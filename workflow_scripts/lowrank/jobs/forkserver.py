"""A fork server: it loads torch and the classes of models once, and the jobs of a run start as its forks.

They are thousands of modules, and 5 to 8 seconds of a processor for each job that loads them itself (`imports.py`). The
head starts the server, which loads nothing before the first job asks for it, and ends with the head. A job's own
process only hands over what it was started with and waits: the fork has its directory, environment, terminal and log,
the same signals reach it, and its end is the job's. The library itself is not among what is loaded: each job imports it
anew, as it lies on disk.

On Linux, without GPUs, whose drivers do not outlive a fork, and for jobs on the head's own machine.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lowrank.jobs.imports import NEED_MODELS, uncollected
from lowrank.model.families import FAMILIES
from lowrank.versions import package_version

SERVER = "RANKWISE_FORK_SERVER"
"""The variable by which jobs know the socket of the server, and the Python that it runs in: `socket:python`."""
FORK_OF = "RANKWISE_FORK_OF"
"""The variable by which a fork knows of what: `number of the server's process, rule`."""
WORKER = "worker"
"""In place of a rule, for the processes that a job starts."""
FORKED = (*(rule for rule in NEED_MODELS if rule not in ("fetch_model", "evaluate_cost")), WORKER)
"""Rules whose jobs are forks. What fetches must not run where libraries were told that there is no network, and of
`evaluate_cost` a table shows the memory, to which a fork's libraries add what other rules need."""
MODELS = (
    *("torch", "accelerate", "pydantic.main", "snakemake.iocontainers", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "safetensors.torch"),
    *("transformers.models.{0}.modeling_{0}".format(family.removesuffix("_text")) for family in FAMILIES),
)
"""Modules that all of them need; `modeling_rankwise` has a class of each family."""
MORE = {
    "search_allocation": (
        "botorch.acquisition.logei",
        "botorch.fit",
        "botorch.models",
        "botorch.optim",
        "botorch.sampling",
    ),
    "evaluate_zero_shot": ("lm_eval.models.huggingface", "lm_eval.evaluator"),
    WORKER: ("deepspeed",),
}
"""Modules that some rules need beside these."""
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Files that are there where a driver for GPUs is: NVIDIA's, AMD's, that of Windows' Linux."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""That are sent to all processes of a run at once, and end them."""

_servers: list[subprocess.Popen[bytes]] = []


# --- in the head ---


def start_fork_server(environment: Mapping[str, str]) -> None:
    """Start a server that ends with this process, and tell all jobs of it: once, and where forks are safe.

    If there can be none, jobs load torch themselves, and a line says why.

    Args:
        environment: all of the server's, with what stages set before they load libraries, which read it then.
    """
    if SERVER in os.environ or not forks_are_safe():
        return
    folder = ""
    try:
        folder = tempfile.mkdtemp(prefix="rankwise-forks-")  # nobody else may enter it
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_socket_in(folder))
            listener.listen(64)
            server = subprocess.Popen(
                # Without -P, modules in the working directory would be taken for those of packages.
                [sys.executable, "-P", "-m", __name__, folder, str(listener.fileno())],
                stdin=subprocess.PIPE,  # never written to, and closed by the system when this process ends
                pass_fds=[listener.fileno()],
                env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
    except OSError as error:  # a path too long for a socket, a full disk
        shutil.rmtree(folder, ignore_errors=True)
        print(f"without a fork server ({error}): each job loads torch itself", file=sys.stderr)
        return
    _servers.append(server)  # or Python would close the pipe now
    os.environ[SERVER] = f"{_socket_in(folder)}:{sys.executable}"


def forks_are_safe() -> bool:
    """Whether a process that has loaded torch may be forked here, and forks be watched."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):  # a kernel before 5.3, a container or a Python without it
        return False
    return package_version("torch").endswith("+cpu") or not any(os.path.exists(device) for device in DEVICES)


def _socket_in(folder: str) -> str:
    return str(Path(folder) / "socket")


# --- in a job's own process ---


def run_as_fork(rule: str) -> int | None:
    """Run the script of this process as a fork of the server, to its end.

    Returns:
        The exit status, negative for the signal that ended it; nothing if this is the fork, or if there is no server
        for this job, which then is to do its work itself.
    """
    address, _, python = os.environ.get(SERVER, "").partition(":")
    this = os.environ.get(FORK_OF, "").rpartition(" ")[2]
    if rule not in FORKED or rule == this or python != sys.executable:
        return None
    relay = Relay()
    usual = signal.signal(signal.SIGTERM, relay)
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            relay.begin(_ask(connection, rule))
        except (OSError, EOFError) as error:  # nothing of the job has begun
            print(f"{rule}: no fork of this run's server ({error}); this job loads torch itself", file=sys.stderr)
            signal.signal(signal.SIGTERM, usual)
            for number in relay.early:
                signal.raise_signal(number)
            return None
        return _wait(connection, relay)


class Relay:
    """Passes a signal on to the fork; one that comes before it is there, as soon as it is.

    Attributes:
        fork: number of its process; 0 before that.
        early: signals that came before.
    """

    def __init__(self) -> None:
        self.fork, self.early = 0, list[int]()

    def __call__(self, number: int, _: FrameType | None = None) -> None:
        if not self.fork:
            self.early.append(number)
            return
        with suppress(ProcessLookupError):
            os.kill(self.fork, number)

    def begin(self, fork: int) -> None:
        """The fork is there."""
        self.fork = fork
        for number in self.early:
            self(number)


def _ask(connection: socket.socket, rule: str) -> int:
    """Hand over what this process was started with; the number of the fork's process."""
    asked = {
        "rule": rule,
        "arguments": sys.argv,
        "path": sys.path,
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "ignored": [int(number) for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN],
    }
    sys.stdout.flush()
    sys.stderr.flush()
    socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [0, 1, 2])
    if not (answer := _line(connection)):
        raise EOFError("it has ended")
    return int(answer)


def _line(connection: socket.socket) -> str:
    """A line of few bytes, or nothing at the end."""
    said = b""
    while not said.endswith(b"\n") and (more := connection.recv(1)):
        said += more
    return said.decode()


def _wait(connection: socket.socket, relay: Relay) -> int:
    """Wait for the fork's end, while signals are passed on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's reaches the fork, too
    woken, wakes = socket.socketpair()  # a signal just before `select` would not end it
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    while connection not in select.select([connection, woken], [], [])[0]:
        woken.recv(64)
    signal.set_wakeup_fd(-1)
    if answer := _line(connection):
        return int(answer)
    relay(signal.SIGKILL)  # who looked after it has ended: its end would not be known
    return -signal.SIGKILL


def end_as(status: int) -> NoReturn:
    """End this process as its fork has ended: with its exit code, or by the same signal."""
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(abs(status))


# --- in the server ---


def serve(folder: str, listening: int) -> tuple[dict[str, Any], list[int]] | None:
    """Load what jobs ask for, and fork for each, until the head has ended.

    Args:
        folder: with the socket; it is removed at the end.
        listening: file number of the socket.

    Returns:
        In each fork what its job has asked for, and its three files; nothing in the server, when it is to end.
    """
    for number in SIGNALS:  # which are sent to all; the head ends when its jobs have
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what looks after a fork
    listener = socket.socket(fileno=listening)
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in ready:
            break
        connection, _ = listener.accept()
        said, files = _read(connection)
        if said.endswith(b"\n"):  # else who asked was killed meanwhile
            asked = json.loads(said) | {"server": os.getpid()}
            _load(asked["rule"])
            if not _forked():
                listener.close()
                _look_after(connection, files)
                return asked, files
        connection.close()
        for file in files:
            os.close(file)
    listener.close()
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _forked() -> int:
    """Fork; the number of the new process, 0 in it. Where there can be none, -1: who asked does its work itself."""
    try:
        return os.fork()
    except OSError:  # no memory, or too many processes
        return -1


def _read(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One line, as far as it comes, and the files that came with it."""
    said, files, _, _ = socket.recv_fds(connection, 2**16, 3)
    while not said.endswith(b"\n") and (more := connection.recv(2**16)):
        said += more
    return said, list(files)


def _load(rule: str) -> None:
    """What a job of this rule needs. What cannot be loaded is left to the job, whose error says what to do."""
    with uncollected():
        for name in (*MODELS, *MORE.get(rule, ())):
            with suppress(Exception):
                importlib.import_module(name)


def _look_after(connection: socket.socket, files: list[int]) -> None:
    """Fork once more and return in that fork; this process tells the job's own one of its end.

    The fork begins once it is looked after: if that fails, who asked does the work itself. If the job's own process
    ends before, it was killed, and the fork is as well.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gate, opener = os.pipe()
    fork = os.fork()
    if not fork:
        connection.close()
        os.close(opener)
        if not os.read(gate, 1):
            os._exit(1)
        os.close(gate)
        return
    os.close(gate)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(fork)  # or this process ends, and with it the gate
    with suppress(OSError):
        connection.sendall(f"{fork}\n".encode())
    with suppress(OSError):  # it was killed already
        os.write(opener, b"1")
    os.close(opener)
    ready, _, _ = select.select([connection.fileno(), ended], [], [])
    if ended not in ready:
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    with suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(asked: dict[str, Any], files: list[int]) -> None:
    """Be the process that a job was started as, and run its script."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for signalled in SIGNALS:
        usual = signal.default_int_handler if signalled == signal.SIGINT else signal.SIG_DFL
        signal.signal(signalled, signal.SIG_IGN if signalled in asked["ignored"] else usual)
    os.environ.clear()
    os.environ.update(asked["environment"] | {FORK_OF: f"{asked['server']}, {asked['rule']}"})
    os.chdir(asked["directory"])
    tempfile.tempdir = None  # to be looked up in this environment
    for name in [name for name in sys.modules if name.partition(".")[0] == "lowrank"]:
        del sys.modules[name]
    sys.path[:] = asked["path"]
    sys.argv[:] = asked["arguments"]
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():  # which torch has read in the server
        torch: Any = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(int(threads))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if found := serve(sys.argv[1], int(sys.argv[2])):
        become(*found)

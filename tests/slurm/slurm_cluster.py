"""A throw-away SLURM cluster on one machine: a controller and two nodes as child processes, all files in one folder.

No accounting, no cgroups, no munge and nothing under /etc, so that it needs no more rights than its user has. Memory
limits hold all the same: each node looks at its jobs' memory once a second and kills what exceeds its request. A spike
between two looks passes, and the state of such a job is FAILED; OUT_OF_MEMORY as a state would need cgroups.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowrank.jobs.node import free_port
from tests.apt import SYSTEM, find

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "sinfo", "scontrol")
GPU_TYPE = "fake"
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
"""SLURM counts devices and hands out their numbers; it wants files that are devices, whatever they are."""
COLUMNS = ("JobID", "State", "Partition", "tres-per-job", "StartTime", "EndTime", "Name", "Comment")
CPU_NODE, GPU_NODE = "cn1", "gn1"

CONFIGURATION = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Memory, once a second; shared pages are divided among the processes that share them.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill,UsePss
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,sched_interval=1
# More processors than there are; a node that was down is back as soon as it registers.
SlurmdParameters=config_overrides
ReturnToService=2
# Jobs stay in the queue's list when they have ended, since there is no accounting that would remember them.
MinJobAge=3600
KillWait=2
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmdLogFile={folder}/slurmd.%n.log
GresTypes=gpu
NodeName={cpu_node} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=8 RealMemory=16000
NodeName={gpu_node} NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=16 RealMemory=32000 Gres=gpu:{type}:{gpus}
PartitionName=processors Nodes={cpu_node} MaxTime=120
PartitionName=accelerators Nodes={gpu_node} MaxTime=120
"""


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)


def belonging(configuration: Path, job: str = "") -> Iterator[psutil.Process]:
    """All processes that use the cluster of a configuration: its daemons, its jobs, and those who talk to it.

    Args:
        configuration: the file that their environment names.
        job: number of a job; then its processes only.
    """
    for process in psutil.process_iter():
        try:
            # Read as it is: SLURM writes titles of processes over their environment, which psutil then takes for empty.
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = [f"SLURM_CONF={configuration}", *([f"SLURM_JOB_ID={job}"] if job else [])]
        if all(variable.encode() in variables for variable in wanted):
            yield process


def sweep(configuration: Path) -> None:
    """Kill all that is left of a cluster."""
    left = [process for process in belonging(configuration) if process.pid != os.getpid()]
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=10)


def until(
    true: Callable[[], object],
    what: str,
    seconds: float = 300,
    every: float = 0.1,
    failed: Callable[[], str] = lambda: "",
) -> None:
    """Wait for something; that it does not happen, or that it cannot happen any more, is a failed test."""
    deadline = time.monotonic() + seconds
    while not true():
        assert not (reason := failed()), f"waiting for {what}: {reason}"
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(every)


@dataclass(frozen=True)
class Job:
    """A job as `squeue` lists it."""

    number: str
    state: str
    partition: str
    resources: str
    started: float
    ended: float
    name: str
    comment: str

    @classmethod
    def of(cls, line: str) -> Job:
        number, state, partition, resources, started, ended, name, comment = line.split("|")[:8]
        return cls(number, state, partition, resources, clock(started), clock(ended), name, comment)

    @property
    def rule(self) -> str:
        """The rule of Snakemake whose job it is: the comment is `rule_<rule>_wildcards_<values>`."""
        return self.comment.removeprefix("rule_").partition("_wildcards_")[0]

    @property
    def gpus(self) -> int:
        """How many it holds, or held: `gres:gpu:type:2`, or `N/A`."""
        return int(self.resources.rpartition(":")[2]) if self.resources.startswith("gres:gpu") else 0


def clock(time_of_day: str) -> float:
    """Seconds since 1970 of a time that SLURM prints; 0 if it knows none yet."""
    return time.mktime(time.strptime(time_of_day, "%Y-%m-%dT%H:%M:%S")) if time_of_day[:1].isdigit() else 0.0


class Cluster:
    """Two nodes and two partitions: `processors` without and `accelerators` with GPUs, which are not real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.configuration = folder / "slurm.conf"
        self.sweeper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Write the configuration, start all daemons and wait until both nodes are there.

        Raises:
            AssertionError: they do not come up; the end of the controller's log is in the message.
        """
        for name in ("state", "bin", f"spool/{CPU_NODE}", f"spool/{GPU_NODE}"):
            (self.folder / name).mkdir(parents=True)
        controller, first, second = free_ports(3)
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=psutil.Process().username(),
            folder=self.folder,
            controller=controller,
            first=first,
            second=second,
            cpu_node=CPU_NODE,
            gpu_node=GPU_NODE,
            type=GPU_TYPE,
            gpus=len(GPU_FILES),
        )
        self.configuration.write_text(text)
        devices = [f"NodeName={GPU_NODE} Name=gpu Type={GPU_TYPE} File={file}\n" for file in GPU_FILES]
        (self.folder / "gres.conf").write_text("".join(devices))
        # Snakemake's job steps drop all variables of SLURM, also the one that says where the configuration is.
        wrapper = self.folder / "bin/srun"
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF="{self.configuration}" exec {find("srun")} "$@"\n')
        wrapper.chmod(0o755)
        self._watch_over()
        self._daemon("slurmctld")
        for node in (CPU_NODE, GPU_NODE):
            self._daemon("slurmd", "-N", node)
        until(self._idle, "the nodes to come up", failed=self._failure)

    def _watch_over(self) -> None:
        """A process that sweeps up as soon as this one has ended, even if it was killed: its input ends then."""
        self.sweeper = subprocess.Popen(
            [sys.executable, __file__, str(self.configuration)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _daemon(self, program: str, *arguments: str) -> None:
        """In the foreground, so that it is a child; at a priority below that of the test, and its jobs with it."""
        path = find(program)
        assert path
        self.daemons[" ".join((program, *arguments))] = subprocess.Popen(
            ["nice", "-n", "5", path, "-D", *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _idle(self) -> bool:
        return self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == [CPU_NODE, GPU_NODE]

    def _failure(self) -> str:
        """Which daemon has ended, and the end of its log; nothing if all run."""
        for name, daemon in self.daemons.items():
            if daemon.poll() is not None:
                log = self.folder / f"{name.replace(' -N ', '.')}.log"
                return f"{name} has ended: {log.read_text()[-2000:] if log.is_file() else 'no log'}"
        return ""

    def environment(self) -> dict[str, str]:
        """Variables for programs that are to use this cluster; of another cluster, nothing."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = f"{self.folder / 'bin'}:{others.get('PATH', '')}:{SYSTEM}"
        return others | {"SLURM_CONF": str(self.configuration), "PATH": path}

    def ask(self, *command: str) -> str:
        """What one of SLURM's programs says; nothing if it fails, as it may if the daemons are busy."""
        with suppress(subprocess.TimeoutExpired):
            return self._run(*command).stdout
        return ""

    def order(self, *command: str) -> None:
        """Run one of SLURM's programs, which must succeed."""
        run = self._run(*command)
        assert run.returncode == 0, f"{' '.join(command)}: {run.stdout}{run.stderr}"

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False, timeout=60)

    def jobs(self) -> list[Job]:
        """All jobs since the start, the ended ones too."""
        listed = self.ask("squeue", "-h", "-t", "all", "-S", "i", "-O", ",".join(f"{name}:|" for name in COLUMNS))
        return [Job.of(line) for line in listed.splitlines()]

    def state(self, job: Job) -> str:
        """The state of a job by now, for which SLURM is asked until it answers."""
        found: list[str] = []

        def answered() -> bool:
            found[:] = [other.state for other in self.jobs() if other.number == job.number]
            return bool(found)

        until(answered, f"the state of {job}")
        return found[0]

    def lose(self, node: str) -> None:
        """Set a node down, as SLURM does if it does not answer."""
        self.order("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def steps(self, job: Job) -> list[psutil.Process]:
        """The processes by which a node looks after a job; while one is left, the node does not take the job again."""
        title = f"slurmstepd: [{job.number}."
        found = []
        for process in belonging(self.configuration):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def bring_back(self, node: str) -> None:
        """Have a node again that was down; one that answers comes back by itself."""

        def up() -> bool:
            state = self.ask("sinfo", "-h", "-n", node, "-o", "%t").strip()
            if state.startswith(("down", "drain")):
                self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
            return state in ("idle", "mix", "alloc")

        until(up, f"{node} to come back")

    def stop(self) -> None:
        """Cancel all jobs, end all daemons, kill what remains of jobs."""
        self.ask("scancel", "--user", psutil.Process().username())
        deadline = time.monotonic() + 10
        while self.ask("squeue", "-h", "-o", "%A").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        sweep(self.configuration)
        if self.sweeper and self.sweeper.stdin:
            self.sweeper.stdin.close()
            self.sweeper.wait(timeout=30)


if __name__ == "__main__":
    sys.stdin.read()
    sweep(Path(sys.argv[1]))

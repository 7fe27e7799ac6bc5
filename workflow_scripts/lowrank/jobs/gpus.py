"""The GPUs of one machine, for jobs side by side on it: each job holds its own for as long as it lives.

Snakemake counts GPUs and does not deal them out; SLURM does both. So where the head runs jobs on its own machine, a
job takes a lock on a file for each GPU that it gets, before torch starts, and tells CUDA to show no other. The kernel
gives such locks back when their process ends, however it ends.

Only one job at a time takes GPUs, in the order in which they came; it may wait with some of them in hand until others
are given back. So jobs that need several can neither block each other nor wait for ever behind those that need one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path

from lowrank.errors import RankwiseError
from lowrank.versions import package_version

log = logging.getLogger(__name__)

DEALING = "RANKWISE_DEAL_OUT_GPUS"
"""The variable by which a head tells its jobs that they share its machine."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
POLL = 0.5
"""Seconds between two looks at GPUs that others hold."""


def deal_out_gpus(here: bool) -> None:
    """Tell all jobs whether they run on the head's machine, where nobody else deals out its GPUs."""
    if here:
        os.environ[DEALING] = "1"
    else:
        os.environ.pop(DEALING, None)


def usable_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """The GPUs that jobs may use: as CUDA is told -> the name that is the same for all who mean it.

    These are all that `nvidia-smi` lists, or those that the user has chosen by CUDA_VISIBLE_DEVICES: numbers as
    `nvidia-smi` counts, UUIDs or their beginnings, parts of a GPU ("MIG-..."), up to the first number that is none.
    None where torch could use none.
    """
    if package_version("torch").endswith("+cpu"):
        return {}
    listed = _listed()
    chosen = environment.get(VISIBLE)
    if chosen is None:
        return listed
    uuids = list(listed.values())
    names = {}
    for entry in filter(None, (part.strip() for part in chosen.split(","))):
        if re.fullmatch(r"-?\d+", entry) and entry not in listed:
            break  # from such a number on, CUDA shows nothing: -1 turns GPUs off
        whole = [uuid for uuid in uuids if uuid.startswith(entry)]
        names[entry] = listed.get(entry, whole[0] if len(whole) == 1 else entry)
    return names if listed else {}


def _listed() -> dict[str, str]:
    """Number -> UUID of every GPU of this machine."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("GPUs are not dealt out, jobs side by side use the same ones: nvidia-smi failed (%s)", error)
        return {}
    return dict(re.findall(r"^(\d+), (\S+)$", shown, re.MULTILINE))


@contextmanager
def own_gpus(count: int, jobs_per_gpu: int = 1, folder: Path | None = None, alone: bool = False) -> Iterator[None]:
    """Hold GPUs of this machine, and show CUDA these alone.

    Does nothing where the head has not said that jobs share its machine, or where there are fewer GPUs than `count`:
    what a job was promised is checked against what torch sees.

    Args:
        count: how many.
        jobs_per_gpu: jobs that may hold one GPU at the same time.
        folder: of the locks; all jobs of all users of the machine must see the same.
        alone: no other job of this `jobs_per_gpu` may hold them, not even where several may hold one.
    """
    gpus = usable_gpus(os.environ) if count and DEALING in os.environ else {}
    if not gpus or len(gpus) < count:
        yield
        return
    before = {name: os.environ.get(name) for name in (ORDER, VISIBLE)}
    with ExitStack() as held:
        taken = _take(gpus, count, jobs_per_gpu, alone, folder or _folder(), held)
        os.environ.setdefault(ORDER, "PCI_BUS_ID")  # in which nvidia-smi counts
        os.environ[VISIBLE] = ",".join(taken)
        log.info("GPU%s %s of this machine", "s" if count > 1 else "", ", ".join(taken))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _take(
    gpus: Mapping[str, str], count: int, jobs_per_gpu: int, alone: bool, folder: Path, held: ExitStack
) -> list[str]:
    """The GPUs that were taken, in CUDA's order; their locks are in `held`."""
    needed = jobs_per_gpu if alone else 1  # places on each
    with ExitStack() as turn:
        if not _lock(folder / "turn", turn):
            log.info("waiting for %d of %d GPUs: other jobs came before", count, len(gpus))
            _lock(folder / "turn", turn, wait=True)
        locks = {entry: turn.enter_context(ExitStack()) for entry in gpus}  # of GPUs that are not taken in the end
        places: dict[str, set[int]] = {entry: set() for entry in gpus}
        taken: list[str] = []
        told = False
        while True:
            # The first place on every GPU before the second on any.
            for place, (entry, name) in product(range(jobs_per_gpu), gpus.items()):
                wanted = len(taken) < count and len(places[entry]) < needed and place not in places[entry]
                if wanted and _lock(folder / f"{name}.{place}", locks[entry]):
                    places[entry].add(place)
                    taken = [entry for entry in gpus if len(places[entry]) == needed]
            if len(taken) == count:
                for entry in taken:
                    held.enter_context(locks[entry].pop_all())
                return taken
            if not told:
                log.info("waiting for %d of %d GPUs: other jobs hold them", count - len(taken), len(gpus))
                told = True
            time.sleep(POLL)


def _lock(path: Path, held: ExitStack, wait: bool = False) -> bool:
    """Take a lock and give it to `held`; whether it was free. A file that another user has made serves as well."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        with suppress(FileExistsError):
            made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            os.fchmod(made, 0o644)
            os.close(made)
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        return False
    except OSError as error:
        os.close(file)
        raise RankwiseError(
            f"{path}: GPUs are dealt out by locks, and this file system has none ({error.strerror}). Set TMPDIR to a "
            "folder on a disk of this machine, the same for all who use its GPUs."
        ) from error
    held.callback(os.close, file)
    return True


def _folder() -> Path:
    """Where the locks of this machine lie, writable for all, as its temporary folder is."""
    folder = Path(tempfile.gettempdir()) / "rankwise-gpus"
    with suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o1777)
    return folder
